#!/usr/bin/env python3
"""The main job at real size: writes a 760M DeltaNet, then generates, computes logits and losses of 2,048
tokens, and times a warm start to the first token of a 16-token prompt.

    bench/real_size.py [--binary build/cpu/deltafox] [--threads N] [--directory DIR] [--runs 5]

Prints JSON: wall seconds (medians) and peak resident memory of each command, as the operating system
counts them for the whole process. Needs 3.4 GB on the disk and as much memory.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOKENS = 2048


def cpu_name() -> str:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"


def run(command: list[str]) -> dict:
    """Wall seconds and peak resident memory of one whole process."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begin
    if status != 0:
        sys.exit(f"{' '.join(command)}: exit status {status}")
    return {"wall_s": wall, "peak_gb": usage.ru_maxrss / 1e6}


def median(runs: list[dict]) -> dict:
    return {
        "wall_s": round(statistics.median(r["wall_s"] for r in runs), 3),
        "peak_gb": round(max(r["peak_gb"] for r in runs), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=str(ROOT / "build/cpu/deltafox"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--directory", help="where the checkpoint is or goes; a temporary folder if not given")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        model = pathlib.Path(options.directory or scratch) / "delta_net-760m"
        results = {}
        if not (model / "config.json").exists():
            results["init"] = run([options.binary, "init", "delta_net-760m", "--output", str(model)])
        weights_gb = (model / "model.safetensors").stat().st_size / 1e9

        ids = [(7919 * t + 13) % 50257 for t in range(TOKENS)]
        common = ["--model", str(model), "--dtype", "float32", "--threads", str(options.threads)]

        def text(n: int) -> str:
            return ",".join(map(str, ids[:n]))

        def command(name: str, *arguments: str) -> list[str]:
            return [options.binary, name, *common, *arguments]

        output = str(pathlib.Path(scratch) / "logits.safetensors")
        first_token = command("generate", "--input-ids", text(16), "--output-ids", "--max-new-tokens", "1")
        commands = {
            "first_token_16": first_token,
            "generate_16_64": command("generate", "--input-ids", text(16), "--output-ids", "--max-new-tokens", "64"),
            "logits_2048": command("logits", "--input-ids", text(TOKENS), "--output", output),
            "loss_2048": command("loss", "--input-ids", text(TOKENS)),
        }
        run(first_token)  # brings the weights into the page cache
        for name, arguments in commands.items():
            results[name] = median([run(arguments) for _ in range(options.runs)])
        decode = results["generate_16_64"]["wall_s"] - results["first_token_16"]["wall_s"]
        print(
            json.dumps(
                {
                    "command": "bench/real_size.py",
                    "cpu": cpu_name(),
                    "threads": options.threads,
                    "runs": options.runs,
                    "weights_gb": round(weights_gb, 3),
                    "results": results,
                    "decode_tokens_per_s": round(63 / decode, 2),
                    "prefill_2048_tokens_per_s": round(TOKENS / results["loss_2048"]["wall_s"], 1),
                },
                indent=2,
            )
        )


if __name__ == "__main__":
    main()
