"""A model for EleutherAI's lm_eval (https://github.com/EleutherAI/lm-evaluation-harness).

    python -m deltafox.lm_eval run --model deltafox --model_args pretrained=DIR --tasks TASK

is the program `lm_eval` with the model `deltafox` added; `import deltafox.lm_eval` adds it to a
process that calls lm_eval.simple_evaluate. Arguments of the model:

    pretrained      checkpoint directory or hub id
    add_bos_token   whether texts begin with BOS; default: as the tokenizer's directory says
    max_length      tokens a prediction may depend on (2048, as lm_eval's model `hf`)
    max_gen_toks    most new tokens where a task does not say (256)
    dtype, device, threads, revision    as for from_pretrained

Requests are read sorted by length, batch_size at a time and without padding. Requests with the same
context share the reading of it, as the choices of a question do.
"""

import logging
import math

import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from ._core import Error
from .generation import Generation
from .model import AutoModelForCausalLM
from .tokenizer import AutoTokenizer

_DEFAULT_BATCH_SIZE = 32
_DEFAULT_DEVICE = "cuda:0"  # what lm_eval says where its user says nothing
_log = logging.getLogger(__name__)


@register_model("deltafox")
class DeltafoxLM(TemplateLM):
    def __init__(
        self,
        pretrained,
        *,
        add_bos_token=None,
        max_length=None,
        max_gen_toks=256,
        batch_size=None,
        max_batch_size=None,
        dtype=None,
        device=None,
        threads=0,
        revision="main",
    ):
        super().__init__()
        options = {"dtype": dtype, "threads": int(threads), "revision": revision}
        try:
            self.model = AutoModelForCausalLM.from_pretrained(pretrained, device=device, **options)
        except Error as error:
            if device != _DEFAULT_DEVICE:
                raise
            _log.info("computing on the CPU: %s", error)
            self.model = AutoModelForCausalLM.from_pretrained(pretrained, **options)
        self.tokenizer = AutoTokenizer.from_pretrained(
            pretrained, revision=revision, add_bos_token=add_bos_token
        )
        limit = max_length or self.model.config.get("max_position_embeddings") or 2048
        self.max_length = int(limit)
        self.max_gen_toks = int(max_gen_toks)
        automatic = batch_size is None or str(batch_size).startswith("auto")
        self.batch_size = int(max_batch_size or _DEFAULT_BATCH_SIZE) if automatic else int(batch_size)

    @property
    def eot_token_id(self):
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self):
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self):
        return self.tokenizer.name_or_path.replace("/", "__")

    def get_model_info(self):
        info = self.model.info
        return {
            "model_num_parameters": info.num_parameters,
            "model_dtype": self.model.dtype,
            "model_revision": "",
            "model_sha": "",
        }

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        special = True if add_special_tokens is None else add_special_tokens
        return self.tokenizer.encode(string, add_special_tokens=special)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        """(log-probability, whether greedy) of the continuation of each (_, context, continuation)."""
        cut = [self._cut(context, continuation) for _, context, continuation in requests]
        # The longest first: if memory is short, it is at once. Same contexts are neighbours.
        order = sorted(range(len(cut)), key=lambda i: (-len(cut[i][0]), cut[i]))
        results = [None] * len(cut)
        with tqdm(total=len(cut), desc="loglikelihood", disable=disable_tqdm) as bar:
            for batch in _batches(order, self.batch_size):
                for i, result in zip(batch, self._score([cut[i] for i in batch])):
                    results[i] = result
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
                bar.update(len(batch))
        return results

    def _cut(self, context, continuation):
        """The two without what is too long ago for max_length."""
        continuation = continuation[-self.max_length :]
        room = self.max_length + 1 - len(continuation)
        return context[-room:], continuation

    def _score(self, requests):
        core, vocab = self.model._core, self.model.info.vocab_size
        contexts = {}  # context: its place
        for context, _ in requests:
            contexts.setdefault(tuple(context), len(contexts))
        states = [core.new_state() for _ in contexts]
        first = np.empty((len(contexts), vocab), np.float32)  # logits after the contexts
        ids, cu = _packed(contexts)
        core.forward(ids, cu, states, first)

        scores = [_Score() for _ in requests]
        forks, rest = [], []
        for score, (context, continuation) in zip(scores, requests):
            place = contexts[tuple(context)]
            if not continuation:
                raise Error("lm_eval: a continuation has no tokens")
            score.add(first[place], continuation[0])
            if len(continuation) > 1:
                forks.append(states[place].copy())
                rest.append((score, continuation))
        if rest:
            ids, cu = _packed([continuation[:-1] for _, continuation in rest])
            logits = np.empty((len(ids), vocab), np.float32)
            core.logits(ids, cu, forks, np.arange(len(ids), dtype=np.int64), logits, [])
            for (score, continuation), begin in zip(rest, cu):
                for t, id in enumerate(continuation[1:]):
                    score.add(logits[begin + t], id)
        return [(score.log_probability, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """The log-probability of whole texts, from windows of max_length tokens."""
        windows = []  # (request, input ids, predicted ids)
        for r, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for seen, predicted in utils.get_rolling_token_windows(
                ids, self.prefix_token_id, self.max_length, context_len=1
            ):
                windows.append((r, seen, predicted))
        totals = [0.0] * len(requests)
        order = sorted(range(len(windows)), key=lambda i: -len(windows[i][1]))
        with tqdm(total=len(windows), desc="loglikelihood_rolling", disable=disable_tqdm) as bar:
            for batch in _batches(order, self.batch_size):
                for i, loss in zip(batch, self._losses([windows[i][1:] for i in batch])):
                    totals[windows[i][0]] -= loss
                bar.update(len(batch))
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _losses(self, windows):
        core = self.model._core
        ids, cu = _packed([seen for seen, _ in windows])
        labels = np.full(len(ids), -100, np.int32)
        for (_, predicted), end in zip(windows, cu[1:]):
            labels[end - len(predicted) : end] = predicted
        losses = np.empty(len(ids), np.float32)
        core.loss(ids, cu, labels, [core.new_state() for _ in windows], losses)
        return [float(losses[a:b].sum(dtype=np.float64)) for a, b in zip(cu[:-1], cu[1:])]

    def generate_until(self, requests, disable_tqdm=False):
        """The texts that continue each (context, options), up to the first stop string."""
        groups = {}  # requests with the same options
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        results = [None] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for group in groups.values():
                options = dict(requests[group[0]].args[1])
                ids = {i: self.tok_encode(requests[i].args[0]) for i in group}
                for batch in _batches(sorted(group, key=lambda i: -len(ids[i])), self.batch_size):
                    for i, text in zip(batch, self._continue([ids[i] for i in batch], options)):
                        results[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(batch))
        return results

    def _continue(self, prompts, options):
        options = dict(options)
        until = options.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        most = self.max_gen_toks
        for name in ("max_completion_tokens", "max_tokens", "max_new_tokens", "max_gen_toks"):
            most = int(options.pop(name, None) or most)
        temperature = options.pop("temperature", None)
        if options.setdefault("do_sample", bool(temperature)):
            options["temperature"] = temperature or 1.0
        room = max(1, self.max_length - most)
        ids, mask = _padded([prompt[-room:] or [self.prefix_token_id] for prompt in prompts])
        generation = Generation(
            self.model,
            ids,
            attention_mask=mask,
            tokenizer=self.tokenizer,
            max_new_tokens=most,
            stop_strings=[text for text in until if text],
            keep_stop_string=False,
            **options,
        )
        return [sequence.text for sequence in generation.run()]


class _Score:
    def __init__(self):
        self.log_probability, self.greedy = 0.0, True

    def add(self, logits, id):
        highest = logits.max()
        total = np.exp(logits - highest).sum(dtype=np.float64)
        self.log_probability += float(logits[id]) - float(highest) - math.log(total)
        self.greedy = self.greedy and bool(logits.argmax() == id)


def _packed(rows):
    lengths = [len(row) for row in rows]
    ids = np.fromiter((id for row in rows for id in row), np.int32, sum(lengths))
    return ids, np.cumsum([0, *lengths]).astype(np.int64)


def _padded(rows):
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    mask = np.zeros(ids.shape, bool)
    for padded, ones, row in zip(ids, mask, rows):
        padded[: len(row)] = row
        ones[: len(row)] = True
    return ids, mask


def _batches(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
