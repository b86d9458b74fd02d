"""Text to token ids and back, with the interface of transformers' tokenizers."""

import json
import os

import numpy as np

from . import _core
from ._arrays import to_numpy, torch_module
from ._core import Error
from .hub import directory_of

# Arguments of transformers' from_pretrained that have no meaning here. Of them,
# clean_up_tokenization_spaces does nothing to byte-level BPE in transformers either.
_IGNORED = {"trust_remote_code", "use_fast", "clean_up_tokenization_spaces", "legacy"}


class BatchEncoding(dict):
    """`input_ids` and `attention_mask`, by key or as attributes."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device, **kwargs):
        """Sends torch tensors to a device; what else there is stays."""
        return BatchEncoding(
            {k: v.to(device, **kwargs) if hasattr(v, "to") else v for k, v in self.items()}
        )


class AutoTokenizer:
    """Loads tokenizers: `AutoTokenizer.from_pretrained(...)`."""

    @staticmethod
    def from_pretrained(path_or_id, *, revision="main", local_files_only=False, **options):
        """The Tokenizer of a checkpoint directory or hub id.

        Options override what the directory says: add_bos_token, pad_token, padding_side ("left" or
        "right"), truncation_side, model_max_length.
        """
        for name in _IGNORED & options.keys():
            options.pop(name)
        return Tokenizer(directory_of(str(path_or_id), revision, local_files_only), **options)


class Tokenizer:
    """GPT-2's byte-level BPE, plain or over JSON-escaped text, as the directory says."""

    def __init__(
        self,
        directory,
        *,
        add_bos_token=None,
        pad_token=None,
        padding_side=None,
        truncation_side=None,
        model_max_length=None,
    ):
        self.name_or_path = directory
        self._core = _core.Tokenizer(directory)
        if add_bos_token is not None:
            self._core.add_bos_token = add_bos_token
        said = _read_json(directory, "tokenizer_config.json")
        self.padding_side = padding_side or said.get("padding_side") or "right"
        self.truncation_side = truncation_side or said.get("truncation_side") or "right"
        self.model_max_length = model_max_length or said.get("model_max_length")
        self._vocab = self._tokens = None
        self.pad_token_id = None
        for source in (said, _read_json(directory, "special_tokens_map.json")):
            pad_token = pad_token or _content(source.get("pad_token"))
        if pad_token:
            self.pad_token = pad_token

    @property
    def add_bos_token(self):
        return self._core.add_bos_token

    @add_bos_token.setter
    def add_bos_token(self, value):
        self._core.add_bos_token = value

    @property
    def vocab_size(self):
        """One more than the highest id."""
        return self._core.vocab_size

    def __len__(self):
        return self.vocab_size

    @property
    def bos_token_id(self):
        return self._core.bos_token_id

    @property
    def eos_token_id(self):
        return self._core.eos_token_id

    @property
    def bos_token(self):
        return self._token(self.bos_token_id)

    @property
    def eos_token(self):
        return self._token(self.eos_token_id)

    @property
    def pad_token(self):
        return self._token(self.pad_token_id)

    @pad_token.setter
    def pad_token(self, token):
        self.pad_token_id = None if token is None else self.convert_tokens_to_ids(token)
        if token is not None and self.pad_token_id is None:
            raise Error(f"pad_token: the vocabulary has no '{token}'")

    @property
    def all_special_ids(self):
        return [i for i in range(self.vocab_size) if self._core.is_special(i)]

    @property
    def all_special_tokens(self):
        return [self._token(i) for i in self.all_special_ids]

    def __call__(
        self,
        text,
        *,
        add_special_tokens=True,
        padding=False,
        truncation=False,
        max_length=None,
        pad_to_multiple_of=None,
        padding_side=None,
        return_tensors=None,
        return_attention_mask=True,
    ):
        """input_ids and attention_mask of a text, or of a list of texts.

        return_tensors: "np" or "pt" for int64 arrays [B, T] ("pt": torch's, or ours that stand in
        where torch is not installed), None for lists. padding: True fills up to the longest text,
        "max_length" to max_length. truncation: True cuts to max_length.
        """
        texts = [text] if isinstance(text, str) else list(text)
        rows = [self._encode(t, add_special_tokens, truncation, max_length) for t in texts]
        masks = [[1] * len(row) for row in rows]
        length = self._padded_length(rows, padding, max_length, pad_to_multiple_of)
        if length is not None:
            rows = [self._pad(row, length, self.pad_token_id, padding_side) for row in rows]
            masks = [self._pad(mask, length, 0, padding_side) for mask in masks]
        encoding = {"input_ids": rows}
        if return_attention_mask:
            encoding["attention_mask"] = masks
        if return_tensors is not None:
            encoding = {k: _tensor(v, return_tensors) for k, v in encoding.items()}
        elif isinstance(text, str):
            encoding = {k: v[0] for k, v in encoding.items()}
        return BatchEncoding(encoding)

    def encode(self, text, *, add_special_tokens=True, **options):
        """The ids of one text, as a list; with return_tensors an array [1, T]."""
        return self(text, add_special_tokens=add_special_tokens, **options).input_ids

    def decode(self, token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=None):
        """The text of ids [T] (an int, a list or an array); of ids [B, T] a list of texts."""
        if isinstance(token_ids, (list, tuple)) and any(np.ndim(row) for row in token_ids):
            return self.batch_decode(token_ids, skip_special_tokens)
        ids = to_numpy(token_ids)
        if ids.ndim == 2:
            return self.batch_decode(ids, skip_special_tokens)
        return self._core.decode(np.atleast_1d(ids).tolist(), skip_special_tokens)

    def batch_decode(self, sequences, skip_special_tokens=False, clean_up_tokenization_spaces=None):
        """The texts of several sequences of ids."""
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def tokenize(self, text):
        """The vocabulary's names of a text's tokens, without special ones."""
        return self.convert_ids_to_tokens(self._core.encode(text, False))

    def get_vocab(self):
        """Names to ids."""
        if self._vocab is None:
            self._vocab = _read_vocabulary(self.name_or_path)
        return dict(self._vocab)

    def convert_tokens_to_ids(self, tokens):
        if self._vocab is None:
            self.get_vocab()
        if isinstance(tokens, str):
            return self._vocab.get(tokens)
        return [self._vocab.get(token) for token in tokens]

    def convert_ids_to_tokens(self, ids):
        if isinstance(ids, int):
            return self._token(ids)
        return [self._token(i) for i in to_numpy(ids).tolist()]

    def _token(self, id):
        if id is None:
            return None
        if self._tokens is None:
            self._tokens = {i: token for token, i in self.get_vocab().items()}
        return self._tokens.get(id)

    def _encode(self, text, add_special_tokens, truncation, max_length):
        ids = self._core.encode(text, add_special_tokens)
        limit = max_length if max_length is not None else self.model_max_length
        if not truncation or limit is None or len(ids) <= limit:
            return ids
        if self.truncation_side == "right":
            return ids[:limit]
        first = ids[:1] if add_special_tokens and self.add_bos_token else []
        return first + ids[len(ids) - limit + len(first) :]

    def _padded_length(self, rows, padding, max_length, multiple):
        if not padding:
            return None
        if self.pad_token_id is None:
            raise Error("padding: the tokenizer has no pad token; set tokenizer.pad_token first")
        if padding == "max_length":
            length = max_length if max_length is not None else self.model_max_length
            if length is None:
                raise Error('padding: "max_length" needs max_length')
        elif padding in (True, "longest"):
            length = max(map(len, rows), default=0)
        else:
            raise Error(f'padding: must be True, False, "longest" or "max_length", got {padding!r}')
        return -(-length // multiple) * multiple if multiple else length

    def _pad(self, row, length, value, side):
        filling = [value] * (length - len(row))
        return filling + row if (side or self.padding_side) == "left" else row + filling

    def __repr__(self):
        kind = "JSON-escaped text" if self._core.escapes_json else "text"
        return f"Tokenizer({self.name_or_path!r}, {self.vocab_size} ids, {kind})"


def _tensor(rows, kind):
    try:
        array = np.array(rows, np.int64)
    except ValueError:
        raise Error("return_tensors: the texts have different lengths; use padding=True") from None
    if kind == "np":
        return array
    if kind == "pt":
        torch = torch_module()
        return torch.from_numpy(array) if hasattr(torch, "from_numpy") else torch.Tensor(array)
    raise Error(f'return_tensors: must be "np" or "pt", got {kind!r}')


def _read_json(directory, name):
    path = os.path.join(directory, name)
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _content(token):
    return token.get("content") if isinstance(token, dict) else token


def _read_vocabulary(directory):
    vocabulary = _read_json(directory, "vocab.json")
    if not vocabulary:
        whole = _read_json(directory, "tokenizer.json")
        vocabulary = dict(whole.get("model", {}).get("vocab", {}))
        vocabulary.update((t["content"], t["id"]) for t in whole.get("added_tokens", []))
    added = _read_json(directory, "tokenizer_config.json").get("added_tokens_decoder", {})
    vocabulary.update((token["content"], int(id)) for id, token in added.items())
    return vocabulary
