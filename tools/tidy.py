#!/usr/bin/env python3
"""Runs clang-tidy over the sources of a build that is up to date: tools/tidy.py build/cpu [--tests]

The tests' sources, which take as long as all others together, are checked with --tests only.
A file that was clean is checked again only when it, a header of ours that it includes, its compile
command, .clang-tidy or clang-tidy changed. What was clean is remembered in build/tidy/.
"""

import hashlib
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAMPS = ROOT / "build" / "tidy"
TIDY = "clang-tidy-14"
# The kernels are compiled once for every instruction set; one is enough to read them.
EXTRA = ["--extra-arg=-DHWY_COMPILE_ONLY_STATIC"]


def dependencies(build):
    """Maps each object file to what it was made from, as the compiler reported it to ninja."""
    text = subprocess.run(
        ["ninja", "-C", str(build), "-t", "deps"], check=True, capture_output=True, text=True
    ).stdout
    result = {}
    for block in text.split("\n\n"):
        lines = block.strip().splitlines()
        if lines:
            result[lines[0].split(":")[0]] = [line.strip() for line in lines[1:]]
    return result


def digest(parts):
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part if isinstance(part, bytes) else part.encode())
        sha.update(b"\0")
    return sha.hexdigest()


def main():
    build = (ROOT / sys.argv[1]).resolve()
    version = subprocess.run([TIDY, "--version"], check=True, capture_output=True).stdout
    rules = [path.read_bytes() for path in sorted(ROOT.glob("**/.clang-tidy"))]
    common = [version, *rules, *EXTRA]
    made_from = dependencies(build)

    jobs = {}  # stamp file -> source
    seen = set()
    for entry in json.loads((build / "compile_commands.json").read_text()):
        source = Path(entry["file"])
        if source in seen or not source.is_relative_to(ROOT) or source.is_relative_to(build):
            continue
        if source.is_relative_to(ROOT / "tests") and "--tests" not in sys.argv[2:]:
            continue
        seen.add(source)
        arguments = shlex.split(entry["command"])
        output = arguments[arguments.index("-o") + 1]
        read = {(build / name).resolve() for name in made_from.get(output, [])}
        ours = sorted(path for path in read | {source} if path.is_relative_to(ROOT))
        key = digest([*common, entry["command"], *(path.read_bytes() for path in ours)])
        name = str(source.relative_to(ROOT)).replace("/", "_")
        jobs[STAMPS / f"{name}-{key[:16]}"] = source

    STAMPS.mkdir(parents=True, exist_ok=True)
    for stamp in STAMPS.iterdir():
        if stamp not in jobs:
            stamp.unlink()
    todo = {stamp: source for stamp, source in jobs.items() if not stamp.exists()}

    def run(job):
        stamp, source = job
        result = subprocess.run(
            [TIDY, "-p", str(build), "--quiet", *EXTRA, str(source)], capture_output=True, text=True
        )
        if result.returncode == 0:
            stamp.touch()
            return True
        print(result.stdout or result.stderr, end="", flush=True)
        return False

    # The longest files first, so that the end does not wait for one of them.
    order = sorted(todo.items(), key=lambda job: -job[1].stat().st_size)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        clean = list(pool.map(run, order))
    print(f"tidy: {len(jobs)} files, {len(todo)} checked now, {clean.count(False)} with problems")
    return 0 if all(clean) else 1


if __name__ == "__main__":
    sys.exit(main())
