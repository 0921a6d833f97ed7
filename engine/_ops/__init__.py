"""Every core op as torch.ops.onepass.<name>, defined from the table; and `route`, which picks the shorter path.

With plain tensors an implementation is called directly, where a gradient is wanted inside an autograd.Function made of
the same two functions that torch.library was given: the dispatcher would cost several microseconds, its autograd tens.
Under torch.compile, functorch, modes, subclasses and autocast the torch.library op is called.

Checks cost more than a small call's work, so a public function keeps what it found: `signature` says all that checks
and choices read of a call, and for a call with the signature of an earlier one `recall` returns what that one kept.
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from .. import _native, registry
from .._supports import SCALARS

library = torch.library.Library("onepass", "DEF")


def _define(op: registry.Op) -> None:
    library.define(op.name + op.schema, tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args: Any, backend: str | None = None) -> Any:
        if op.check is not None:                # the public function may have seen fakes
            op.check(*args)
        return registry.resolve(op.name, args, backend)(*args)

    library.impl(op.name, run, "CompositeExplicitAutograd")
    if "Tensor " not in op.schema.split("->")[0].replace("str", ""):        # a factory: nothing to dispatch on
        library.impl(op.name, run, "BackendSelect")


for _op in registry.OPS.values():
    _define(_op)

_gradients: dict[str, type[torch.autograd.Function]] = {}


def differentiable(name: str, save: Callable[..., None], gradient: Callable[..., tuple[Tensor | None, ...]]) -> None:
    """Gives core op `name` its gradient, as torch.library.register_autograd takes it: save(ctx, inputs,
    keyword_only_inputs, output) and gradient(ctx, *grads), one for each input."""
    torch.library.register_autograd("onepass::" + name, gradient, setup_context=save, lib=library)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *inputs, function, backend = args
            output = function(*inputs)
            save(ctx, tuple(inputs), {"backend": backend}, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return *gradient(ctx, *grads), None, None

    _gradients[name] = Direct


def _undisturbed() -> bool:
    """Neither compiled nor under a mode, a transform or autocast."""
    return not (
        torch.compiler.is_compiling()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or peek_interpreter_stack() is not None
        or _is_any_autocast_enabled()
    )


def _kinds(args: tuple[Any, ...]) -> tuple[bool, bool]:
    """Whether an implementation may be called directly, and whether a gradient is wanted then."""
    if not _undisturbed():
        return False, False
    grad = False
    for x in args:
        kind = type(x)
        if kind is Tensor or kind is Parameter:
            grad = grad or x.requires_grad
        elif kind not in SCALARS and isinstance(x, Tensor):
            return False, False
    return True, grad and torch.is_grad_enabled()


def route(name: str, args: tuple[Any, ...], backend: str | None = None) -> Callable[..., Any]:
    """What runs this call of core op `name` and others of the same signature: f(*args), or f(*args, out=out) with a
    tensor, or a tuple of tensors and None, as the op returns them."""
    direct, grad = _kinds(args)
    if direct and (not grad or name in _gradients):
        chosen = registry.choose(name, args, backend)
        function = registry.OPS[name].impls[chosen].function
        if grad:
            return functools.partial(_with_gradient, _gradients[name], function, chosen)
        return functools.partial(_copying, function) if chosen == "reference" else function
    if not torch.compiler.is_compiling():       # so that backward uses the backend that forward used
        backend = registry.choose(name, args, backend)
    return functools.partial(_dispatched, name, backend)


def call(name: str, *args: Any, backend: str | None = None, out: Any = None) -> Any:
    """Runs core op `name`."""
    run = route(name, args, backend)
    return run(*args) if out is None else run(*args, out=out)


def _copying(function: Callable[..., Any], *args: Any, out: Any = None) -> Any:
    return _deliver(function(*args), out)


def _with_gradient(
    gradient: type[torch.autograd.Function], function: Callable[..., Any], backend: str, *args: Any, out: Any = None
) -> Any:
    return _deliver(gradient.apply(*args, function, backend), out)


def _dispatched(name: str, backend: str | None, *args: Any, out: Any = None) -> Any:
    return _deliver(getattr(torch.ops.onepass, name)(*args, backend=backend), out)


Signature = bytes | None
_MOST = 4096        # calls kept; then all are forgotten
_kept: dict[bytes, Any] = {}


def signature(*arguments: Any) -> Signature:
    """What checks and choices may read of these arguments: of tensors all but the values. None where the call has to
    be looked at anew: it is not plain, or the native extension is missing.

    Numbers that differ from call to call (lengths, seeds) are left out by the caller, who checks them each time.
    """
    if _native.error is not None or not _undisturbed():
        return None
    return _native._C.signature(torch.is_grad_enabled(), registry.wanted(), *arguments)


def recall(key: Signature) -> Any:
    """What `keep` was given with this signature, else None."""
    return None if key is None else _kept.get(key)


def keep(key: Signature, found: Any) -> None:
    if key is not None:
        if len(_kept) >= _MOST:
            _kept.clear()
        _kept[key] = found


def forget() -> None:
    """Look at every call anew: what checks and choices read beside a call's arguments has changed."""
    _kept.clear()


def _deliver(result: Any, out: Any) -> Any:
    if out is None:
        return result
    if isinstance(result, Tensor):
        return out.copy_(result)
    return tuple(r if o is None else o.copy_(r) for r, o in zip(result, out, strict=True))


from . import attention, attention_varlen, denoise, gumbel, interpolate, latent, reparam, rng, volrend  # noqa: E402, F401  # each registers the fakes and gradients of its ops
