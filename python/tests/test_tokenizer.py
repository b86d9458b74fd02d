"""Tokenizers: the golden texts, padding and truncation, parity with transformers."""

import importlib.util
import json
import shutil

import numpy as np
import pytest

import deltafox
from conftest import GOLDEN, ROOT

VOCABULARY = ROOT / "tests" / "data" / "gpt2"
RECORDS = [json.loads(line) for line in (GOLDEN / "tokenizer.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module", params=["GPT2Tokenizer", "JSONGPT2Tokenizer"])
def gpt2(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(VOCABULARY / name, directory)
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": request.param}))
    return deltafox.AutoTokenizer.from_pretrained(directory)


def test_ids_are_the_golden_ones(gpt2):
    key = "json_gpt2_ids" if gpt2._core.escapes_json else "gpt2_ids"
    for record in RECORDS:
        if key in record:
            assert gpt2.encode(record["text"]) == record[key]


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
def test_parity_with_transformers(gpt2):
    if gpt2._core.escapes_json:
        pytest.skip("transformers has no JSON-escaping tokenizer")
    from transformers import GPT2Tokenizer

    for options in ({}, {"padding_side": "left", "truncation_side": "left"}):
        theirs = GPT2Tokenizer.from_pretrained(gpt2.name_or_path, pad_token="<|endoftext|>", **options)
        ours = deltafox.AutoTokenizer.from_pretrained(
            gpt2.name_or_path, pad_token="<|endoftext|>", **options
        )
        texts = [record["text"] for record in RECORDS]
        for text in texts:
            assert ours(text) == dict(theirs(text))
            ids = ours.encode(text)
            assert ours.decode(ids) == theirs.decode(ids)
            assert ours.tokenize(text) == theirs.tokenize(text)
        for call in ({}, {"truncation": True, "max_length": 5}, {"pad_to_multiple_of": 8}):
            one = ours(texts[:8], padding=True, return_tensors="np", **call)
            other = theirs(texts[:8], padding=True, return_tensors="np", **call)
            for key in ("input_ids", "attention_mask"):
                assert np.array_equal(one[key], other[key])
        assert ours.get_vocab() == theirs.get_vocab()
        for name in ("bos_token", "eos_token_id", "pad_token_id", "vocab_size", "all_special_ids"):
            assert getattr(ours, name) == getattr(theirs, name)


def test_bos_is_added_where_asked(tokenizer):
    ids = tokenizer("Hello").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer("Hello", add_special_tokens=False).input_ids == ids[1:]
    tokenizer.add_bos_token = False
    assert tokenizer("Hello").input_ids == ids[1:]
    tokenizer.add_bos_token = True


def test_padding_and_truncation(tokenizer):
    texts = ["Hello", "Hello, a longer text"]
    tokenizer.pad_token = None
    with pytest.raises(deltafox.Error, match="no pad token"):
        tokenizer(texts, padding=True)
    with pytest.raises(deltafox.Error, match="different lengths"):
        tokenizer(texts, return_tensors="np")
    tokenizer.pad_token = tokenizer.eos_token
    right = tokenizer(texts, padding=True, return_tensors="np")
    left = tokenizer(texts, padding=True, padding_side="left", return_tensors="np")
    assert right.input_ids.dtype == np.int64
    for row in range(2):
        ids = tokenizer(texts[row]).input_ids
        assert right.input_ids[row, : len(ids)].tolist() == ids
        assert left.input_ids[row, left.input_ids.shape[1] - len(ids) :].tolist() == ids
        assert right.attention_mask[row].sum() == left.attention_mask[row].sum() == len(ids)
    tokenizer.truncation_side = "left"
    cut = tokenizer(texts[1], truncation=True, max_length=4).input_ids
    whole = tokenizer(texts[1]).input_ids
    assert cut == whole[:1] + whole[-3:]
    tokenizer.truncation_side = "right"
    assert tokenizer(texts[1], truncation=True, max_length=4).input_ids == whole[:4]


def test_decoding_batches(tokenizer):
    ids = tokenizer(["one", "two"]).input_ids
    texts = ["one", "two"]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == texts
    assert tokenizer.decode(ids, skip_special_tokens=True) == texts
    assert tokenizer.decode(np.array(ids[0]), skip_special_tokens=True) == "one"
    assert tokenizer.decode(ids[0][1]) + tokenizer.decode(ids[0][2:]) == "one"
    with pytest.raises(deltafox.Error, match="id 99999"):
        tokenizer.decode([99999])
