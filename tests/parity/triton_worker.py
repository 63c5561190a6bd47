"""Runs Triton kernels in Triton's interpreter, on CPU tensors of PyTorch, and counts the bytes that they move.

Whether a kernel is interpreted is settled when Triton is imported, so this is a process of its own. It reads pickled
requests from standard input until that ends: (kernel, programs, arrays, scalars, outputs, constants, stretched), the
fields of a `Launch` with numpy arrays for inputs, and "module:name" for the kernel. It answers each with a pickled
(output arrays, bytes loaded and stored), or with the traceback. Outputs start as NaN: what a kernel leaves out is seen.

``stretched`` maps sizes to larger ones: every axis of such a size becomes that long in memory (of which only the pages
that are touched exist), with what was sent at its start; of outputs the start is answered.
"""

import importlib
import os
import pickle
import struct
import sys
import traceback

os.environ["TRITON_INTERPRET"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import ml_dtypes
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
moved = 0
patched = set()  # modules, in this launch


def count(pointers, mask) -> None:
    """Every address that an instruction of a program touches counts once."""
    global moved
    addresses, wanted = np.broadcast_arrays(pointers.data, mask.data)
    moved += np.unique(addresses[wanted]).size * (pointers.get_element_ty().primitive_bitwidth // 8)


def install_counters() -> None:
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(self, pointers, mask, *rest):
        mask = as_bool(mask)
        count(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        mask = as_bool(mask)
        count(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store


def install_products_of_bfloat16() -> None:
    """The interpreter holds bfloat16 as integers, and would multiply these."""
    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def widened(self, a, b, *rest):
        a, b = (self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    builder.create_dot = widened


def install_plain_calls() -> None:
    """A function that a kernel calls patches Triton's language for its module: once a launch will do."""

    def call(self, *args, **kwargs):
        module = id(self.fn.__globals__)
        if module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def as_bool(mask):
    """The interpreter makes a tensor of int32 of a scalar condition, and then refuses it as a mask."""
    return interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)


def to_torch(array: np.ndarray, stretched: dict[int, int]) -> torch.Tensor:
    if array.dtype == BFLOAT16:
        tensor = torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(np.array(array))
    if not stretched.keys() & set(tensor.shape):
        return tensor
    larger = torch.empty([stretched.get(size, size) for size in tensor.shape], dtype=tensor.dtype)
    larger[tuple(slice(size) for size in tensor.shape)] = tensor
    return larger


def to_numpy(tensor: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray:
    tensor = tensor[tuple(slice(size) for size in shape)].contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BFLOAT16)
    return tensor.numpy()


def run(kernel, programs, arrays, scalars, outputs, constants, stretched):
    global moved
    moved = 0
    patched.clear()
    inputs = [to_torch(array, stretched) for array in arrays]
    results = [to_torch(np.full(shape, np.nan, dtype), stretched) for shape, dtype in outputs]
    module, _, name = kernel.rpartition(":")
    with np.errstate(all="ignore"):
        getattr(importlib.import_module(module), name)[(programs,)](*inputs, *scalars, *results, **constants)
    shapes = [shape for shape, _ in outputs]
    return [to_numpy(result, shape) for result, shape in zip(results, shapes, strict=True)], moved


def main() -> None:
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    install_counters()
    install_products_of_bfloat16()
    install_plain_calls()
    while header := sys.stdin.buffer.read(8):
        request = pickle.loads(sys.stdin.buffer.read(*struct.unpack("<q", header)))
        try:
            answer = run(*request)
        except Exception:
            answer = traceback.format_exc()
        data = pickle.dumps(answer)
        answers.write(struct.pack("<q", len(data)) + data)
        answers.flush()


if __name__ == "__main__":
    main()
