"""A model's weights, by name."""

import numpy as np

from ._core import Error

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "Q8": "int8", "Q4": "int4"}


class Parameter:
    """A weight as the model keeps it, read-only.

    `numpy()` and `np.asarray(parameter)` give it without a copy where NumPy has its dtype and the model
    is on the CPU. NumPy has no bfloat16: such weights become float32, and `bits()` is their bits (uint16).
    `torch.from_dlpack(parameter)` gives a copy of the same dtype, which may be written to. Packed
    weights (int8, int4) cannot be read.
    """

    def __init__(self, weight):
        self._weight = weight
        self.name = weight.name
        self.dtype = _DTYPES[weight.dtype]
        self.requires_grad = weight.trainable

    @property
    def shape(self):
        return self._weight.shape

    @property
    def ndim(self):
        return len(self.shape)

    def size(self, dim=None):
        return self.shape if dim is None else self.shape[dim]

    def numel(self):
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self):
        return self._weight.nbytes

    def numpy(self):
        view = self._weight.view()
        if self.dtype != "bfloat16":
            return view
        return (view.astype(np.uint32) << 16).view(np.float32)

    def bits(self):
        view = self._weight.view()
        return view.view(f"uint{8 * view.itemsize}")

    def __array__(self, dtype=None, copy=None):
        array = self.numpy()
        return np.array(array, dtype, copy=True) if copy else np.asarray(array, dtype)

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        if copy is False:
            raise BufferError("the weight is read-only: DLPack consumers get a copy")
        if dl_device not in (None, self.__dlpack_device__()):
            raise BufferError("weights are given in host memory")
        return self._weight.dlpack()

    def __dlpack_device__(self):
        return (1, 0)  # the CPU

    def __repr__(self):
        return f"Parameter({self.name!r}, shape={list(self.shape)}, dtype={self.dtype})"


def parameter_named(parameters, name):
    for parameter in parameters:
        if parameter.name == name:
            return parameter
    raise Error(f"no parameter is named '{name}'")
