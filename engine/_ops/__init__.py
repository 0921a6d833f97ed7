"""Every core op as torch.ops.onepass.<name>, defined from the table; and `call`, which picks the shorter path.

With plain tensors an implementation is called directly: the dispatcher would cost several microseconds. Under
torch.compile, functorch, modes, subclasses, autocast and autograd the torch.library op is called.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.nn import Parameter

from .. import registry
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


def plain(args: tuple[Any, ...]) -> bool:
    """Whether an implementation may be called directly."""
    if (
        torch.compiler.is_compiling()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or peek_interpreter_stack() is not None
        or _is_any_autocast_enabled()
    ):
        return False
    grad = torch.is_grad_enabled()
    for x in args:
        kind = type(x)
        if kind is Tensor or kind is Parameter:
            if grad and x.requires_grad:
                return False
        elif kind not in SCALARS and isinstance(x, Tensor):
            return False
    return True


def call(name: str, *args: Any, backend: str | None = None, out: Any = None) -> Any:
    """Runs core op `name`. `out` is a tensor, or a tuple of tensors and None, as the op returns them."""
    if plain(args):
        chosen = registry.choose(name, args, backend)
        function = registry.OPS[name].impls[chosen].function
        if out is None:
            return function(*args)
        return _deliver(function(*args), out) if chosen == "reference" else function(*args, out=out)
    if not torch.compiler.is_compiling():       # so that backward uses the backend that forward used
        backend = registry.choose(name, args, backend)
    return _deliver(getattr(torch.ops.onepass, name)(*args, backend=backend), out)


def _deliver(result: Any, out: Any) -> Any:
    if out is None:
        return result
    if isinstance(result, Tensor):
        return out.copy_(result)
    return tuple(r if o is None else o.copy_(r) for r, o in zip(result, out, strict=True))


from . import attention, attention_varlen, denoise, reparam, rng, volrend  # noqa: E402, F401  # each registers the fakes and gradients of its ops
