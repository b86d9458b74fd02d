"""Continuing prompts, with the semantics of transformers' `generate`."""

import dataclasses
import os
import queue
import secrets
import threading
from typing import Any, List, Optional

import numpy as np

from . import _core
from ._arrays import Packed, like, to_ids
from ._core import Error
from .cache import Cache, states_for

_OPTIONS = [
    name
    for name, value in vars(_core.GenerationConfig).items()
    if isinstance(value, property)
]
# Options of transformers that we have no use for, and the values that change nothing.
_NEUTRAL = {
    "use_cache": (True, False),
    "synced_gpus": (False,),
    "logits_processor": (),
    "stopping_criteria": (),
    "bad_words_ids": (),
    "num_beam_groups": (1,),
    "guidance_scale": (1, 1.0),
    "output_scores": (False,),
    "output_logits": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
}


class GenerationConfig(_core.GenerationConfig):
    """The options of generation: names, meanings and defaults are those of transformers.

    max_new_tokens (20), max_length, min_new_tokens, min_length; do_sample, temperature, top_k (50),
    top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff; repetition_penalty, no_repeat_ngram_size,
    renormalize_logits; num_beams, length_penalty, early_stopping; num_return_sequences; eos_token_id
    (an id, a list of them, or [] for none), pad_token_id, stop_strings.

    And two more: `seed`, from which every draw follows (None: another one for each call, see
    `set_seed`), and `output_logprobs`.
    """

    def __init__(self, **options):
        super().__init__()
        self.seed = None
        self.update(**options)

    @property
    def seed(self):
        return self._seed

    @seed.setter
    def seed(self, value):
        self._seed = value

    def update(self, **options):
        """Sets options; None means the default. Throws TypeError for an unknown one."""
        for name, value in options.items():
            if name not in _OPTIONS:
                raise TypeError(f"generation option '{name}' is not supported")
            if value is None:
                value = None if name == "seed" else getattr(_DEFAULTS, name)
            try:
                setattr(self, name, value)
            except TypeError as error:
                raise Error(f"{name}: {value!r} is of the wrong type") from error

    @classmethod
    def from_pretrained(cls, directory):
        """What generation_config.json of a checkpoint directory says, else the defaults."""
        return cls._of(_core.GenerationConfig.load(os.fspath(directory)))

    @classmethod
    def _of(cls, core):
        config = cls()
        for name in _OPTIONS:
            if name != "seed" or core.seed != 0:
                setattr(config, name, getattr(core, name))
        return config

    def copy(self):
        return GenerationConfig(**self.to_dict())

    __copy__ = copy

    def to_dict(self):
        return {name: getattr(self, name) for name in _OPTIONS}

    def __eq__(self, other):
        return isinstance(other, GenerationConfig) and self.to_dict() == other.to_dict()

    def __repr__(self):
        changed = [
            f"{name}={value!r}"
            for name, value in self.to_dict().items()
            if value != (None if name == "seed" else getattr(_DEFAULTS, name))
        ]
        return f"GenerationConfig({', '.join(changed)})"

    def _core(self):
        core = _core.GenerationConfig(self)
        core.seed = _seeds.next() if self.seed is None else self.seed
        return core


_DEFAULTS = _core.GenerationConfig()


class _Seeds:
    """Where the seeds of calls that name none come from."""

    def __init__(self):
        self._lock = threading.Lock()
        self._generator = None

    def set(self, seed):
        with self._lock:
            self._generator = np.random.default_rng(seed)

    def next(self):
        with self._lock:
            if self._generator is None:
                return secrets.randbits(63)
            return int(self._generator.integers(2**63))


_seeds = _Seeds()


def set_seed(seed):
    """Makes the sampling of all calls of `generate` from here on, in their order, reproducible."""
    _seeds.set(seed)


@dataclasses.dataclass
class GenerateOutput:
    """What `generate(..., return_dict_in_generate=True)` returns. S sequences, L new tokens."""

    sequences: Any  # [S, T + L], as without return_dict_in_generate
    sequences_scores: Any = None  # [S], of beam search
    logprobs: Any = None  # [S, L] with output_logprobs; NaN behind the end of a sequence
    finish_reasons: List[str] = dataclasses.field(default_factory=list)  # eos, length, stop_string
    texts: Optional[List[str]] = None  # of the new tokens, where a tokenizer was given
    past_key_values: Optional[Cache] = None  # having read all of `sequences`; not of beam search

    def __getitem__(self, name):
        return getattr(self, name)


class Generation:
    """One call of generate: its prompts, padded as they were given, and its options."""

    def __init__(
        self,
        model,
        inputs=None,
        *,
        input_ids=None,
        attention_mask=None,
        generation_config=None,
        tokenizer=None,
        past_key_values=None,
        skip_special_tokens=True,
        keep_stop_string=True,
        **options,
    ):
        self.model = model
        self.given = inputs if inputs is not None else input_ids
        if self.given is None:
            bos = model.info.bos_token_id
            if bos is None:
                raise Error("input_ids: needed, as the model names no bos_token_id to begin with")
            self.given = np.array([[bos]])
        self.ids = to_ids(self.given, "input_ids")
        self.like = like(self.given)
        for name in _NEUTRAL.keys() & options.keys():
            value = options.pop(name)
            if value is not None and value not in _NEUTRAL[name]:
                raise TypeError(f"generate: {name}={value!r} is not supported")
        config = (generation_config or model.generation_config).copy()
        config.update(**options)
        self.config = self._with_lengths(config)._core()
        self.prompts = self._prompts(attention_mask)
        self.states = self._states(past_key_values)
        if tokenizer is not None and not hasattr(tokenizer, "_core"):
            raise Error("tokenizer: must be one of deltafox.AutoTokenizer")
        self.tokenizer = tokenizer
        self.texts = {
            "tokenizer": None if tokenizer is None else tokenizer._core,
            "skip_special_tokens": skip_special_tokens,
            "keep_stop_string": keep_stop_string,
        }

    def _with_lengths(self, config):
        # transformers counts the padding of a prompt in these two; the library knows of none.
        columns = self.ids.shape[1]
        if config.max_new_tokens is None and config.max_length is not None:
            config.max_new_tokens = config.max_length - columns
            if config.max_new_tokens < 1:
                raise Error(
                    f"max_length: must be more than the length of input_ids ({columns}), got "
                    f"{config.max_length}"
                )
        config.max_length = None
        if config.min_new_tokens == 0 and config.min_length > columns:
            most = config.max_new_tokens or 20
            config.min_new_tokens = min(config.min_length - columns, most)
        config.min_length = 0
        return config

    def _prompts(self, attention_mask):
        if attention_mask is None:
            # As transformers: pad tokens are padding unless they also end sequences.
            info = self.model.info
            pad = self.config.pad_token_id
            pad = info.pad_token_id if pad is None else pad
            ends = self.config.eos_token_id
            ends = info.eos_token_ids if ends is None else ends
            if pad is not None and pad not in ends:
                attention_mask = self.ids != pad
        return Packed(self.ids, attention_mask).rows()

    def _states(self, past_key_values):
        if past_key_values is None:
            return []
        states = states_for(self.model._core, past_key_values, len(self.prompts))
        if self.config.repetition_penalty != 1 or self.config.no_repeat_ngram_size:
            raise Error("past_key_values: not with repetition_penalty or no_repeat_ngram_size")
        for b, state in enumerate(states):
            self.prompts[b] = self.prompts[b][state.position :]
            if self.prompts[b].size == 0:
                raise Error(
                    f"past_key_values: sequence {b} has been read ({state.position} tokens); "
                    "input_ids must go on behind it"
                )
        return states

    def run(self, on_token=None, return_states=False):
        """The sequences, as the library returns them."""
        prompts = [np.ascontiguousarray(prompt) for prompt in self.prompts]
        return _core.generate(
            self.model._core,
            prompts,
            self.config,
            **self.texts,
            initial_states=self.states,
            return_states=return_states,
            on_token=on_token,
        )

    def run_with(self, streamer):
        """Hands the prompt and each new token to one of transformers' streamers."""
        if len(self.prompts) != 1 or self.config.num_beams != 1 or self.config.num_return_sequences != 1:
            raise Error("streamer: is for one prompt, one sequence and one beam")

        def on_token(sequence, id, text, logprob, reason):
            streamer.put(self.like(np.array([id])))

        streamer.put(self.like(self.ids.astype(np.int64)))
        sequences = self.run(on_token)
        streamer.end()
        return sequences

    def padded(self, sequences):
        """int64 [S, T + L]: the prompts as they were given, and the new tokens."""
        new = [sequence.new_ids for sequence in sequences]
        columns = self.ids.shape[1]
        longest = max(map(len, new), default=0)
        pad = _core.pad_token_id(self.model._core, self.config)
        rows = np.full((len(new), columns + longest), pad, np.int64)
        for row, sequence, ids in zip(rows, sequences, new):
            row[:columns] = self.ids[sequence.prompt]
            row[columns : columns + len(ids)] = ids
        return self.like(rows)

    def output(self, sequences):
        scores = logprobs = cache = None
        if self.config.num_beams > 1:
            scores = self.like(np.array([s.score for s in sequences], np.float32))
        if self.config.output_logprobs:
            rows = [s.logprobs for s in sequences]
            logprobs = np.full((len(rows), max(map(len, rows), default=0)), np.nan, np.float32)
            for row, values in zip(logprobs, rows):
                row[: len(values)] = values
            logprobs = self.like(logprobs)
        if self.config.num_beams == 1:
            cache = Cache(self.model._core, [s.state for s in sequences])
        return GenerateOutput(
            sequences=self.padded(sequences),
            sequences_scores=scores,
            logprobs=logprobs,
            finish_reasons=[s.finish_reason for s in sequences],
            texts=[s.text for s in sequences] if self.tokenizer is not None else None,
            past_key_values=cache,
        )


def pieces(generation):
    """The text of one sequence in pieces, as they become certain.

    The library calls back with each piece, so it runs in a thread of its own, which ends with this
    generator: at the latest one token after it was closed or the main thread has ended.
    """
    items = queue.SimpleQueue()
    closed = threading.Event()

    def on_token(sequence, id, text, logprob, reason):
        if text:
            items.put(text)
        return not closed.is_set() and threading.main_thread().is_alive()

    def work():
        try:
            generation.run(on_token)
        except BaseException as error:  # is raised where the pieces are read
            items.put(error)
        else:
            items.put(None)

    thread = threading.Thread(target=work, name="deltafox-stream")
    thread.start()
    try:
        while (item := items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()
