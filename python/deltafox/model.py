"""Models: logits, losses, hidden states, generation, weights."""

import collections
import dataclasses
import json
import types
from typing import Any, Optional, Tuple

import numpy as np

from . import _core
from ._arrays import Packed, like, to_ids
from ._core import Error
from .cache import Cache, states_for
from .generation import Generation, GenerationConfig, pieces
from .hub import directory_of
from .parameter import Parameter, parameter_named
from .tokenizer import AutoTokenizer

# Arguments of transformers' from_pretrained that have no meaning here.
_IGNORED = {
    "trust_remote_code",
    "low_cpu_mem_usage",
    "use_safetensors",
    "attn_implementation",
    "use_cache",
    "weights_only",
}
_DTYPES = {
    "float32": "F32",
    "float": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "half": "F16",
    "int8": "Q8",
    "int4": "Q4",
}


@dataclasses.dataclass
class CausalLMOutput:
    """What a model call returns. Fields by name, as `output["logits"]`, or by place, without None.

    loss [B, T]: float32, of each token by itself; 0 at padding and where the label is negative.
    logits [B, T, N]: float32, 0 at padding; None where labels were given.
    past_key_values: a Cache.
    hidden_states: C-wide float32 [B, T, C] each: the embedding, the output of every layer but the
    last, and the final norm.
    """

    loss: Any = None
    logits: Any = None
    past_key_values: Optional[Cache] = None
    hidden_states: Optional[Tuple[Any, ...]] = None

    def to_tuple(self):
        return tuple(v for v in vars(self).values() if v is not None)

    def keys(self):
        return [name for name, value in vars(self).items() if value is not None]

    def __getitem__(self, key):
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self):
        return iter(self.keys())


class AutoModelForCausalLM:
    """Loads checkpoints: `AutoModelForCausalLM.from_pretrained(...)`."""

    @staticmethod
    def from_pretrained(
        path_or_id,
        *,
        dtype=None,
        torch_dtype=None,
        device=None,
        device_map=None,
        threads=0,
        revision="main",
        local_files_only=False,
        **ignored,
    ):
        """A CausalLM of a checkpoint directory, or of a hub id, downloaded where the cache lacks it.

        dtype: how the weight matrices are kept: as stored (None or "auto"), float32, bfloat16,
        float16, int8 or int4, as a name or as torch's or NumPy's. device: "cpu". threads: 0 means one for each
        core. What the cache holds is used as it is; `deltafox.pull` asks the hub for news.
        """
        if ignored.keys() - _IGNORED:
            raise TypeError(f"from_pretrained: unknown option '{min(ignored.keys() - _IGNORED)}'")
        directory = directory_of(str(path_or_id), revision, local_files_only)
        return CausalLM(
            directory,
            dtype=dtype if dtype is not None else torch_dtype,
            device=device if device is not None else device_map,
            threads=threads,
            name=str(path_or_id),
        )


class CausalLM:
    """A language model.

    Immutable: any number of threads may call it at once (each with its own past_key_values), and
    computing releases the GIL. `to` puts another copy of the weights in the place of this one.
    What a sequence gets depends neither on its neighbours in a batch nor on the number of threads.
    """

    def __init__(self, directory, *, dtype=None, device=None, threads=0, name=None):
        self.name_or_path = name or directory
        self._load(directory, _dtype_code(dtype), _device_name(device), threads)
        self.config = Config(json.loads(self.info.config_json))
        self.generation_config = GenerationConfig.from_pretrained(directory)

    def _load(self, directory, dtype, device, threads):
        self._core = _core.Model(directory, dtype, threads, "main")
        self._dtype, self._device, self._threads = dtype, device, threads
        self.info = self._core.info
        self._tokenizer = None

    def to(self, *args, device=None, dtype=None):
        """Moves the model to a device or keeps its weights in another dtype: returns itself.

        The weights are loaded anew, so caches made before no longer fit.
        """
        for value in args:
            if _is_dtype(value):
                dtype = value
            else:
                device = value
        code = self._dtype if dtype is None else _dtype_code(dtype)
        name = self._device if device is None else _device_name(device)
        if (code, name) != (self._dtype, self._device):
            self._load(self.info.directory, code, name, self._threads)
        return self

    def cuda(self, device=0):
        return self.to(f"cuda:{device}" if device else "cuda")

    def cpu(self):
        return self.to("cpu")

    def float(self):
        return self.to(dtype="float32")

    def bfloat16(self):
        return self.to(dtype="bfloat16")

    def half(self):
        return self.to(dtype="float16")

    def eval(self):
        """Itself: there is nothing that training would do otherwise."""
        return self

    @property
    def device(self):
        return self._device

    @property
    def dtype(self):
        """Of most of the weights: "float32", "bfloat16", "float16", "int8" or "int4"."""
        counts = collections.Counter()
        for parameter in self._parameters():
            counts[parameter.dtype] += parameter.numel()
        return counts.most_common(1)[0][0]

    @property
    def tokenizer(self):
        """The checkpoint's own tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = AutoTokenizer.from_pretrained(self.info.directory)
        return self._tokenizer

    def __call__(
        self,
        input_ids,
        attention_mask=None,
        past_key_values=None,
        labels=None,
        use_cache=True,
        output_hidden_states=False,
        logits_to_keep=0,
        return_dict=True,
    ):
        """Logits [B, T, N], or with `labels` the loss [B, T] of each token, as a CausalLMOutput.

        input_ids [B, T]: integers. attention_mask [B, T]: 1 at tokens, 0 at padding on the left or
        on the right (or [B, P + T], where past_key_values has read P). labels [B, T] are not
        shifted: labels[b, t] is what should follow input_ids[b, t]; negative ones are left out.
        past_key_values: a Cache to go on from, updated in place. logits_to_keep: of the last so many
        tokens only; 0: of all.
        """
        ids = to_ids(input_ids, "input_ids")
        packed = Packed(ids, attention_mask)
        states = states_for(self._core, past_key_values, ids.shape[0])
        convert = like(input_ids)
        output = CausalLMOutput()
        if labels is not None:
            if output_hidden_states:
                output.hidden_states = self._hidden(packed, [state.copy() for state in states])
            output.loss = convert(self._loss(packed, labels, states))
        elif logits_to_keep == 1 and not output_hidden_states and _ends_in_tokens(packed):
            output.logits = np.empty((ids.shape[0], 1, self.info.vocab_size), np.float32)
            self._core.forward(packed.ids, packed.cu_seqlens, states, output.logits)
        else:
            output.logits, output.hidden_states = self._logits(
                packed, states, logits_to_keep, output_hidden_states
            )
        if output.logits is not None:
            output.logits = convert(output.logits)
        if output.hidden_states is not None:
            output.hidden_states = tuple(map(convert, output.hidden_states))
        if use_cache:
            given = isinstance(past_key_values, Cache)
            output.past_key_values = past_key_values if given else Cache(self._core, states)
        return output if return_dict else output.to_tuple()

    forward = __call__

    def loss_and_grad(self, input_ids, labels, attention_mask=None, recompute=False):
        """The loss [B, T] of each token, and the gradients of its mean: {name: float32 array}.

        The mean is over the labels that are not negative; arguments are as in a call. The model must
        be loaded with dtype="float32". recompute: takes a fraction of the memory and a third more
        work. Nothing is changed: a step of an optimiser is the caller's.
        """
        packed = Packed(to_ids(input_ids, "input_ids"), attention_mask)
        labels = self._labels(packed, labels)
        losses = np.zeros(packed.ids.size, np.float32)
        gradients = _core.loss_and_gradients(
            self._core, packed.ids, packed.cu_seqlens, packed.pack(labels), losses, recompute
        )
        convert = like(input_ids)
        loss = convert(self._padded(packed, losses))
        return loss, {name: convert(gradient) for name, gradient in gradients.items()}

    def _labels(self, packed, labels):
        labels = to_ids(labels, "labels")
        if labels.shape != packed.shape:
            raise Error(f"labels: must be of shape {list(packed.shape)}, got {list(labels.shape)}")
        return labels

    def _padded(self, packed, losses):
        if packed.mask is None:
            return losses.reshape(packed.shape)
        padded = np.zeros(packed.shape, np.float32)
        padded[packed.mask] = losses
        return padded

    def _loss(self, packed, labels, states):
        labels = self._labels(packed, labels)
        losses = np.zeros(packed.ids.size, np.float32)
        self._core.loss(packed.ids, packed.cu_seqlens, packed.pack(labels), states, losses)
        return self._padded(packed, losses)

    def _logits(self, packed, states, keep, with_hidden):
        batch, columns = packed.shape
        keep = min(keep, columns) or columns
        row, column = np.divmod(packed.places, columns)
        column -= columns - keep
        places = np.where(column >= 0, row * keep + column, -1)
        make = np.empty if packed.mask is None else np.zeros
        logits = make((batch, keep, self.info.vocab_size), np.float32)
        hidden = []
        if with_hidden:
            # The hidden states are of all tokens.
            hidden = self._hidden(packed, [state.copy() for state in states])
        self._core.logits(packed.ids, packed.cu_seqlens, states, places, logits, [])
        return logits, tuple(hidden) or None

    def _hidden(self, packed, states):
        layers = self.info.num_hidden_layers
        make = np.empty if packed.mask is None else np.zeros
        hidden = [make((*packed.shape, self.info.hidden_size), np.float32) for _ in range(layers + 1)]
        # Layer `layers` is what the last one puts out, which transformers leaves out.
        self._core.logits(
            packed.ids,
            packed.cu_seqlens,
            states,
            packed.places,
            None,
            [*hidden[:layers], None, hidden[layers]],
        )
        return tuple(hidden)

    def generate(
        self, inputs=None, generation_config=None, *, streamer=None, return_dict_in_generate=False, **options
    ):
        """Continues prompts [B, T]; returns ids [B · num_return_sequences, T + new] (int64).

        The prompts come first, as they were given; rows that end early are filled up with the pad
        token. Options are those of GenerationConfig; the checkpoint's generation_config.json holds
        where nothing is said. Furthermore: attention_mask [B, T] for padded prompts; tokenizer, for
        stop_strings; past_key_values, a Cache of the first tokens of inputs (copied, not changed);
        streamer, as in transformers; return_dict_in_generate for a GenerateOutput.
        """
        use_cache = options.get("use_cache")
        generation = Generation(self, inputs, generation_config=generation_config, **options)
        if streamer is not None:
            sequences = generation.run_with(streamer)
        else:
            wants_states = (
                return_dict_in_generate and use_cache is not False and generation.config.num_beams == 1
            )
            sequences = generation.run(return_states=wants_states)
        return generation.output(sequences) if return_dict_in_generate else generation.padded(sequences)

    def stream(self, inputs, tokenizer=None, **options):
        """Continues a prompt, a text or ids [T], and yields the new text in pieces, as it comes.

        Pieces end neither inside a character nor inside what may become a stop string. Leaving the
        loop ends the generation. Options as for `generate`.
        """
        tokenizer = tokenizer or self.tokenizer
        if isinstance(inputs, str):
            inputs = tokenizer(inputs, return_tensors="np").input_ids
        generation = Generation(self, inputs, tokenizer=tokenizer, **options)
        config = generation.config
        if len(generation.prompts) != 1 or config.num_beams != 1 or config.num_return_sequences != 1:
            raise Error("stream: is for one prompt, one sequence and one beam")
        return pieces(generation)

    def load_cache(self, path):
        """What `Cache.save` wrote, of this model."""
        return Cache._load(self._core, path)

    def _parameters(self):
        return [Parameter(weight) for weight in _core.weights(self._core)]

    def named_parameters(self):
        """(name, Parameter) for every trained weight, in the model's order."""
        return ((p.name, p) for p in self._parameters() if p.requires_grad)

    def named_buffers(self):
        """(name, Parameter) for every weight that training leaves alone."""
        return ((p.name, p) for p in self._parameters() if not p.requires_grad)

    def parameters(self):
        return (p for _, p in self.named_parameters())

    def get_parameter(self, name):
        return parameter_named(self._parameters(), name)

    def state_dict(self):
        return {p.name: p for p in self._parameters()}

    def num_parameters(self, only_trainable=False, exclude_embeddings=False):
        return self.info.num_non_embedding_parameters if exclude_embeddings else self.info.num_parameters

    def __repr__(self):
        info = self.info
        return (
            f"CausalLM({self.name_or_path!r}, {info.model_type}, {info.num_parameters / 1e6:.1f}M "
            f"parameters, {self.dtype}, {self.device})"
        )


class Config(types.SimpleNamespace):
    """config.json with its keys as attributes."""

    def __init__(self, values):
        super().__init__(**values)

    def to_dict(self):
        return dict(vars(self))

    def get(self, key, default=None):
        return getattr(self, key, default)


def _ends_in_tokens(packed):
    return packed.mask is None or packed.mask[:, -1].all()


def _dtype_name(value):
    if isinstance(value, type) and issubclass(value, np.generic) or isinstance(value, np.dtype):
        return np.dtype(value).name
    return str(value).removeprefix("torch.")


def _is_dtype(value):
    return _dtype_name(value) in _DTYPES


def _dtype_code(value):
    if value is None or value == "auto":
        return None
    name = _dtype_name(value)
    if name not in _DTYPES:
        raise Error(f"dtype: must be float32, bfloat16, float16, int8 or int4, got '{name}'")
    return _DTYPES[name]


def _device_name(value):
    name = "cpu" if value is None or value == "auto" else str(value)
    if name != "cpu":
        raise Error(f"device: this build of deltafox computes on the CPU only, got '{name}'")
    return name
