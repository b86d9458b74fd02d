"""Gradients, and the training loop."""

import struct

import numpy as np
import pytest

import deltafox
from conftest import GOLDEN, cuda_missing, read_safetensors

TOLERANCE = 2e-5  # that of the C++ golden tests of gradients


def test_gradients_are_the_golden_ones(golden_model, golden):
    loss, gradients = golden_model.loss_and_grad(golden["input_ids"], golden["labels"])
    np.testing.assert_allclose(loss, golden["loss"], rtol=0, atol=1e-5)
    expected = {n.removeprefix("grad."): g for n, g in golden.items() if n.startswith("grad.")}
    assert gradients.keys() == expected.keys() == dict(golden_model.named_parameters()).keys()
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected[name], rtol=0, atol=TOLERANCE)
    _, again = golden_model.loss_and_grad(golden["input_ids"], golden["labels"], recompute=True)
    assert all(np.array_equal(again[name], gradients[name]) for name in gradients)


def test_padding_has_no_gradient(golden_model):
    ids, labels = np.array([[1, 2, 3, 4]]), np.array([[2, 3, 4, 5]])
    loss, gradients = golden_model.loss_and_grad(ids, labels)
    padded = np.pad(ids, ((0, 0), (2, 0)), constant_values=9)
    mask = np.array([[0, 0, 1, 1, 1, 1]])
    again, same = golden_model.loss_and_grad(
        padded, np.pad(labels, ((0, 0), (2, 0)), constant_values=7), attention_mask=mask
    )
    assert np.array_equal(again[:, 2:], loss) and not again[:, :2].any()
    assert all(np.array_equal(same[name], gradients[name]) for name in gradients)


def test_gradients_need_float32_weights():
    model = deltafox.AutoModelForCausalLM.from_pretrained(GOLDEN / "delta_net-tiny", dtype="bfloat16")
    with pytest.raises(deltafox.Error, match="float32"):
        model.loss_and_grad([[1, 2]], [[2, 3]])


def write_tokens(path, ids):
    header = b"DFTOKENS" + struct.pack("<IIQIIQ", 1, 2, ids.size, 64, 63, 1)
    path.write_bytes(header.ljust(64, b"\0") + ids.astype("<u2").tobytes())


@pytest.fixture
def config(tmp_path):
    """Eight steps of a small DeltaNet on a text that repeats itself."""
    data = tmp_path / "data"
    data.mkdir()
    write_tokens(data / "train.tokens", np.arange(4096) % 7)
    write_tokens(data / "heldout.tokens", np.arange(512) % 7)
    return {
        "output_dir": str(tmp_path / "run"),
        "data_dir": str(data),
        "log_interval": 128,
        "checkpoint_interval": 128,
        "skip_eval": True,
        "fabric": {"precision": "32-true"},
        "train": {"max_tokens": 1024, "grad_acc_tokens": 128, "max_grad_norm": 1.0},
        "optimizer": {"lr": 0.01, "betas": [0.9, 0.95], "weight_decay": 0.1},
        "schedule": {
            "name": "warmup_cosine",
            "init_value": 0.0,
            "peak_value": 0.01,
            "warmup_steps": 128,
            "decay_steps": 1024,
            "end_value": 0.0,
        },
        "datamodule": {"name": "tokens", "train_batch_len": 64, "train_batch_size": 2},
        "model": {
            "name": "delta_net",
            "config": {"hidden_size": 32, "num_hidden_layers": 1, "num_heads": 1},
        },
    }


def test_training_learns_and_leaves_a_model(config):
    losses = []
    result = deltafox.train(config, on_step=lambda report: losses.append(report["loss"]))
    assert result.finished and result.tokens == 1024 and len(losses) == 8
    assert losses[-1] < losses[0] - 0.5 and result.loss == losses[-1]
    model = deltafox.AutoModelForCausalLM.from_pretrained(result.model)
    assert model.info.vocab_size == 64


@pytest.mark.skipif(bool(cuda_missing()), reason=cuda_missing())
def test_a_gpu_gives_the_golden_gradients_and_learns(golden, config):
    model = deltafox.AutoModelForCausalLM.from_pretrained(
        GOLDEN / "delta_net-tiny", device="cuda", dtype="float32"
    )
    _, gradients = model.loss_and_grad(golden["input_ids"], golden["labels"])
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, golden["grad." + name], rtol=0, atol=TOLERANCE)
    losses = []
    deltafox.train(config, device="cuda", on_step=lambda report: losses.append(report["loss"]))
    assert losses[-1] < losses[0] - 0.5


def test_a_stopped_training_goes_on(config):
    losses = []

    def three_steps(report):
        losses.append(report["loss"])
        return report["tokens"] < 3 * 128

    assert deltafox.train(config, on_step=three_steps).tokens == 3 * 128

    class Mine(Exception):
        pass

    def raise_in_the_fifth(report):
        losses.append(report["loss"])
        if report["tokens"] == 5 * 128:
            raise Mine

    with pytest.raises(Mine):
        deltafox.train(config, on_step=raise_in_the_fifth)
    result = deltafox.train(config, on_step=lambda report: losses.append(report["loss"]))
    assert result.finished and len(losses) == 8
    whole = []
    elsewhere = {"output_dir": config["output_dir"] + "2"}
    deltafox.train(config, elsewhere, on_step=lambda report: whole.append(report["loss"]))
    assert whole == losses  # to the bit


def test_a_bad_configuration_is_named(config):
    with pytest.raises(deltafox.Error, match="lrr"):
        deltafox.train(config, {"optimizer.lrr": 1})
