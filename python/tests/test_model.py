"""Model calls: the golden cases, padding, caches, dtypes, weights, arrays of other kinds."""

import copy
import gc
import importlib.util
import os
import threading

import numpy as np
import pytest

import deltafox
from conftest import GOLDEN, TINY, cuda_missing, read_safetensors

CASES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
# The tolerances of the C++ golden tests.
LOGITS, LOSS = 2e-5, 1e-5
PROMPT = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.mark.parametrize("case", CASES)
def test_logits_and_losses_are_the_golden_ones(case):
    model = deltafox.AutoModelForCausalLM.from_pretrained(GOLDEN / case)
    expected = read_safetensors(GOLDEN / case / "expected.safetensors")
    out = model(expected["input_ids"])
    np.testing.assert_allclose(out.logits, expected["logits"], rtol=0, atol=LOGITS)
    out = model(expected["input_ids"], labels=expected["labels"])
    np.testing.assert_allclose(out.loss, expected["loss"], rtol=0, atol=LOSS)
    assert out.logits is None
    if "padded.input_ids" in expected:
        mask = expected["padded.attention_mask"]
        out = model(expected["padded.input_ids"], attention_mask=mask)
        real = mask.astype(bool)
        np.testing.assert_allclose(
            out.logits[real], expected["padded.logits"][real], rtol=0, atol=LOGITS
        )


def test_hidden_states_are_the_golden_ones(golden_model, golden):
    out = golden_model(golden["input_ids"], output_hidden_states=True)
    last = np.stack([hidden[:, -1] for hidden in out.hidden_states])
    np.testing.assert_allclose(last, golden["last_hidden_states"], rtol=0, atol=LOGITS)
    with_loss = golden_model(
        golden["input_ids"], labels=golden["labels"], output_hidden_states=True
    )
    for one, other in zip(out.hidden_states, with_loss.hidden_states):
        assert np.array_equal(one, other)


def test_padding_on_either_side_changes_nothing(golden_model):
    alone = golden_model(PROMPT).logits[0]
    width = PROMPT.size + 3
    ids = np.full((2, width), 7)
    mask = np.zeros((2, width), int)
    ids[0, 3:], mask[0, 3:] = PROMPT, 1
    ids[1, :-3], mask[1, :-3] = PROMPT, 1
    out = golden_model(ids, attention_mask=mask)
    assert np.array_equal(out.logits[0, 3:], alone) and np.array_equal(out.logits[1, :-3], alone)
    assert not out.logits[mask == 0].any()
    assert out.past_key_values.positions == [PROMPT.size] * 2
    loss = golden_model(ids, attention_mask=mask, labels=np.where(mask, 5, -100)).loss
    expected = golden_model(PROMPT, labels=np.full_like(PROMPT, 5)).loss[0]
    assert np.array_equal(loss[0, 3:], expected) and np.array_equal(loss[1, :-3], expected)
    assert not loss[mask == 0].any()
    for rows in (0, 1):  # the last column is a token of row 0 only
        last = golden_model(ids[rows : rows + 1], mask[rows : rows + 1], logits_to_keep=2).logits
        assert np.array_equal(last, out.logits[rows : rows + 1, -2:])


@pytest.mark.parametrize(
    "mask, message",
    [
        ([[1, 0, 1]], "row 0: padding must be on the left or on the right"),
        ([[0, 0, 0]], "row 0 has no token"),
        ([[1, 2, 1]], "must be 0 or 1"),
        ([[1, 1]], r"must be of shape \[1, 3\]"),
    ],
)
def test_a_mask_that_is_no_padding_is_refused(golden_model, mask, message):
    with pytest.raises(deltafox.Error, match=message):
        golden_model([[1, 2, 3]], attention_mask=mask)


def test_a_cache_goes_on_where_the_call_before_ended(golden_model):
    whole = golden_model(PROMPT)
    first = golden_model(PROMPT[:, :3])
    cache = first.past_key_values
    fork = copy.copy(cache)
    mask = np.ones_like(PROMPT)
    second = golden_model(PROMPT[:, 3:], attention_mask=mask, past_key_values=cache)
    assert second.past_key_values is cache and cache.get_seq_length() == PROMPT.size
    both = np.concatenate([first.logits, second.logits], 1)
    np.testing.assert_allclose(both, whole.logits, rtol=0, atol=LOGITS)
    assert fork.positions == [3]
    again = golden_model(PROMPT[:, 3:], past_key_values=fork)
    assert np.array_equal(again.logits, second.logits)


def test_a_saved_cache_comes_back(golden_model, tmp_path):
    ids = np.vstack([PROMPT, PROMPT + 1])
    cache = golden_model(ids).past_key_values
    for b in range(3):
        part = cache[b : b + 1] if b < 2 else cache
        part.save(tmp_path / str(b))
        back = golden_model.load_cache(tmp_path / str(b))
        rows = ids[b : b + 1] if b < 2 else ids
        one = golden_model(rows, past_key_values=part.copy())
        other = golden_model(rows, past_key_values=back)
        assert np.array_equal(one.logits, other.logits)


def test_a_cache_serves_one_call_at_a_time(golden_model):
    cache = golden_model(PROMPT).past_key_values
    with pytest.raises(deltafox.Error, match="given twice"):
        golden_model(np.vstack([PROMPT, PROMPT]), past_key_values=cache + cache)
    assert cache.positions == [PROMPT.size]  # usable afterwards


def test_a_cache_of_another_model_is_refused(golden_model, tiny):
    with pytest.raises(deltafox.Error, match="not made by this model"):
        tiny(PROMPT, past_key_values=golden_model(PROMPT).past_key_values)


@pytest.mark.parametrize(
    "ids, message",
    [
        ([[256]], "id 256 at position 0 is out of range"),
        ([[-1]], "id -1"),
        ([[2**32 + 5]], "beyond 32 bits"),
        ([[1.5]], "must be integers"),
        ([], r"must be of shape \[B, T\]"),
        ([[[1]]], r"must be of shape \[B, T\]"),
    ],
)
def test_bad_ids_are_refused(golden_model, ids, message):
    with pytest.raises(deltafox.Error, match=message):
        golden_model(np.array(ids))


def test_a_bad_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(deltafox.Error, match=str(tmp_path)):
        deltafox.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="nowhere"):
        deltafox.AutoModelForCausalLM.from_pretrained(tmp_path / "nowhere")


def test_weights_are_views_of_the_checkpoint():
    model = deltafox.AutoModelForCausalLM.from_pretrained(GOLDEN / "delta_net-tiny")
    stored = read_safetensors(GOLDEN / "delta_net-tiny" / "model.safetensors")
    parameters = dict(model.named_parameters())
    assert parameters.keys() == stored.keys()
    assert sum(p.numel() for p in model.parameters()) == model.num_parameters()
    for name, parameter in parameters.items():
        array = np.asarray(parameter)
        assert np.array_equal(array, stored[name])
        assert np.shares_memory(array, parameter.numpy()) and not array.flags.writeable
    # A view keeps the model alive, and a DLPack tensor is a copy of its own.
    array = parameters["lm_head.weight"].numpy()
    copied = np.from_dlpack(parameters["lm_head.weight"])
    assert not np.shares_memory(array, copied)
    del model, parameters, parameter
    gc.collect()
    assert np.array_equal(array, stored["lm_head.weight"])
    assert np.array_equal(copied, stored["lm_head.weight"])


def test_dtypes():
    model = deltafox.AutoModelForCausalLM.from_pretrained(TINY, dtype="float32")
    exact = model.get_parameter("lm_head.weight").numpy()
    assert model.dtype == "float32" and exact.dtype == np.float32
    expected = model(PROMPT).logits
    assert model.to(np.float16).get_parameter("lm_head.weight").numpy().dtype == np.float16
    half = model.bfloat16().get_parameter("lm_head.weight")
    assert half.dtype == "bfloat16" and half.bits().dtype == np.uint16
    assert np.array_equal(half.numpy(), exact)  # the checkpoint is bfloat16
    np.testing.assert_allclose(model(PROMPT).logits, expected, rtol=0, atol=0.05)
    packed = model.to(dtype="int8").get_parameter("lm_head.weight")
    with pytest.raises(deltafox.Error, match="packed"):
        packed.numpy()
    with pytest.raises(deltafox.Error, match="dtype: must be"):
        model.to(dtype="float64")


@pytest.mark.skipif(not cuda_missing(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused():
    model = deltafox.AutoModelForCausalLM.from_pretrained(TINY)
    for move in (model.cuda, lambda: model.to("cuda:0")):
        with pytest.raises(deltafox.Error, match="CUDA"):
            move()
    with pytest.raises(deltafox.Error, match="device: must be cpu or cuda, got 'tpu'"):
        model.to("tpu")
    assert model.device == "cpu" and model.cpu() is model
    assert model(PROMPT).logits.shape == (1, 8, 1024)


def test_arrays_of_other_kinds(golden_model):
    expected = golden_model(PROMPT).logits

    class Producer:
        """Speaks DLPack only."""

        array = PROMPT.copy()

        def __dlpack__(self, **kwargs):
            return self.array.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    for ids in (PROMPT.tolist(), PROMPT[0], PROMPT.astype(np.uint8), PROMPT[:, ::1], Producer()):
        logits = golden_model(ids).logits
        assert isinstance(logits, np.ndarray) and np.array_equal(logits, expected)
    assert np.array_equal(np.from_dlpack(golden_model(PROMPT).logits), expected)
    sliced = np.repeat(PROMPT, 2, axis=1)[:, ::2]
    assert np.array_equal(golden_model(sliced).logits, expected)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_torch_tensors(golden_model):
    import torch

    ids = torch.from_numpy(PROMPT)
    out = golden_model(ids, labels=ids)
    assert isinstance(out.loss, torch.Tensor) and out.loss.dtype == torch.float32
    out = golden_model(ids)
    assert np.array_equal(out.logits.numpy(), golden_model(PROMPT).logits)
    assert golden_model.generate(ids, max_new_tokens=3).dtype == torch.int64
    weight = golden_model.get_parameter("lm_head.weight")
    assert np.array_equal(torch.from_dlpack(weight).numpy(), weight.numpy())
    half = deltafox.AutoModelForCausalLM.from_pretrained(TINY, torch_dtype=torch.bfloat16)
    tensor = torch.from_dlpack(half.get_parameter("lm_head.weight"))
    assert tensor.dtype == torch.bfloat16
    assert np.array_equal(tensor.float().numpy(), half.get_parameter("lm_head.weight").numpy())


def test_outputs_by_name_and_place(golden_model):
    out = golden_model(PROMPT)
    assert out["logits"] is out.logits is out[0]
    assert out.keys() == ["logits", "past_key_values"]
    assert golden_model(PROMPT, use_cache=False, return_dict=False)[0].shape == (1, 8, 256)


def test_no_call_leaks(golden_model):
    def resident():
        pages = int(open("/proc/self/statm").read().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def calls(count):
        for _ in range(count):
            out = golden_model(PROMPT, output_hidden_states=True)
            golden_model(PROMPT, past_key_values=out.past_key_values, labels=PROMPT)
            golden_model.generate(PROMPT, max_new_tokens=1)
            np.from_dlpack(golden_model.get_parameter("lm_head.weight"))
            with pytest.raises(deltafox.Error):
                golden_model([[999]])

    calls(200)
    before = resident()
    calls(2000)
    # 10,000 calls: a leak of as little as one object of 100 bytes a call would be a megabyte.
    assert resident() - before < 1 << 20


def test_the_gil_is_released(golden_model):
    """While one thread computes, another one runs Python."""
    ids = np.tile(PROMPT, (16, 64))
    counted, done = 0, threading.Event()

    def compute():
        golden_model(ids, use_cache=False)
        done.set()

    thread = threading.Thread(target=compute)
    thread.start()
    while not done.is_set():
        counted += 1
    thread.join()
    # Were it held, this loop would get at most a turn before and a turn after the call.
    assert counted > 1000
