#!/usr/bin/env python3
"""CPU speed against the machine's limits and against llama.cpp: a 760M Transformer (LLaMA) in bfloat16,
int8 and int4, and a 760M DeltaNet.

    bench/cpu.py --peer BIN --name NAME [--only SECTION ...] [--dtypes int8 ...] [--directory DIR]

BIN is the folder of llama.cpp's programs (llama-bench, llama-batched-bench, llama-completion,
llama-quantize). Each section runs deltafox and llama.cpp in turn, round after round, and adds its samples
to bench/results/cpu_NAME.json dtype by dtype, replacing those of an earlier run: a run may be cut into
several with --only and --dtypes, and what a broken one had measured is kept. Needs 8 GB on the disk, and once, to convert the model for llama.cpp, the Python packages numpy and gguf.

Sections: prepare (once: makes the checkpoints), machine, decode, prompt512, prompt2048, deltanet, batched,
start; without --only, all of them. Prints the table of what has been measured so far.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Ours and llama.cpp's name of the same width.
WIDTHS = {"bfloat16": "bf16", "int8": "q8_0", "int4": "q4_0"}
# What the project has set itself: decode's share of bandwidth, then speed over llama.cpp.
GOALS = {
    "bfloat16": {"share": 0.85, "decode": 1.8, "prompt512": 1.7, "prompt2048": 2},
    "int8": {"share": 0.85, "decode": 1.8, "prompt512": 6, "prompt2048": 7},
    "int4": {"share": 0.75, "decode": 1.8, "prompt512": 3, "prompt2048": 4},
}
# Ops that mix tokens, as against projections, MLP and norms.
MIXER_OPS = {"delta_rule", "short_conv", "feature_map", "forgetting_attention", "rope", "kv_append", "gla", "ssd"}


def run(command: list, with_errors: bool = False) -> str:
    process = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if process.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: exit status {process.returncode}\n{process.stderr[-2000:]}")
    return process.stdout + (process.stderr if with_errors else "")


def make_checkpoints(deltafox: pathlib.Path, architecture: str, models: pathlib.Path) -> None:
    """ARCHITECTURE-DTYPE in `models`, of each width, with random weights; those that are there stay."""
    wide = models / f"{architecture}-bfloat16"
    if not (wide / "config.json").exists():
        run([deltafox, "init", architecture, "--dtype", "bfloat16", "--output", wide])
    for dtype in ("int8", "int4"):
        narrow = models / f"{architecture}-{dtype}"
        if not (narrow / "config.json").exists():
            run([deltafox, "quantize", "--model", wide, "--dtype", dtype, "--output", narrow])


class Bench:
    def __init__(self, options):
        self.deltafox = options.binary
        self.peer = options.peer
        self.threads = options.threads
        self.rounds = options.rounds
        self.dtypes = options.dtypes
        self.models = options.directory

    # Models.

    def ours(self, architecture: str, dtype: str) -> list:
        """Options that name a model of this width."""
        return ["--model", self.models / f"{architecture}-{dtype}"]

    def theirs(self, dtype: str) -> pathlib.Path:
        return self.models / "gguf" / f"{WIDTHS[dtype]}.gguf"

    def prepare(self):
        for architecture in ("transformer_llama-760m", "delta_net-760m"):
            make_checkpoints(self.deltafox, architecture, self.models)
        if not self.theirs("int4").exists():
            run(
                [sys.executable, ROOT / "bench/make_gguf.py", "--quantize", self.peer / "llama-quantize"]
                + ["--output", self.models / "gguf"]
                + self.ours("transformer_llama-760m", "bfloat16")
            )
        yield {}

    # One process each; samples of one kind come back as lists.

    def measure_ours(self, architecture: str, dtype: str, *options) -> list[dict]:
        command = [self.deltafox, "bench", "model", "--threads", self.threads, "--json"]
        return json.loads(run(command + self.ours(architecture, dtype) + list(options)))["cases"]

    def measure_theirs(self, dtype: str, load_mode: str, prompt: int, generated: int, runs: int) -> list[float]:
        command = [self.peer / "llama-bench", "-m", self.theirs(dtype), "-t", self.threads, "-lm", load_mode]
        command += ["-p", prompt, "-n", generated, "-r", runs, "-o", "json"]
        if prompt > 1024:
            command.append("--no-warmup")  # it would read the whole prompt once more
        (result,) = json.loads(run(command))
        return result["samples_ts"]

    # Sections, in parts that are kept as they come. Rates are tokens per second.

    def machine(self):
        yield json.loads(run([self.deltafox, "bench", "machine", "--threads", self.threads, "--json"]))

    def decode(self):
        for dtype in self.dtypes:
            row = {"read": [], "llama_mmap": [], "llama_none": []}
            for _ in range(self.rounds):
                for name, architecture in (("transformer", "transformer_llama-760m"), ("delta_net", "delta_net-760m")):
                    for suffix, flags in (("", []), ("_copied", ["--copy-weights"])):
                        options = ["--prompt", 0, "--gen", 16, "--runs", 5, *flags]
                        (case,) = self.measure_ours(architecture, dtype, *options)
                        row.setdefault(name + suffix, []).extend(case["gen"] / s for s in case["decode_seconds"])
                        row.setdefault(f"{name}_share{suffix}", []).extend(case["bandwidth_shares"])
                        row["read"] += case["read_bytes_per_second"]
                for load_mode in ("mmap", "none"):
                    row[f"llama_{load_mode}"] += self.measure_theirs(dtype, load_mode, 0, 16, 3)
            yield {dtype: row}

    def prompt(self, length: int, runs: int):
        # The first prompt of a process, which is not counted, makes its cache's memory: llama.cpp touches that before.
        for dtype in self.dtypes:
            row = {"transformer": [], "llama": []}
            for _ in range(self.rounds):
                row["llama"] += self.measure_theirs(dtype, "none", length, 0, runs)
                (case,) = self.measure_ours(
                    "transformer_llama-760m", dtype, "--prompt", length, "--gen", 0, "--runs", runs + 1
                )
                row["transformer"] += [length / seconds for seconds in case["prefill_seconds"][1:]]
            yield {dtype: row}

    def deltanet(self):
        lengths = ["--prompt", "512,16384,512,0", "--prefill-runs", 1, "--runs", 5, "--gen", 24]
        short, long, short_again, empty = self.measure_ours("delta_net-760m", "bfloat16", *lengths)
        ops = {
            case["prompt"]: {op["op"]: op["seconds"] / case["prefill_seconds"][0] for op in case["first_prefill_ops"]}
            for case in (short_again, long)
        }
        yield {
            "prompt512": [512 / case["prefill_seconds"][0] for case in (short, short_again)],
            "prompt16384": [16384 / long["prefill_seconds"][0]],
            "decode_at_0": [empty["gen"] / seconds for seconds in empty["decode_seconds"]],
            "decode_at_16384": [long["gen"] / seconds for seconds in long["decode_seconds"]],
            "share_at_0": empty["bandwidth_shares"],
            "share_at_16384": long["bandwidth_shares"],
            "op_shares": ops,
        }

    def batched(self):
        for dtype in self.dtypes:
            cases = self.measure_ours(
                "delta_net-760m", dtype, "--prompt", 0, "--batch", "1,16,1,16", "--gen", 12, "--runs", 3
            )
            row = {"delta_net_1": [], "delta_net_16": [], "transformer_16": [], "llama_16": []}
            for case in cases:
                rates = [case["batch"] * case["gen"] / seconds for seconds in case["decode_seconds"]]
                row[f"delta_net_{case['batch']}"] += rates
            (case,) = self.measure_ours(
                "transformer_llama-760m", dtype, "--prompt", 16, "--batch", 16, "--gen", 12, "--runs", 3
            )
            row["transformer_16"] += [16 * case["gen"] / seconds for seconds in case["decode_seconds"]]
            command = [self.peer / "llama-batched-bench", "-m", self.theirs(dtype), "-t", self.threads, "-lm", "none"]
            command += ["-c", 2048, "-npp", 16, "-ntg", 12, "-npl", "16,16,16", "--output-format", "jsonl"]
            lines = [line for line in run(command).splitlines() if line.startswith("{")]
            row["llama_16"] += [json.loads(line)["speed_tg"] for line in lines]
            yield {dtype: row}

    def start(self):
        """Seconds of whole processes that read 16 tokens and write one; files in the page cache."""
        ids = ",".join(str((7919 * t + 13) % 50257) for t in range(16))
        text = "The quick brown fox jumps over the lazy dog and then it runs far away"  # 15 tokens or so

        def generate(architecture, dtype):
            command = [self.deltafox, "generate", "--threads", self.threads, "--max-new-tokens", 1]
            return command + ["--input-ids", ids, "--output-ids"] + self.ours(architecture, dtype)

        def complete(dtype):
            command = [self.peer / "llama-completion", "-m", self.theirs(dtype), "-t", self.threads, "-c", 512]
            return command + ["-n", 1, "-p", text, "--temp", 0, "-no-cnv"]

        for dtype in self.dtypes:
            commands = {
                "transformer": generate("transformer_llama-760m", dtype),
                "delta_net": generate("delta_net-760m", dtype),
                "llama": complete(dtype),
            }
            row = {name: [] for name in commands}
            for command in commands.values():
                run(command)
            for _ in range(5):
                for name, command in commands.items():
                    begin = time.perf_counter()
                    run(command)
                    row[name].append(time.perf_counter() - begin)
            yield {dtype: row}

    def sections(self) -> dict:
        return {
            "prepare": self.prepare,
            "machine": self.machine,
            "decode": self.decode,
            "prompt512": lambda: self.prompt(512, 2),
            "prompt2048": lambda: self.prompt(2048, 2),
            "deltanet": self.deltanet,
            "batched": self.batched,
            "start": self.start,
        }


def spread(values: list[float], digits: int = 1) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(ours) / statistics.median(theirs)


def line(name: str, value: float, goal: float, detail: str) -> str:
    return f"{name:<44}{value:7.2f}  goal {goal:<5}{'met   ' if value >= goal else 'missed'}  {detail}\n"


def table(results: dict) -> str:
    text = ""
    if machine := results.get("machine"):
        text += f"{machine['cpu']}, {', '.join(machine['instruction_sets'])}\n"
        for limits in machine["limits"]:
            text += f"  {limits['threads']} threads: read {limits['read_bytes_per_second']['median'] / 1e9:.1f} GB/s"
            for peak in limits["peaks"]:
                rate = peak["operations_per_second"]
                text += f", {peak['instruction']} " + (f"{rate['median'] / 1e9:.0f} G/s" if rate else "not available")
            text += "\n"
    for dtype, row in results.get("decode", {}).items():
        goal = GOALS[dtype]
        for name in ("transformer", "delta_net"):
            for suffix, weights in (("", "mapped"), ("_copied", "copied")):
                share = statistics.median(row[f"{name}_share{suffix}"])
                text += line(f"decode {dtype} {name}, {weights}: of bandwidth", share, goal["share"],
                             f"{spread(row[name + suffix])} tokens/s")  # fmt: skip
        for suffix, weights, mode in (("", "mapped", "mmap"), ("_copied", "copied", "none")):
            theirs = row[f"llama_{mode}"]
            text += line(f"decode {dtype}, {weights}: over llama.cpp ({mode})", ratio(row["transformer" + suffix], theirs),
                         goal["decode"], f"llama.cpp {spread(theirs)} tokens/s")  # fmt: skip
    for section in ("prompt512", "prompt2048"):
        for dtype, row in results.get(section, {}).items():
            detail = f"{spread(row['transformer'])} over {spread(row['llama'])} tokens/s"
            text += line(f"{section} {dtype}: over llama.cpp", ratio(row["transformer"], row["llama"]),
                         GOALS[dtype][section], detail)  # fmt: skip
    if row := results.get("deltanet"):
        text += line("DeltaNet prompt 16384 over prompt 512", ratio(row["prompt16384"], row["prompt512"]), 0.9,
                     f"{spread(row['prompt16384'])} over {spread(row['prompt512'])} tokens/s")  # fmt: skip
        text += line("DeltaNet decode at 16384 over decode at 0", ratio(row["decode_at_16384"], row["decode_at_0"]), 1,
                     f"{spread(row['decode_at_16384'])} over {spread(row['decode_at_0'])} tokens/s; shares of bandwidth "
                     f"{spread(row['share_at_16384'], 2)} and {spread(row['share_at_0'], 2)}")  # fmt: skip
        for prompt, ops in row["op_shares"].items():
            mixer = 100 * sum(share for op, share in ops.items() if op in MIXER_OPS)
            linear = 100 * ops.get("linear", 0)
            text += f"DeltaNet prompt {prompt}: mixer {mixer:.1f}% of the time (goal: under 12), linear {linear:.1f}%\n"
    for dtype, row in results.get("batched", {}).items():
        text += line(f"DeltaNet {dtype}: 16 sequences over one", ratio(row["delta_net_16"], row["delta_net_1"]),
                     6 if dtype == "int8" else 1, f"{spread(row['delta_net_16'])} tokens/s")  # fmt: skip
        text += line(f"Transformer {dtype}: 16 sequences over llama.cpp",
                     ratio(row["transformer_16"], row["llama_16"]), 1,
                     f"{spread(row['transformer_16'])} over {spread(row['llama_16'])} tokens/s")  # fmt: skip
    for dtype, row in results.get("start", {}).items():
        text += f"start to first token {dtype}: " + ", ".join(f"{k} {spread(v, 3)} s" for k, v in row.items()) + "\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=pathlib.Path, default=ROOT / "build/cpu/deltafox")
    parser.add_argument("--peer", type=pathlib.Path, required=True, help="folder of llama.cpp's programs")
    parser.add_argument("--directory", type=pathlib.Path, default=ROOT / "build/bench-models")
    parser.add_argument("--name", required=True, help="of the results: bench/results/cpu_NAME.json")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="SECTION")
    parser.add_argument("--dtypes", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    options = parser.parse_args()

    sections = Bench(options).sections()
    chosen = options.only or list(sections)
    if unknown := [name for name in chosen if name not in sections]:
        sys.exit(f"--only: '{unknown[0]}' is not one of {', '.join(sections)}")
    path = ROOT / f"bench/results/cpu_{options.name}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results["command"] = f"bench/cpu.py --peer BIN --name {options.name} --threads {options.threads}"
    results["peer"] = run([options.peer / "llama-bench", "--version"], with_errors=True).strip().splitlines()
    for name in chosen:
        for part in sections[name]():
            results[name] = results.get(name, {}) | part
            path.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results), end="")


if __name__ == "__main__":
    main()
