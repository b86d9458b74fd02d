#!/usr/bin/env python3
"""What a `generate` from Python costs over the same one from the command line.

    mkdir build/tiny && cp tests/data/tiny/{config.json,model.safetensors} build/tiny
    PYTHONPATH=build/cpu/python bench/python_overhead.py build/cpu/deltafox build/tiny \
        --tokens 4000 --threads 1 --output bench/results/python_overhead.json

Both are timed around the library's generate: the program by itself (`seconds` of --json), Python around
model.generate. They run in turn, and the overhead is the median of the rounds' ratios. The smallest model
is the hardest case: the larger ones take longer for the same way there, and the speed of memory, which
they wait for, changes by more than what is measured here. (Without its tokenizer, neither decodes.)
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
import time

import numpy as np

import deltafox

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROMPT = [464, 1266, 1517, 284, 466, 287, 2986, 6033, 318, 262, 290, 257, 286, 11, 13, 290]


def program_seconds(program, directory, ids, tokens, threads):
    command = [program, "generate", "--model", directory, "--input-ids", ",".join(map(str, ids))]
    command += ["--max-new-tokens", str(tokens), "--min-new-tokens", str(tokens)]
    command += ["--threads", str(threads), "--json"]
    report = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert report["new_tokens"] == tokens
    return report["seconds"]


def python_seconds(model, ids, tokens):
    prompt = np.array([ids])
    begin = time.perf_counter()
    out = model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens)
    seconds = time.perf_counter() - begin
    assert out.shape == (1, len(ids) + tokens)
    return seconds


def compare(program, directory, ids, tokens, threads, rounds):
    # The program is fresh for every run, and so is the model here.
    ours, theirs = [], []
    for _ in range(rounds):
        theirs.append(program_seconds(program, directory, ids, tokens, threads))
        model = deltafox.AutoModelForCausalLM.from_pretrained(directory, threads=threads)
        ours.append(python_seconds(model, ids, tokens))
    a, b = statistics.median(ours), statistics.median(theirs)
    return {
        "prompt_tokens": len(ids),
        "new_tokens": tokens,
        "rounds": rounds,
        "python_seconds": {"median": a, "min": min(ours), "max": max(ours)},
        "program_seconds": {"median": b, "min": min(theirs), "max": max(theirs)},
        "overhead_percent": 100 * (statistics.median(x / y for x, y in zip(ours, theirs)) - 1),
    }


def call_microseconds(tokens, rounds):
    """Of model.generate over the library's own generate, called without the Python layer."""
    model = deltafox.AutoModelForCausalLM.from_pretrained(ROOT / "tests" / "data" / "tiny", threads=1)
    prompt, ids = np.array([PROMPT]) % 1000, [np.array(PROMPT, np.int32) % 1000]
    config = deltafox._core.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = tokens
    core, layer = [], []
    for _ in range(rounds):
        begin = time.perf_counter()
        deltafox._core.generate(model._core, ids, config, None, True, True, [], False, None)
        middle = time.perf_counter()
        model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens)
        core.append(middle - begin)
        layer.append(time.perf_counter() - middle)
    return 1e6 * (statistics.median(layer) - statistics.median(core))


def processor():
    for line in open("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output")
    arguments = parser.parse_args()
    result = {
        "what": "generate from Python against the command line",
        "command": shlex.join(["bench/python_overhead.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "threads": arguments.threads,
        "python": platform.python_version(),
        "model": pathlib.Path(arguments.model).name,
        **compare(
            arguments.program,
            arguments.model,
            [id % 1000 for id in PROMPT],
            arguments.tokens,
            arguments.threads,
            arguments.rounds,
        ),
        "python_layer_microseconds_a_call": call_microseconds(8, 200),
    }
    text = json.dumps(result, indent=2) + "\n"
    if arguments.output:
        pathlib.Path(arguments.output).write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
