#!/usr/bin/env python3
"""Checks who includes whom.

    core <- {ops, io} <- model <- {infer, train} <- {eval, serve} <- {apps, python}

A layer may include itself and what is left of it. The kernels of cpu/ and cuda/ include core/, ops/
and their own folder, and nobody includes them. Nothing outside cuda/ names CUDA. Public headers
belong to the layer that implements them.

    tools/check_includes.py              checks this tree
    tools/check_includes.py --self-test  checks that this program catches what it should
"""

import re
import sys
import tempfile
from pathlib import Path

BELOW = {
    "core": [],
    "ops": ["core"],
    "io": ["core"],
    "model": ["core", "ops", "io"],
    "infer": ["core", "ops", "io", "model"],
    "train": ["core", "ops", "io", "model"],
    "eval": ["core", "ops", "io", "model", "infer", "train"],
    "serve": ["core", "ops", "io", "model", "infer", "train"],
    "apps": ["core", "ops", "io", "model", "infer", "train", "eval", "serve"],
    "python": ["core", "ops", "io", "model", "infer", "train", "eval", "serve"],
    "cpu": ["core", "ops"],
    "cuda": ["core", "ops"],
}
PUBLIC = {
    "device": "core",
    "dtype": "core",
    "error": "core",
    "hub": "io",
    "tokenizer": "io",
    "model": "model",
    "generate": "infer",
}
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
CUDA = re.compile(
    r"\b(__global__|__device__|__host__|__shared__|__CUDACC__|__CUDA_ARCH__|cuda[A-Z]\w*)\b"
    r"|^\s*#\s*include\s*[<\"](cuda|cublas|cudnn|nccl|cub/|thrust/)"
    r"|^\s*#\s*(if|ifdef|ifndef|elif)\b.*CUDA"
)


def layer_of(path):
    """The layer of a source file, its path relative to the root."""
    if path.parts[0] == "include":
        return PUBLIC.get(path.stem)
    if path.parts[0] == "src":
        return path.parts[1]
    return path.parts[0]


def layer_of_include(path, name):
    """The layer of an included file of ours; None for files of others."""
    first = name.split("/")[0]
    if first == "deltafox":
        return PUBLIC.get(Path(name).stem, "unknown")
    if first in BELOW and first not in ("apps", "python"):
        return first
    if "/" not in name:
        return layer_of(path)  # a neighbour
    return None


def check_file(root, path):
    layer = layer_of(path)
    if layer not in BELOW:
        return [f"{path}:1: belongs to no layer"]
    problems = []
    for number, line in enumerate((root / path).read_text().splitlines(), 1):
        where = f"{path}:{number}"
        include = INCLUDE.match(line)
        if include:
            quote, name = include.groups()
            target = layer_of_include(path, name) if quote == '"' or "deltafox/" in name else None
            if target == "unknown":
                problems.append(f"{where}: {name} belongs to no layer")
            elif target and target != layer and target not in BELOW[layer]:
                problems.append(f"{where}: {layer} must not include {target} ({name})")
        if layer != "cuda" and CUDA.search(line.split("//")[0]):
            problems.append(f"{where}: CUDA outside src/cuda")
    return problems


def check(root):
    files = [
        file.relative_to(root)
        for folder in ("include", "src", "apps", "python")
        for file in sorted((root / folder).rglob("*"))
        if file.suffix in (".h", ".cc", ".cu", ".cuh")
    ]
    problems = [problem for path in files for problem in check_file(root, path)]
    return len(files), problems


def self_test():
    good = {
        "include/deltafox/model.h": '#include "deltafox/dtype.h"\n',
        "src/cpu/linear.cc": '#include "ops/linear.h"\n#include "cpu/simd-inl.h"\n',
        "src/infer/generate.cc": '#include "deltafox/generate.h"\n#include "io/file.h"\n',
        "src/cuda/linear.cu": "#include <cuda_runtime.h>\n__global__ void f();\n",
        "apps/deltafox/main.cc": '#include "common.h"\n#include "deltafox/generate.h"\n',
    }
    bad = {
        "include/deltafox/tokenizer.h": '#include "deltafox/model.h"\n',
        "include/deltafox/secret.h": "\n",
        "src/core/buffer.cc": '#include "ops/linear.h"\n',
        "src/ops/linear.cc": '#include "cpu/simd-inl.h"\n',
        "src/ops/embedding.cc": '#include "io/file.h"\n',
        "src/io/file.cc": "#include <deltafox/generate.h>\n",
        "src/cpu/linear.cc": '#include "model/param.h"\n',
        "src/cuda/linear.cu": '#include "cpu/simd-inl.h"\n',
        "src/model/model.cc": "#ifdef DELTAFOX_CUDA\n",
        "src/infer/session.cc": "cudaStream_t stream;\n",
        "src/infer/state.cc": '#include "deltafox/secret.h"\n',
    }
    for files, problems_a_file in ((good, 0), (bad, 1)):
        with tempfile.TemporaryDirectory() as directory:
            root = Path(directory)
            for name, text in files.items():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_text(text)
            for name in files:
                problems = check_file(root, Path(name))
                if len(problems) != problems_a_file:
                    return f"{name}: {len(problems)} problems instead of {problems_a_file}: {problems}"
    return None


def main():
    if sys.argv[1:] == ["--self-test"]:
        failure = self_test()
        print(f"check_includes: self-test: {failure or 'ok'}")
        return 1 if failure else 0
    count, problems = check(Path(__file__).resolve().parent.parent)
    for problem in problems:
        print(problem)
    print(f"check_includes: {count} files, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
