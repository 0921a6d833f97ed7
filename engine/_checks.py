"""Argument checks that the public functions share. Each error names the argument, what came and what is allowed."""
from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

# With ONEPASS_CHECK=1 a call on a device waits for lengths, pages, offsets and steps and checks them as in host memory.
ON_DEVICES = os.environ.get("ONEPASS_CHECK") == "1"
T = TypeVar("T")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_float_tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}, expected a tensor")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {x.dtype}, expected float32, bfloat16, float16 or float64")


def is_like(name: str, x: Any, other_name: str, other: Tensor) -> None:
    """x is a tensor with the shape, dtype and device of `other`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}, expected a tensor like {other_name}")
    if x.shape != other.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected that of {other_name}, {tuple(other.shape)}")
    if x.dtype != other.dtype:
        raise TypeError(f"{name} has dtype {x.dtype}, expected that of {other_name}, {other.dtype}")
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device}, expected the device of {other_name}, {other.device}")


def is_out(
    x: Tensor | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device, name: str = "out"
) -> None:
    """x may take a result of that shape, dtype and device, or is None."""
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}, expected a tensor")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {tuple(shape)}")
    if x.dtype != dtype:
        raise TypeError(f"{name} has dtype {x.dtype}, expected {dtype}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, expected {device}")
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(f"{name} requires a gradient: a result written into it has none")


def on_host(x: Tensor) -> bool:
    return x.device.type == "cpu"


def readable(*tensors: Tensor | None) -> bool:
    """Whether the host may read these values now: real tensors in host memory, not while compiling or tracing."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(x is None or (type(x) is Tensor and on_host(x)) for x in tensors)


def checkable(*tensors: Tensor | None) -> bool:
    """The same of values that are read to be checked: with ONEPASS_CHECK=1 on a device too, but not in a capture."""
    if readable(*tensors):
        return True
    if not ON_DEVICES or torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if any(x is not None and (type(x) is not Tensor or x.is_meta) for x in tensors):
        return False
    return not (any(x is not None and x.is_cuda for x in tensors) and torch.cuda.is_current_stream_capturing())


def one_of(name: str, value: T, allowed: Sequence[T]) -> T:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(str, allowed))}")
    return value


def random_key(name: str, value: int | Tensor, rows: int, device: torch.device) -> tuple[int, Tensor | None]:
    """(number, tensor or None) of a seed, stream or offset, the number as a signed 64-bit one."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"{name} has dtype {value.dtype}, expected an int or an int64 tensor")
        if tuple(value.shape) not in ((), (rows,)):
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected () or ({rows},)")
        if value.device != device:
            raise ValueError(f"{name} is on {value.device}, expected {device}")
        return 0, value
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} is {type(value).__name__}, expected an int or an int64 tensor")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        value = (value + 2**63) % 2**64 - 2**63
    return value, None


def random_keys(
    seed: int | Tensor, stream: int | Tensor, offset: int | Tensor, rows: int, device: torch.device
) -> tuple[int, Tensor | None, int, Tensor | None, int, Tensor | None]:
    """A key as core ops take it."""
    return (
        *random_key("seed", seed, rows, device), *random_key("stream", stream, rows, device),
        *random_key("offset", offset, rows, device),
    )


def fresh_seed(device: torch.device) -> Tensor:
    """A seed from torch's default generator, drawn on the device: nothing waits for it."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def tagged_stream(tag: int, stream: int | Tensor) -> int | Tensor:
    """A user's stream number below 2^56 with the op's tag above it, so that no two ops share noise."""
    if isinstance(stream, int) and not isinstance(stream, bool) and not 0 <= stream < 2**56:
        raise ValueError(f"stream={stream}: expected 0 <= stream < 2**56 (the bits above name the op)")
    if isinstance(stream, (bool, float)):
        raise TypeError(f"stream is {type(stream).__name__}, expected an int or an int64 tensor")
    return stream + (tag << 56)
