"""generate and stream: Hugging Face's results, shapes and options; threads."""

import json
import threading

import numpy as np
import pytest

import deltafox
from conftest import GOLDEN

EXPECTED = {
    (path.parent.name, name): case
    for path in sorted(GOLDEN.glob("*/generate.json"))
    for name, case in json.loads(path.read_text()).items()
}


@pytest.mark.parametrize("case", EXPECTED, ids="-".join)
def test_as_transformers(case):
    model = deltafox.AutoModelForCausalLM.from_pretrained(GOLDEN / case[0])
    expected = EXPECTED[case]
    options = dict(expected["options"])
    options.setdefault("pad_token_id", 0)  # what the cases are filled up with
    prompt = np.array(expected["prompt"])
    mask = np.ones_like(prompt)
    got = model.generate(prompt, attention_mask=mask, **options)
    assert got.tolist() == expected["sequences"]


def test_greedy_as_golden(golden_model, golden):
    prompt = golden["greedy.prompt"].reshape(1, -1)
    ids = golden["greedy.ids"].reshape(-1)
    got = golden_model.generate(prompt, max_new_tokens=ids.size - prompt.size, eos_token_id=[])
    assert got[0].tolist() == ids.tolist()


def test_padding_stays_where_it_was(golden_model):
    alone = golden_model.generate([[5, 6, 7]], max_new_tokens=4, eos_token_id=[])
    ids, mask = np.array([[9, 9, 5, 6, 7], [5, 6, 7, 9, 9]]), [[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]
    got = golden_model.generate(ids, attention_mask=mask, max_new_tokens=4, eos_token_id=[])
    assert np.array_equal(got[:, :5], ids)
    assert np.array_equal(got[0, 5:], alone[0, 3:]) and np.array_equal(got[1, 5:], alone[0, 3:])
    # Without a mask, pad tokens are padding, as in transformers.
    inferred = golden_model.generate(ids, max_new_tokens=4, eos_token_id=[], pad_token_id=9)
    assert np.array_equal(inferred, got)


def test_rows_that_end_early_are_filled_up(golden_model):
    prompt = np.array([[1, 2, 3], [4, 5, 6]])
    free = golden_model.generate(prompt, max_new_tokens=8, eos_token_id=[])
    end = int(free[0, 4])
    assert end not in free[1, 3:]
    got = golden_model.generate(prompt, max_new_tokens=8, eos_token_id=end, pad_token_id=0)
    length = free[0, 3:].tolist().index(end) + 1
    assert got[0, 3:].tolist() == free[0, 3 : 3 + length].tolist() + [0] * (8 - length)
    assert np.array_equal(got[1], free[1])


def test_lengths_count_the_padding(golden_model):
    ids, mask = np.array([[9, 9, 5]]), np.array([[0, 0, 1]])
    assert golden_model.generate(ids, attention_mask=mask, max_length=5, eos_token_id=[]).shape == (1, 5)
    assert golden_model.generate(ids, attention_mask=mask, eos_token_id=[]).shape == (1, 3 + 20)
    with pytest.raises(deltafox.Error, match="max_length: must be more than"):
        golden_model.generate(ids, max_length=3)


def test_a_seed_decides_every_draw(golden_model):
    def draw(**options):
        return golden_model.generate([[1, 2]], do_sample=True, max_new_tokens=12, **options).tolist()

    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert draw() != draw()
    deltafox.set_seed(5)
    first = [draw(), draw()]
    deltafox.set_seed(5)
    assert [draw(), draw()] == first and first[0] != first[1]


def test_the_dictionary(golden_model):
    prompt = np.array([[1, 2], [3, 4]])
    out = golden_model.generate(
        prompt,
        max_new_tokens=5,
        eos_token_id=[],
        output_logprobs=True,
        return_dict_in_generate=True,
    )
    logits = golden_model(out.sequences).logits.astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.take_along_axis(logprobs[:, 1:-1], out.sequences[:, 2:, None], -1)[..., 0]
    np.testing.assert_allclose(out.logprobs, expected, rtol=0, atol=1e-4)
    assert out.finish_reasons == ["length"] * 2 and out.past_key_values.positions == [7, 7]
    beams = golden_model.generate(prompt, num_beams=3, return_dict_in_generate=True)
    assert beams.sequences_scores.shape == (2,) and beams.past_key_values is None


def test_a_cache_spares_the_reading(golden_model):
    prompt = np.array([[1, 2, 3, 4, 5, 6]])
    cache = golden_model(prompt[:, :4]).past_key_values
    expected = golden_model.generate(prompt, max_new_tokens=6)
    assert np.array_equal(
        golden_model.generate(prompt, past_key_values=cache, max_new_tokens=6), expected
    )
    assert cache.positions == [4]
    with pytest.raises(deltafox.Error, match="must go on behind it"):
        golden_model.generate(prompt[:, :4], past_key_values=cache)


@pytest.mark.parametrize(
    "error, options",
    [
        (TypeError, {"no_such_option": 1}),
        (TypeError, {"output_scores": True}),
        (deltafox.Error, {"temperature": -1.0, "do_sample": True}),
        (deltafox.Error, {"top_k": "many"}),
        (deltafox.Error, {"early_stopping": "soon"}),
        (deltafox.Error, {"stop_strings": "end"}),
    ],
)
def test_bad_options_are_refused(golden_model, error, options):
    with pytest.raises(error, match=f"{next(iter(options))}|stop"):
        golden_model.generate([[1]], **options)


def test_stop_strings_and_texts(tiny, tokenizer):
    ids = tokenizer("Once upon a time", return_tensors="np").input_ids
    free = tiny.generate(
        ids, max_new_tokens=20, tokenizer=tokenizer, return_dict_in_generate=True
    ).texts[0]
    stop = free[len(free) // 2 :][:3]
    out = tiny.generate(
        ids, max_new_tokens=20, tokenizer=tokenizer, stop_strings=stop, return_dict_in_generate=True
    )
    assert out.finish_reasons == ["stop_string"] and stop in out.texts[0]
    assert free.startswith(out.texts[0])


def test_a_stream_is_the_text(tiny, tokenizer):
    ids = tokenizer("Once upon a time", return_tensors="np").input_ids
    text = tiny.generate(
        ids, max_new_tokens=40, tokenizer=tokenizer, return_dict_in_generate=True
    ).texts[0]
    pieces = list(tiny.stream("Once upon a time", max_new_tokens=40))
    assert "".join(pieces) == text and len(pieces) > 10


def test_leaving_a_stream_ends_its_thread(tiny):
    before = threading.active_count()
    for _ in tiny.stream("Once upon a time", max_new_tokens=1_000_000, eos_token_id=[]):
        break
    assert threading.active_count() == before


def test_errors_come_out_of_a_stream(tiny):
    with pytest.raises(deltafox.Error, match="temperature"):
        list(tiny.stream("Once", do_sample=True, temperature=-1.0))
    with pytest.raises(deltafox.Error, match="one prompt"):
        tiny.stream("Once", num_beams=2)


def test_streamers_get_the_prompt_and_each_token(golden_model):
    class Streamer:
        got, ended = [], 0

        def put(self, value):
            self.got.extend(np.ravel(value).tolist())

        def end(self):
            self.ended += 1

    streamer = Streamer()
    ids = golden_model.generate([[1, 2, 3]], max_new_tokens=6, streamer=streamer)
    assert streamer.got == ids[0].tolist() and streamer.ended == 1


def test_an_exception_in_a_streamer_comes_through(golden_model):
    class Streamer:
        def put(self, value):
            if np.ndim(value) == 1:
                raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        golden_model.generate([[1, 2]], streamer=Streamer())


def test_eight_threads_generate_what_one_does(golden_model):
    prompts = [np.array([[n, n + 1, n + 2]]) for n in range(8)]
    expected = [golden_model.generate(p, max_new_tokens=20, eos_token_id=[]) for p in prompts]
    failures = []

    def work(n):
        for _ in range(25):
            got = golden_model.generate(prompts[n], max_new_tokens=20, eos_token_id=[])
            if not np.array_equal(got, expected[n]):
                failures.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_configurations():
    config = deltafox.GenerationConfig(max_new_tokens=3, eos_token_id=7, early_stopping="never")
    assert config.eos_token_id == [7] and config.early_stopping == "never"
    assert config.copy() == config and eval(repr(config), vars(deltafox)) == config
    config.update(max_new_tokens=None)
    assert config.max_new_tokens is None
    with pytest.raises(TypeError, match="no_such"):
        deltafox.GenerationConfig(no_such=1)
