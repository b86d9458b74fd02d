"""What a model remembers of a batch of sequences."""

import os

from . import _core
from ._core import Error


class Cache:
    """The states of B sequences: `past_key_values`, and a list of what each sequence left behind.

    A model call that is given a cache continues from it and updates it in place, as in
    transformers. Copy it first (`cache.copy()`, `copy.copy(cache)`) to continue in several ways.
    `cache[b]` is the cache of sequence b alone, `cache[a:b]` of some: they share their states with
    this one. `cache_a + cache_b` joins two.
    """

    def __init__(self, model, states):
        self._model = model
        self.states = list(states)

    def copy(self):
        """A fork: what is done to one does not change the other."""
        return Cache(self._model, [state.copy() for state in self.states])

    __copy__ = copy

    def __deepcopy__(self, _):
        return self.copy()

    def batch_repeat_interleave(self, repeats):
        """A cache with each sequence `repeats` times, forked."""
        return Cache(self._model, [s.copy() for s in self.states for _ in range(repeats)])

    @property
    def positions(self):
        """How many tokens each sequence has read."""
        return [state.position for state in self.states]

    def get_seq_length(self, layer_idx=0):
        """How many tokens the longest sequence has read."""
        return max(self.positions, default=0)

    @property
    def nbytes(self):
        """Memory held; pages that copies share count in each."""
        return sum(state.nbytes for state in self.states)

    def save(self, path):
        """Writes one sequence's state to the file `path`; of several, to files in a folder `path`.

        The files name the model by a hash of its weights; `model.load_cache(path)` reads them.
        """
        if len(self) == 1:
            self._model.save_state(self.states[0], os.fspath(path))
            return
        os.makedirs(path, exist_ok=True)
        for b, state in enumerate(self.states):
            self._model.save_state(state, os.path.join(path, _file_name(b)))

    @classmethod
    def _load(cls, model, path):
        path = os.fspath(path)
        if not os.path.isdir(path):
            return cls(model, [model.load_state(path)])
        states = []
        while os.path.exists(file := os.path.join(path, _file_name(len(states)))):
            states.append(model.load_state(file))
        if not states:
            raise Error(f"{path}: holds no state")
        return cls(model, states)

    def __len__(self):
        return len(self.states)

    def __getitem__(self, index):
        chosen = self.states[index]
        return Cache(self._model, chosen if isinstance(chosen, list) else [chosen])

    def __add__(self, other):
        return Cache(self._model, self.states + other.states)

    def __repr__(self):
        return f"Cache(positions={self.positions})"


def _file_name(index):
    return f"state-{index:05d}.safetensors"


def states_for(core, cache, batch):
    """The states that a call on `batch` sequences continues from."""
    if cache is None:
        return [core.new_state() for _ in range(batch)]
    states = cache.states if isinstance(cache, Cache) else list(cache)
    if not all(isinstance(state, _core.State) for state in states):
        raise Error("past_key_values: must be a deltafox.Cache")
    if len(states) != batch:
        raise Error(f"past_key_values: {len(states)} states for {batch} sequences")
    return states
