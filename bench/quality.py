#!/usr/bin/env python3
"""What narrower weights cost in quality, against float32 weights of the same checkpoint.

    bench/quality.py --golden DIR [--dtypes bfloat16 int8 int4]
    bench/quality.py --model DIR --text FILE [--tokens 2048] [--window 512]

--golden takes a folder of checkpoints, each with ids and labels in expected.safetensors; --text cuts a
text into windows that the model reads from their start. For each dtype, over all tokens: the mean of
loss - loss in float32 (nats), the mean of KL(float32 || dtype), the share of tokens whose likeliest next
token stays the same, and the greatest difference of a logit relative to the standard deviation of
float32's logits. Prints JSON. Needs the Python package numpy.
"""

import argparse
import json
import pathlib
import struct
import subprocess
import sys
import tempfile

import numpy

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROWS = 256  # tokens at a time


def read_safetensors(path: pathlib.Path) -> dict[str, numpy.ndarray]:
    kinds = {"F32": numpy.float32, "I64": numpy.int64, "I32": numpy.int32}
    data = numpy.memmap(path, mode="r", dtype=numpy.uint8)
    (header_size,) = struct.unpack("<Q", data[:8])
    header = json.loads(bytes(data[8 : 8 + header_size]))
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] in kinds:
            begin, end = (8 + header_size + offset for offset in entry["data_offsets"])
            tensors[name] = data[begin:end].view(kinds[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def write_ids(path: pathlib.Path, tensors: dict[str, numpy.ndarray]) -> None:
    header, offset = {}, 0
    for name, values in tensors.items():
        header[name] = {"dtype": "I64", "shape": values.shape, "data_offsets": [offset, offset + values.nbytes]}
        offset += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    parts = [struct.pack("<Q", len(text)), text] + [values.tobytes() for values in tensors.values()]
    path.write_bytes(b"".join(parts))


def run(command: list) -> str:
    process = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if process.returncode != 0:
        sys.exit(process.stderr.strip())
    return process.stdout


def log_softmax(logits: numpy.ndarray) -> numpy.ndarray:
    logits = logits.astype(numpy.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - numpy.log(numpy.exp(logits).sum(axis=-1, keepdims=True))


def compare(exact: numpy.ndarray, narrow: numpy.ndarray, labels: numpy.ndarray) -> dict:
    """Of logits [T, N] and labels [T]; negative labels count for no loss."""
    loss_difference, divergence, agreeing, greatest, square_sum, total = 0.0, 0.0, 0, 0.0, 0.0, 0.0
    for begin in range(0, len(exact), ROWS):
        rows = slice(begin, begin + ROWS)
        p, q, label = log_softmax(exact[rows]), log_softmax(narrow[rows]), labels[rows]
        known = label >= 0
        loss_difference += (p - q)[known, label[known]].sum()
        divergence += (numpy.exp(p) * (p - q)).sum()
        agreeing += (p.argmax(axis=-1) == q.argmax(axis=-1)).sum()
        greatest = max(greatest, float(abs(exact[rows] - narrow[rows]).max()))
        square_sum += float(numpy.square(exact[rows], dtype=numpy.float64).sum())
        total += float(exact[rows].sum(dtype=numpy.float64))
    deviation = numpy.sqrt(square_sum / exact.size - (total / exact.size) ** 2)
    return {
        "loss_difference": loss_difference / (labels >= 0).sum(),
        "kl": divergence / len(exact),
        "same_top_token": agreeing / len(exact),
        "greatest_logit_difference": greatest / deviation,
    }


class Quality:
    def __init__(self, options):
        self.binary, self.threads, self.dtypes = options.binary, options.threads, options.dtypes

    def of(self, model: pathlib.Path, ids: pathlib.Path) -> dict:
        """Compares all dtypes on a file with input_ids and labels [B, T]."""
        labels = read_safetensors(ids)["labels"].reshape(-1).astype(numpy.int64)
        with tempfile.TemporaryDirectory() as scratch:

            def logits(dtype: str) -> numpy.ndarray:
                path = pathlib.Path(scratch) / f"{dtype}.safetensors"
                common = ["--model", model, "--threads", self.threads, "--dtype", dtype]
                run([self.binary, "logits", *common, "--input", ids, "--output", path])
                values = read_safetensors(path)["logits"]
                return values.reshape(-1, values.shape[-1])

            exact = logits("float32")
            losses = [
                -log_softmax(exact[at : at + ROWS])[range(len(part)), numpy.maximum(part, 0)][part >= 0].sum()
                for at in range(0, len(exact), ROWS)
                for part in [labels[at : at + ROWS]]
            ]
            result = {"tokens": len(labels), "float32_loss": sum(losses) / (labels >= 0).sum()}
            for dtype in self.dtypes:
                result[dtype] = compare(exact, logits(dtype), labels)
                (pathlib.Path(scratch) / f"{dtype}.safetensors").unlink()
            return result

    def of_text(self, model: pathlib.Path, text: pathlib.Path, tokens: int, window: int) -> dict:
        words = json.loads(run([self.binary, "tokenize", "--model", model, "--file", text, "--json"]))["ids"]
        windows = min(tokens, len(words) - 1) // window
        if windows < 1:
            sys.exit(f"{text}: has only {len(words)} tokens, a window needs {window + 1}")
        ids = numpy.array(words[: windows * window + 1], dtype=numpy.int64)
        with tempfile.TemporaryDirectory() as scratch:
            path = pathlib.Path(scratch) / "ids.safetensors"
            shape = (windows, window)
            write_ids(path, {"input_ids": ids[:-1].reshape(shape), "labels": ids[1:].reshape(shape)})
            return self.of(model, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=pathlib.Path, default=ROOT / "build/cpu/deltafox")
    parser.add_argument("--golden", type=pathlib.Path)
    parser.add_argument("--model", type=pathlib.Path)
    parser.add_argument("--text", type=pathlib.Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "int8", "int4"])
    options = parser.parse_args()
    if bool(options.golden) == bool(options.model and options.text):
        parser.error("give either --golden, or --model and --text")

    quality = Quality(options)
    if options.golden:
        cases = sorted(path.parent for path in options.golden.glob("*/expected.safetensors"))
        results = {case.name: quality.of(case, case / "expected.safetensors") for case in cases}
    else:
        results = {options.text.name: quality.of_text(options.model, options.text, options.tokens, options.window)}
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
