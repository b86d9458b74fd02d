#!/usr/bin/env python3
"""How the CPU engine grows with threads: a 760M DeltaNet with random weights in bfloat16, int8 and int4.

    bench/cpu_scaling.py --name NAME [--threads 1 2 4 8 16] [--directory DIR]

For each width and number of threads it reads a prompt of 512 and decodes behind it, with mapped and with copied
weights; also 16 sequences at a time, and with most threads, where there is AMX, the prompt once more with it switched
off (DELTAFOX_ISA=avx512). The threads run on the first cores. Prints a table and writes
bench/results/cpu_scaling_NAME.json, where it replaces what the same numbers of threads had: a run may be cut into
several. Needs 4 GB on the disk.
"""

import argparse
import json
import pathlib

from cpu import ROOT, WIDTHS, make_checkpoints, run

MODEL = "delta_net-760m"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=pathlib.Path, default=ROOT / "build/cpu/deltafox")
    parser.add_argument("--directory", type=pathlib.Path, default=ROOT / "build/bench-models")
    parser.add_argument("--name", required=True, help="of the results: bench/results/cpu_scaling_NAME.json")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    options = parser.parse_args()

    make_checkpoints(options.binary, MODEL, options.directory)
    limits = json.loads(run([options.binary, "bench", "machine", "--threads", max(options.threads), "--json"]))
    has_amx = any("amx" in name.lower() for name in limits["instruction_sets"])
    path = ROOT / f"bench/results/cpu_scaling_{options.name}.json"
    results = json.loads(path.read_text()) if path.exists() else {"cases": []}
    cases = [case for case in results["cases"] if case["threads"] not in options.threads]

    def measure(dtype: str, threads: int, *flags, isa: str = "") -> dict:
        command = ["env", f"DELTAFOX_ISA={isa}"] if isa else []
        command += ["taskset", "-c", f"0-{threads - 1}", options.binary, "bench", "model", "--threads", threads]
        command += ["--model", options.directory / f"{MODEL}-{dtype}", "--runs", 2, "--json", *flags]
        (case,) = json.loads(run(command))["cases"]
        case |= {"dtype": dtype, "threads": threads, "isa": isa or "all", "copied": "--copy-weights" in flags}
        cases.append(case)
        return case

    print(limits["cpu"])
    print(f"{'width':>9}{'threads':>9}{'prompt':>9}{'mapped':>9}{'copied':>9}{'share':>7}{'16 copied':>11}{'no AMX':>8}")
    for dtype in WIDTHS:
        for threads in options.threads:
            mapped = measure(dtype, threads, "--prompt", 512, "--gen", 16)
            copied = measure(dtype, threads, "--prompt", 512, "--gen", 16, "--copy-weights")
            line = f"{dtype:>9}{threads:9}{copied['prefill_tokens_per_second']:9.0f}"
            line += f"{mapped['decode_tokens_per_second']:9.1f}{copied['decode_tokens_per_second']:9.1f}"
            line += f"{copied['bandwidth_share']:7.2f}"
            batch = measure(dtype, threads, "--prompt", 0, "--batch", 16, "--gen", 8, "--copy-weights")
            line += f"{batch['decode_tokens_per_second']:11.1f}"
            if has_amx and threads == max(options.threads):
                plain = measure(dtype, threads, "--prompt", 512, "--gen", 0, "--copy-weights", isa="avx512")
                line += f"{plain['prefill_tokens_per_second']:8.0f}"
            print(line, flush=True)
    cases.sort(key=lambda case: (list(WIDTHS).index(case["dtype"]), case["threads"]))
    command = f"bench/cpu_scaling.py --name {options.name}"
    path.write_text(json.dumps({"command": command, "machine": limits, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
