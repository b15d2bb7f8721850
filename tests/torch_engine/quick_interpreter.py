"""Triton's interpreter in less than half the time, with the same results: what it works out anew for each operation is
kept, and what it throws away is left out. ``quicken()`` once in a process that interprets.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def quicken() -> None:
    interpreter._patch_lang = _once_a_module(interpreter._patch_lang)
    interpreter._get_np_dtype = _once_a_type(interpreter._get_np_dtype)
    tl.block_type.__init__ = _once_a_shape(tl.block_type.__init__)
    tl.tensor.__init__ = _with_known_shapes(tl.tensor.__init__)
    TritonSemantic.broadcast_impl_value = _unless_alike(TritonSemantic.broadcast_impl_value)
    # Sums of integers are computed again in 64 bits, for an assertion that without `debug` is not made.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


def _once_a_module(patch: Callable[[FunctionType], Any]) -> Callable[[FunctionType], Any]:
    """The language is replaced for each launch and each call of a function, and put back after the launch. Nobody
    compiles in this process, so it may stay."""
    done: set[str] = set()

    def patch_once(function: FunctionType) -> Any:
        if function.__module__ not in done:
            done.add(function.__module__)
            patch(function)
        return interpreter._LangPatchScope()  # which puts nothing back

    return patch_once


def _once_a_type(numpy_type: Callable[[tl.dtype], Any]) -> Callable[[tl.dtype], Any]:
    known: dict[str, Any] = {}

    def numpy_type_of(type: tl.dtype) -> Any:
        found = known.get(type.name)
        if found is None:
            found = known[type.name] = numpy_type(type)
        return found

    return numpy_type_of


def _once_a_shape(init: Callable[..., None]) -> Callable[..., None]:
    known: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}

    def __init__(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
        key = element_ty.name, tuple(tl.core._unwrap_if_constexpr(size) for size in shape)
        found = known.get(key)
        if found is None:
            init(self, element_ty, shape)
            known[key] = dict(vars(self))
        else:
            vars(self).update(found, element_ty=element_ty)

    return __init__


def _with_known_shapes(init: Callable[..., None]) -> Callable[..., None]:
    known: dict[str, dict[str, Any]] = {}
    shapes: dict[tuple[int, ...], Any] = {}

    def __init__(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
        found = known.get(type.name)
        if found is None:
            init(self, handle, type)
            sizes = tuple(size.value for size in self.shape)
            known[type.name] = {"shape": shapes.setdefault(sizes, self.shape), "numel": self.numel}
        else:
            vars(self).update(found, handle=handle, type=type, dtype=type.scalar)

    return __init__


def _unless_alike(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    def broadcast_impl_value(self: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor) -> Any:
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    return broadcast_impl_value
