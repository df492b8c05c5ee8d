"""Triton's interpreter, mended for bfloat16, and with the programs of a grid running side by side.

Only of use with TRITON_INTERPRET=1. What Triton 3.7 does not do right there:
a product of bfloat16 multiplies the bit patterns, and a cast to bfloat16 truncates.
"""

import inspect
import threading
from contextlib import contextmanager

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_builder = interpreter.InterpreterBuilder
_dot, _cast = _builder.create_dot, _builder.cast_impl
_patch_lang = interpreter._patch_lang


def keep_language_patched():
    """Replace triton.language's functions once, for the whole process.

    The interpreter does it at every call of every function, which takes longer than the numbers do.
    """
    done = set()

    def patch_once(fn):
        modules = filter(inspect.ismodule, fn.__globals__.values())
        languages = frozenset(m.__name__ for m in modules if m in (tl, tl.core))
        if languages not in done:
            _patch_lang(fn)
            done.add(languages)
        return interpreter._LangPatchScope()  # nothing to restore

    interpreter._patch_lang = patch_once


def mend_bfloat16():
    """Multiply bfloat16 by value and round it to nearest, ties to even; for the whole process."""
    _builder.create_dot = _dot_by_value
    _builder.cast_impl = _cast_by_value


def _dot_by_value(self, a, b, d, *options):
    return _dot(self, _to_float32(a), _to_float32(b), d, *options)


def _cast_by_value(self, src, dst_type):
    dst_type = dst_type.scalar
    if src.dtype.scalar == dst_type:
        return src
    if dst_type == tl.bfloat16:
        values = torch.from_numpy(np.ascontiguousarray(src.data, dtype=np.float32)).bfloat16()
        return interpreter.TensorHandle(values.view(torch.int16).numpy().view(np.uint16), dst_type)
    return _cast(self, _to_float32(src), dst_type)


def _to_float32(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = torch.from_numpy(np.ascontiguousarray(handle.data).view(np.int16))
    return interpreter.TensorHandle(bits.view(torch.bfloat16).float().numpy(), tl.float32)


class Concurrent:
    """A kernel whose programs run as threads, all at once, as a cooperative launch runs them.

    The interpreter runs them one after another, where the first to reach a barrier waits forever.
    Memory ordering is not tested this way: threads of one process see each other's stores at once.
    """

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **options):
            if options["PERSISTENT"]:
                _run_at_once(self.kernel, grid, args, options)
            else:
                self.kernel[grid](*args, **options)

        return launch


class _ThreadLocalGrid(type(interpreter.interpreter_builder)):
    """The interpreter's builder, with the program id of each thread its own."""

    _local = threading.local()

    @property
    def grid_idx(self):
        return getattr(self._local, "grid_idx", None)

    @grid_idx.setter
    def grid_idx(self, value):
        self._local.grid_idx = value


@contextmanager
def thread_local_grid():
    """Let programs of one grid run in threads."""
    builder = interpreter.interpreter_builder
    before = builder.__class__
    builder.__dict__.pop("grid_idx", None)
    builder.__class__ = _ThreadLocalGrid
    try:
        yield
    finally:
        builder.__class__ = before


def _run_at_once(kernel, grid, args, options):
    executor = interpreter.GridExecutor(kernel.fn, kernel.arg_names, grid)
    names = inspect.getfullargspec(kernel.fn).args
    args, options = executor._init_args_hst(
        args, {name: value for name, value in options.items() if name in names}
    )
    arguments = {
        name: value if name in executor.constexprs else interpreter._implicit_cvt(value)
        for name, value in inspect.getcallargs(kernel.fn, *args, **options).items()
    }
    builder = interpreter.interpreter_builder
    builder.set_grid_dim(*grid)
    errors = []

    def run(index):
        try:
            builder.grid_idx = index
            kernel.fn(**arguments)
        except BaseException as error:
            errors.append(error)

    language = interpreter._patch_lang(kernel.fn)
    try:
        threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in np.ndindex(*grid)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        language.restore()
    if errors:
        raise errors[0]
