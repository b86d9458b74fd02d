#!/usr/bin/env python3
"""Runs clang-tidy over the sources of a build that is up to date: tools/tidy.py build/cpu [--tests]

The tests' sources, which take as long as all others together, are checked with --tests only.
Nearly all of the time goes into the headers of libraries, so the files of a folder are read together,
up to GROUP of them, as the builds with CMAKE_UNITY_BUILD compile them; kernels, each compiled for
instruction sets of its own, are read alone. A group that was clean is checked again only when one of
its files, a header of ours that they include, its compile command, .clang-tidy or clang-tidy changed.
What was clean is remembered in build/tidy/.
"""

import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAMPS = ROOT / "build" / "tidy"
TIDY = "clang-tidy-14"
GROUP = 12
# The kernels are compiled once for every instruction set; one is enough to read them.
EXTRA = ["--extra-arg=-DHWY_COMPILE_ONLY_STATIC", "--checks=-bugprone-suspicious-include"]


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

    groups = defaultdict(list)  # folder, target, flags -> sources and what they were made from
    seen = set()
    for entry in json.loads((build / "compile_commands.json").read_text()):
        source = Path(entry["file"])
        if source in seen or not source.is_relative_to(ROOT) or source.is_relative_to(build):
            continue
        if source.is_relative_to(ROOT / "tests") and "--tests" not in sys.argv[2:]:
            continue
        seen.add(source)
        arguments = shlex.split(entry["command"])
        place = arguments.index("-o")
        read = {(build / name).resolve() for name in made_from.get(arguments[place + 1], [])}
        ours = {path for path in read | {source} if path.is_relative_to(ROOT)}
        flags = arguments[1:place] + arguments[place + 2 :]
        flags = [flag for flag in flags if flag not in ("-c", str(source))]
        target = arguments[place + 1].partition(".dir/")[0]
        alone = source if source.parent == ROOT / "src" / "cpu" else None
        groups[source.parent, target, alone, *flags].append((source, ours))

    jobs = {}  # stamp file -> sources, flags
    for (folder, _, _, *flags), members in groups.items():
        for part in range(0, len(members), GROUP):
            sources = [source for source, _ in members[part : part + GROUP]]
            ours = set().union(*(read for _, read in members[part : part + GROUP]))
            contents = [path.read_bytes() for path in sorted(ours)]
            key = digest([*common, *flags, *map(str, sources), *contents])
            name = str(folder.relative_to(ROOT)).replace("/", "_")
            jobs[STAMPS / f"{name}-{key[:16]}"] = sources, flags

    STAMPS.mkdir(parents=True, exist_ok=True)
    for path in STAMPS.iterdir():
        if path not in jobs:
            path.unlink()
    todo = {stamp: job for stamp, job in jobs.items() if not stamp.exists()}

    def run(job):
        stamp, (sources, flags) = job
        before = [word for source in sources[:-1] for word in ("-include", str(source))]
        result = subprocess.run(
            [TIDY, "--quiet", *EXTRA, str(sources[-1]), "--", *flags, *before],
            capture_output=True,
            text=True,
        )
        if result.returncode == 0:
            stamp.touch()
            return True
        print(result.stdout or result.stderr, end="", flush=True)
        return False

    # The longest first, so that the end does not wait for one of them.
    order = sorted(todo.items(), key=lambda job: -len(job[1][0]))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        clean = list(pool.map(run, order))
    print(
        f"tidy: {len(seen)} files in {len(jobs)} groups;"
        f" {len(todo)} groups checked now, {clean.count(False)} with problems"
    )
    return 0 if all(clean) else 1


if __name__ == "__main__":
    sys.exit(main())
