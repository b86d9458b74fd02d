"""Arrays on their way in and out."""

import importlib.util
import sys

import numpy as np

from . import _torch
from ._core import Error


def torch_module():
    """torch where it is installed, else the stand-in for the little of it that we need."""
    if importlib.util.find_spec("torch") is None:
        return _torch
    import torch

    return torch


def is_torch(value):
    torch = sys.modules.get("torch")  # who has not imported it has no tensor of it
    return torch is not None and isinstance(value, torch.Tensor)


def to_numpy(value):
    """A NumPy array over the same memory, where that is host memory and the kind of `value` lets us."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, _torch.Tensor):
        return value.array
    if is_torch(value):
        return value.detach().cpu().numpy()
    if hasattr(value, "__dlpack__"):
        try:
            return np.from_dlpack(value)
        except (BufferError, RuntimeError) as error:
            raise Error(f"a {type(value).__name__} cannot be read as a NumPy array: {error}") from error
    return np.asarray(value)


def like(value):
    """The function that turns a NumPy array into what `value` is, without copying on the CPU."""
    if isinstance(value, _torch.Tensor):
        return _torch.Tensor
    if is_torch(value):
        torch = sys.modules["torch"]
        return lambda array: torch.from_numpy(array).to(value.device)
    return lambda array: array


def to_ids(value, name):
    """Token ids or labels as int32 [B, T], C-contiguous; one sequence [T] becomes [1, T]."""
    array = to_numpy(value)
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or array.size == 0:
        raise Error(f"{name}: must be of shape [B, T], not empty, got {list(array.shape)}")
    if array.dtype.kind not in "iu":
        raise Error(f"{name}: must be integers, got {array.dtype}")
    ids = np.ascontiguousarray(array, np.int32)
    if array.dtype.itemsize >= 4 and not np.array_equal(ids, array):
        raise Error(f"{name}: an id is beyond 32 bits")
    return ids


class Packed:
    """A batch [B, T], perhaps padded, as the sequences one after the other that the library reads.

    ids: int32 [t]; cu_seqlens: int64 [B + 1]; places: int64 [t], where among the B·T places each
    token stands; mask: bool [B, T], or None where there is no padding.
    """

    def __init__(self, input_ids, attention_mask=None):
        self.shape = batch, columns = input_ids.shape
        self.mask = None if attention_mask is None else self._checked(attention_mask)
        if self.mask is None or self.mask.all():
            self.mask = None
            self.ids = input_ids.reshape(-1)
            self.cu_seqlens = np.arange(batch + 1, dtype=np.int64) * columns
            self.places = np.arange(batch * columns, dtype=np.int64)
        else:
            self.ids = input_ids[self.mask]
            self.cu_seqlens = np.concatenate([[0], np.cumsum(self.mask.sum(1))]).astype(np.int64)
            self.places = np.flatnonzero(self.mask).astype(np.int64)

    def _checked(self, attention_mask):
        mask = to_numpy(attention_mask)
        if mask.ndim == 1:
            mask = mask[None]
        batch, columns = self.shape
        # With a cache the mask may speak of what the cache has read, too.
        if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] < columns:
            raise Error(f"attention_mask: must be of shape {[batch, columns]}, got {list(mask.shape)}")
        mask = mask[:, mask.shape[1] - columns :]
        if not np.isin(mask, (0, 1)).all():
            raise Error("attention_mask: must be 0 or 1")
        mask = mask.astype(bool)
        starts = mask[:, 0] + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
        for row in np.flatnonzero(starts != 1):
            if starts[row] == 0:
                raise Error(f"attention_mask: row {row} has no token")
            raise Error(f"attention_mask: row {row}: padding must be on the left or on the right")
        return mask

    def rows(self):
        """The ids of each sequence."""
        return [self.ids[a:b] for a, b in zip(self.cu_seqlens[:-1], self.cu_seqlens[1:])]

    def pack(self, padded):
        """The tokens' entries of an array [B, T]."""
        return padded.reshape(-1) if self.mask is None else padded[self.mask]
