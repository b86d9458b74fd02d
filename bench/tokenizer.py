#!/usr/bin/env python3
"""Compares deltafox's tokenizer with tiktoken and Hugging Face tokenizers, on one thread.

    python3 -m venv build/venv && build/venv/bin/pip install tiktoken tokenizers
    build/venv/bin/python bench/tokenizer.py build/cpu/bench/bench_tokenizer \
        --output bench/results/tokenizer.json

The texts come with Debian 12 (packages perl-modules-5.36, base-files, libglib2.0-data, coreutils):
"english" is Perl's documentation and the common licences; "unicode" is the translated messages of
GLib and coreutils in twelve languages, taken in turns. All tokenizers get the same documents of about
64 kB, one call each, and all must give the same ids. Rates are MB/s of UTF-8 and of the
thread's processor time, medians of several passes.
"""

import argparse
import datetime
import gettext
import hashlib
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import tiktoken  # noqa: E402
import tokenizers  # noqa: E402

LANGUAGES = ["ar", "de", "el", "fr", "he", "hi", "ja", "ko", "ru", "th", "vi", "zh_CN"]
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DOCUMENT_BYTES = 64_000
PASSES = 5


def english_text():
    files = sorted(pathlib.Path("/usr/share/perl").glob("5*/**/*.pod"))
    files += sorted(p for p in pathlib.Path("/usr/share/common-licenses").iterdir() if p.is_file())
    seen, texts = set(), []
    for path in files:
        real = path.resolve()
        if real not in seen:
            seen.add(real)
            texts.append(real.read_text(encoding="utf-8", errors="ignore"))
    return "\n".join(texts)


def unicode_text():
    columns = []
    for language in LANGUAGES:
        messages = []
        for domain in ("glib20", "coreutils"):
            path = f"/usr/share/locale/{language}/LC_MESSAGES/{domain}.mo"
            if os.path.exists(path):
                with open(path, "rb") as file:
                    catalog = gettext.GNUTranslations(file)._catalog
                messages += [text for key, text in sorted(catalog.items(), key=str) if key and text]
        columns.append(messages)
    rows = max(len(column) for column in columns)
    return "\n".join(column[i] for i in range(rows) for column in columns if i < len(column))


def documents(text):
    """Cuts at line ends into documents of about DOCUMENT_BYTES."""
    result, lines, size = [], [], 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line.encode())
        if size >= DOCUMENT_BYTES:
            result.append("".join(lines))
            lines, size = [], 0
    if lines:
        result.append("".join(lines))
    return result


def byte_of_character():
    """GPT-2's alphabet: the printable character that stands for each byte, inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable}
    table.update({chr(0x100 + i): b for i, b in enumerate(others)})
    return table


def load_tiktoken(directory):
    vocab = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
    special = {"<|endoftext|>": vocab.pop("<|endoftext|>")}
    table = byte_of_character()
    ranks = {bytes(table[c] for c in token): rank for token, rank in vocab.items()}
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def load_hugging_face(directory):
    model = tokenizers.models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt"))
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def median_seconds(run):
    run()
    seconds = []
    for _ in range(PASSES):
        begin = time.thread_time()
        run()
        seconds.append(time.thread_time() - begin)
    return statistics.median(seconds)


def measure(encode, decode, texts):
    ids = [encode(text) for text in texts]
    mb = sum(len(text.encode()) for text in texts) / 1e6
    return ids, {
        "encode_mb_per_s": mb / median_seconds(lambda: [encode(text) for text in texts]),
        "decode_mb_per_s": mb / median_seconds(lambda: [decode(sequence) for sequence in ids]),
    }


def cpu_name():
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bench", help="the built bench_tokenizer")
    parser.add_argument("--vocabulary", type=pathlib.Path, default=pathlib.Path("tests/data/gpt2"))
    parser.add_argument("--output", type=pathlib.Path, help="where the JSON goes (default: stdout)")
    arguments = parser.parse_args()

    corpora = {"english": documents(english_text()), "unicode": documents(unicode_text())}
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, name + ".json") for name in corpora]
        for path, texts in zip(paths, corpora.values()):
            with open(path, "w", encoding="utf-8") as file:
                json.dump(texts, file)
        ours = json.loads(
            subprocess.run([arguments.bench, str(arguments.vocabulary), *paths], check=True,
                           capture_output=True, text=True).stdout)

    encoding = load_tiktoken(arguments.vocabulary)
    hugging_face = load_hugging_face(arguments.vocabulary)
    results = []
    for (name, texts), own in zip(corpora.items(), ours["corpora"]):
        ids, tiktoken_rates = measure(encoding.encode_ordinary, encoding.decode, texts)
        hf_ids, hf_rates = measure(lambda text: hugging_face.encode(text).ids,
                                   lambda sequence: hugging_face.decode(sequence), texts)
        if ids != hf_ids or own["gpt2"]["tokens"] != sum(map(len, ids)):
            sys.exit(f"{name}: the tokenizers disagree")
        results.append({
            "corpus": name,
            "sha256": hashlib.sha256("".join(texts).encode()).hexdigest(),
            "documents": len(texts),
            "bytes": own["gpt2"]["bytes"],
            "deltafox": own["gpt2"],
            "deltafox_json_escaped": own["json_gpt2"],
            "tiktoken": tiktoken_rates,
            "tokenizers": hf_rates,
            "encode_speedup_over_tiktoken":
                own["gpt2"]["encode_mb_per_s"] / tiktoken_rates["encode_mb_per_s"],
        })
    report = json.dumps({
        "command": "build/venv/bin/python " + shlex.join(sys.argv),
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "threads": 1,
        "clock": "processor time of the thread",
        "load_average": os.getloadavg()[0],
        "versions": {"tiktoken": tiktoken.__version__, "tokenizers": tokenizers.__version__,
                     "python": sys.version.split()[0]},
        "load_ms": ours["load_ms"],
        "corpora": results,
    }, indent=2)
    if arguments.output is None:
        print(report)
        return
    temporary = arguments.output.with_suffix(".tmp")
    temporary.write_text(report + "\n", encoding="utf-8")
    temporary.rename(arguments.output)


if __name__ == "__main__":
    main()
