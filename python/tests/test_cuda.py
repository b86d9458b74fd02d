"""The package on a GPU. Left out where the library was built without CUDA or there is no GPU."""

import importlib.util

import numpy as np
import pytest

import deltafox
from conftest import GOLDEN, TINY, cuda_missing

pytestmark = pytest.mark.skipif(bool(cuda_missing()), reason=cuda_missing())

CHECKPOINTS = sorted(path.parent.name for path in GOLDEN.glob("*/model.safetensors"))
IDS = np.arange(3, 99).reshape(2, 48)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_float32_gives_what_the_cpu_gives(name):
    model = deltafox.AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype="float32")
    expected = model(IDS).logits
    logits = model.to("cuda")(IDS).logits
    assert model.device == "cuda" and isinstance(logits, np.ndarray)
    assert np.linalg.norm(logits - expected) <= 1e-4 * np.linalg.norm(expected)


def test_generate_and_stream_give_the_ids_of_the_cpu():
    model = deltafox.AutoModelForCausalLM.from_pretrained(TINY, dtype="float32")
    options = [{}, {"do_sample": True, "top_p": 0.9, "temperature": 0.7, "seed": 7}, {"num_beams": 3}]
    on_cpu = [model.generate(IDS, max_new_tokens=24, **each) for each in options]
    text = "".join(model.stream("The best", max_new_tokens=24))
    model = model.cuda()
    for each, expected in zip(options, on_cpu):
        assert np.array_equal(model.generate(IDS, max_new_tokens=24, **each), expected)
    assert "".join(model.stream("The best", max_new_tokens=24)) == text


def test_caches_are_passed_back_forked_and_kept(tmp_path):
    model = deltafox.AutoModelForCausalLM.from_pretrained(TINY, device="cuda", dtype="float32")
    whole = model(IDS).logits
    cache = model(IDS[:, :20]).past_key_values
    cache[0].save(tmp_path / "state.safetensors")
    fork = cache.copy()
    rest = model(IDS[:, 20:], past_key_values=cache).logits
    np.testing.assert_allclose(rest, whole[:, 20:], atol=1e-4)
    assert np.array_equal(model(IDS[:, 20:], past_key_values=fork).logits, rest)
    kept = model.load_cache(tmp_path / "state.safetensors")
    np.testing.assert_allclose(model(IDS[:1, 20:], past_key_values=kept).logits, rest[:1], atol=1e-4)


def test_weights_are_read_from_the_gpu():
    on_cpu = deltafox.AutoModelForCausalLM.from_pretrained(TINY, dtype="bfloat16")
    on_gpu = deltafox.AutoModelForCausalLM.from_pretrained(TINY, dtype="bfloat16", device="cuda")
    expected = dict(on_cpu.named_parameters())
    found = dict(on_gpu.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert np.array_equal(parameter.numpy(), expected[name].numpy())


def test_back_on_the_cpu():
    model = deltafox.AutoModelForCausalLM.from_pretrained(TINY, dtype="float32")
    expected = model(IDS).logits
    assert np.array_equal(model.to("cuda:0").to("cpu")(IDS).logits, expected)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_torch_tensors_on_the_gpu_come_back_there():
    import torch

    model = deltafox.AutoModelForCausalLM.from_pretrained(TINY).cuda()
    ids = torch.from_numpy(IDS).cuda()
    out = model(ids)
    assert out.logits.device == ids.device
    assert np.array_equal(out.logits.cpu().numpy(), model(IDS).logits)
    assert model(ids, labels=ids).loss.device == ids.device
    generated = model.generate(ids, max_new_tokens=5)
    assert generated.device == ids.device and generated.dtype == torch.int64
