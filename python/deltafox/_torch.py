"""The little of torch that the examples on the model cards use, over NumPy.

For machines without torch: `from deltafox import torch`. Tensors are in host memory, whatever device
they are sent to; the model copies what it needs.
"""

import contextlib

import numpy as np

float32, bfloat16, float16 = "float32", "bfloat16", "float16"
long = int64 = np.int64
int32 = np.int32


class Tensor:
    """A NumPy array with torch's method names. `array` is the array itself."""

    __slots__ = ("array",)

    def __init__(self, array):
        self.array = np.asarray(array)

    def size(self, dim=None):
        return self.array.shape if dim is None else self.array.shape[dim]

    def numel(self):
        return self.array.size

    def to(self, *args, **kwargs):
        return self

    cpu = cuda = detach = to

    def numpy(self):
        return self.array

    def tolist(self):
        return self.array.tolist()

    def item(self):
        return self.array.item()

    shape = property(lambda self: self.array.shape)
    ndim = property(lambda self: self.array.ndim)
    dtype = property(lambda self: self.array.dtype)

    def __len__(self):
        return len(self.array)

    def __iter__(self):
        return (Tensor(row) for row in self.array)

    def __getitem__(self, index):
        return Tensor(self.array[index])

    def __setitem__(self, index, value):
        self.array[index] = value

    def __array__(self, dtype=None, copy=None):
        return np.array(self.array, dtype, copy=True) if copy else np.asarray(self.array, dtype)

    def __dlpack__(self, **kwargs):
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __repr__(self):
        return f"Tensor({self.array!r})"


def tensor(data, dtype=None):
    return Tensor(np.array(data, dtype))


def roll(input, shifts, dims=None):
    return Tensor(np.roll(np.asarray(input), shifts, dims))


def autocast(device_type, dtype=None):
    """Nothing: a model computes as it was loaded (`dtype=` of from_pretrained)."""
    return contextlib.nullcontext()


no_grad = inference_mode = contextlib.nullcontext
