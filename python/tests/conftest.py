"""Tests of the package `deltafox`: of the one that is installed, or with PYTHONPATH=build/cpu/python of
the build."""

import functools
from pathlib import Path

import numpy as np
import pytest

import deltafox

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "data" / "golden"
TINY = ROOT / "tests" / "data" / "tiny"  # random weights
BUNDLED = ROOT / "models" / "english-9m"
_DTYPES = {"F32": np.float32, "I32": np.int32, "I64": np.int64, "F64": np.float64}


@functools.cache
def cuda_missing():
    """Why nothing can run on a GPU; empty if it can."""
    try:
        deltafox.AutoModelForCausalLM.from_pretrained(TINY, device="cuda")
    except deltafox.Error as error:
        if "CUDA" not in str(error):
            raise
        return str(error)
    return ""


def read_safetensors(path):
    """name -> array, read without the library under test."""
    import json

    data = Path(path).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    body = memoryview(data)[8 + size :]
    return {
        name: np.frombuffer(body[slice(*entry["data_offsets"])], _DTYPES[entry["dtype"]]).reshape(
            entry["shape"]
        )
        for name, entry in header.items()
    }


@pytest.fixture(scope="session")
def tiny():
    return deltafox.AutoModelForCausalLM.from_pretrained(TINY)


@pytest.fixture(scope="session")
def tokenizer():
    return deltafox.AutoTokenizer.from_pretrained(TINY, add_bos_token=True)


@pytest.fixture(scope="session")
def golden_model():
    return deltafox.AutoModelForCausalLM.from_pretrained(GOLDEN / "delta_net-tiny")


@pytest.fixture(scope="session")
def golden():
    return read_safetensors(GOLDEN / "delta_net-tiny" / "expected.safetensors")
