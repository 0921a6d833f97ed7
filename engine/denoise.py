"""One denoising step, fused: guidance, solver, clamp, noise, history and inpainting in a single pass."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks as check
from . import registry
from ._ops import keep, recall, route, signature
from .plans import DenoisePlan
from .reference.denoise import STREAM_TAG
from .reference.denoise import denoise_step as _reference


def denoise_step(
    sample: Tensor,                                         # [B, ...] float32, bfloat16, float16 (float64: reference)
    model_output: Tensor | tuple[Tensor, Tensor],           # [B, ...], (uncond, cond) of that shape, or [2B, ...]
    plan: DenoisePlan,                                      # on the device of sample
    step: int | Tensor,                                     # rows of the plan: int, or int64 [] or [B]
    *,
    state: Tensor | None = None,                            # plan.new_state(sample), written in place
    guidance: float | Tensor | None = None,                 # number, or float tensor [] or [B]
    seed: int | Tensor | None = None,                       # int, or int64 [] or [B]; None draws one
    noise: Tensor | None = None,                            # as sample: used instead of drawing
    mask: Tensor | None = None,                             # bool or float, broadcasts to sample
    known: Tensor | None = None,                            # as sample
    out: Tensor | None = None,                              # as sample, which it may be; not with a gradient
    backend: str | None = None,
) -> Tensor:                                                # as sample
    """The sample after `step`, for any sampler in `onepass.plans`; rows of a batch may be at different steps.

    Guidance takes the pair (uncond, cond), or both stacked, uncond first: m = uncond + guidance (cond - uncond).
    Where mask is 1 (True) the generated value stays, where it is 0 the result is `known`, which has to be as noisy as
    the result, `plan.add_noise(clean, noise, step, after=True)`; between them it is interpolated.
    Rows that need noise draw rng.normal(seed=seed, stream=(2 << 56) + i), i the step within its own schedule: with
    seeds [B] a row of a batch has the bits it has alone. A deterministic plan reads neither seed nor noise.
    Sums are in float32 and rounded once. An operand whose coefficient is exactly 0 is not read. Where a gradient is
    needed, and under torch.func, the reference runs. The formula is in `reference/denoise.py`.
    Raises ValueError or TypeError where shapes, dtypes or devices differ, where step is not a row of the plan, and
    where of state, guidance, mask and known one is missing that the others or the plan need; nothing is written then.
    """
    given = None
    if type(plan) is DenoisePlan:
        given = signature(
            "denoise_step", sample, model_output, plan.table, plan.slots, plan.stochastic, _kind(step), state,
            _kind(guidance), _kind(seed), noise, mask, known, out, backend,
        )
    if (run := recall(given)) is None:
        _check(sample, model_output, plan, state, guidance, seed, noise, mask, known, out)
    m, cond = _outputs(sample, model_output)
    args = (
        sample, m, cond, plan.table, *_step(step, plan, sample), state, *_guidance(guidance),
        *_seed(seed, noise, plan, sample), plan.stochastic, mask, known,
    )
    if run is None:
        if _differentiates(sample, m, cond, state, guidance, noise, mask, known):
            if not torch.compiler.is_compiling():
                registry.choose("denoise_step", args, backend)          # raises where a kernel was asked for
            elif backend not in (None, "reference"):
                raise ValueError(f"denoise_step: backend={backend!r} cannot take this call: it has no gradient")
            result = _reference(*args)
            return result if out is None else out.copy_(result)
        run = route("denoise_step", args, backend)
        keep(given, run)
    return run(*args) if out is None else run(*args, out=out)


def _kind(x: object) -> object:
    """What a signature holds of a number that differs from call to call: its type."""
    return type(x).__name__ if type(x) in (int, float) else x


def _check(
    sample: Tensor, model_output: object, plan: DenoisePlan, state: Tensor | None, guidance: float | Tensor | None,
    seed: int | Tensor | None, noise: Tensor | None, mask: Tensor | None, known: Tensor | None, out: Tensor | None,
) -> None:
    check.is_float_tensor("sample", sample)
    if not sample.dim():
        raise ValueError("sample has shape (), expected [B, ...]")
    if not isinstance(plan, DenoisePlan):
        raise TypeError(f"plan is {type(plan).__name__}, expected a DenoisePlan (see onepass.plans)")
    if plan.table.device != sample.device:
        raise ValueError(f"plan is on {plan.table.device}, expected the device of sample, {sample.device}: "
                         f"plan.to({str(sample.device)!r})")
    _check_outputs(sample, model_output, guidance)
    _check_state(state, plan, sample)
    _check_guidance(guidance, sample)
    if noise is not None:
        check.is_like("noise", noise, "sample", sample)
        if seed is not None:
            raise ValueError("noise and seed are both given: expected at most one of them")
    _check_known(mask, known, sample)
    check.is_out(out, sample.shape, sample.dtype, sample.device)


def _outputs(sample: Tensor, model_output: Any) -> tuple[Tensor, Tensor | None]:
    """The model's output and None, or the unconditional and the conditional one, which may be stacked."""
    if isinstance(model_output, (tuple, list)):
        return model_output[0], model_output[1]
    if model_output.shape[0] == sample.shape[0]:
        return model_output, None
    uncond, cond = model_output.chunk(2)
    return uncond, cond


def _check_outputs(sample: Tensor, model_output: object, guidance: object) -> None:
    if isinstance(model_output, (tuple, list)):
        if len(model_output) != 2:
            raise ValueError(f"model_output has {len(model_output)} parts, expected (uncond, cond)")
        parts = tuple(model_output)
    elif isinstance(model_output, Tensor) and guidance is not None and (
            model_output.dim() and model_output.shape[0] == 2 * sample.shape[0]):
        parts = tuple(model_output.chunk(2)) if sample.shape[0] else (model_output, model_output)
    else:
        parts = (model_output,)
    names = ("model_output",) if len(parts) == 1 else ("model_output[0]", "model_output[1]")
    for name, x in zip(names, parts, strict=True):
        check.is_float_tensor(name, x)
        if x.shape != sample.shape:
            expected = tuple(sample.shape)
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected that of sample, {expected}, "
                             "or with guidance twice as many rows")
        if x.device != sample.device:
            raise ValueError(f"{name} is on {x.device}, expected the device of sample, {sample.device}")
    if len(parts) == 1:
        if guidance is not None:
            raise ValueError(f"guidance is given with one model_output of shape {tuple(parts[0].shape)}: expected "
                             "a pair (uncond, cond), or both stacked")
    elif guidance is None:
        raise ValueError("model_output is a pair, expected a guidance with it")
    elif parts[0].dtype != parts[1].dtype:
        raise TypeError(f"model_output[1] has dtype {parts[1].dtype}, expected that of model_output[0], "
                        f"{parts[0].dtype}")


def _step(step: int | Tensor, plan: DenoisePlan, sample: Tensor) -> tuple[int, Tensor | None]:
    number, steps = check.random_key("step", step, sample.shape[0], sample.device)
    if steps is None:
        if not 0 <= number < len(plan):
            raise ValueError(f"step={number}, expected 0 .. {len(plan) - 1}, a row of the plan")
    elif check.checkable(steps) and not torch._C._len_torch_dispatch_stack():
        values = steps.reshape(-1).tolist()
        if values and not (min(values) >= 0 and max(values) < len(plan)):
            raise ValueError(f"step has values {min(values)} .. {max(values)}, expected 0 .. {len(plan) - 1}, "
                             "rows of the plan")
    return number, steps


def _check_state(state: Tensor | None, plan: DenoisePlan, sample: Tensor) -> None:
    if plan.slots == 0:
        if state is not None:
            raise ValueError("state is given, expected None: the plan keeps no history")
        return
    expected = (sample.shape[0], plan.slots, *sample.shape[1:])
    if state is None:
        raise ValueError(f"state is None, expected plan.new_state(sample), of shape {expected}")
    if not isinstance(state, Tensor):
        raise TypeError(f"state is {type(state).__name__}, expected a tensor from plan.new_state(sample)")
    if tuple(state.shape) != expected:
        raise ValueError(f"state has shape {tuple(state.shape)}, expected {expected}")
    if state.dtype != sample.dtype:
        raise TypeError(f"state has dtype {state.dtype}, expected that of sample, {sample.dtype}")
    if state.device != sample.device:
        raise ValueError(f"state is on {state.device}, expected the device of sample, {sample.device}")
    if not state.is_contiguous():
        raise ValueError(f"state has strides {state.stride()}, expected a contiguous tensor")


def _check_guidance(guidance: object, sample: Tensor) -> None:
    if guidance is None:
        return
    if not isinstance(guidance, Tensor):
        if isinstance(guidance, bool) or not isinstance(guidance, (int, float)):
            raise TypeError(f"guidance is {type(guidance).__name__}, expected a number or a float tensor")
        return
    check.is_float_tensor("guidance", guidance)
    if tuple(guidance.shape) not in ((), (sample.shape[0],)):
        raise ValueError(f"guidance has shape {tuple(guidance.shape)}, expected () or ({sample.shape[0]},)")
    if guidance.device != sample.device:
        raise ValueError(f"guidance is on {guidance.device}, expected the device of sample, {sample.device}")


def _guidance(guidance: float | Tensor | None) -> tuple[float, Tensor | None]:
    if isinstance(guidance, Tensor):
        return 1.0, guidance
    return 1.0 if guidance is None else float(guidance), None


def _seed(
    seed: int | Tensor | None, noise: Tensor | None, plan: DenoisePlan, sample: Tensor
) -> tuple[int, Tensor | None, Tensor | None]:
    if noise is not None or (seed is None and not plan.stochastic):
        return 0, None, noise
    fresh = check.fresh_seed(sample.device) if seed is None else seed
    return *check.random_key("seed", fresh, sample.shape[0], sample.device), None


def _check_known(mask: Tensor | None, known: Tensor | None, sample: Tensor) -> None:
    if mask is None and known is None:
        return
    if mask is None or known is None:
        raise ValueError(f"{'mask' if mask is None else 'known'} is None, expected mask and known together")
    check.is_like("known", known, "sample", sample)
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask is {type(mask).__name__}, expected a tensor")
    if mask.dtype != torch.bool:
        check.is_float_tensor("mask", mask)
    pairs = zip(reversed(mask.shape), reversed(sample.shape), strict=False)
    if mask.dim() > sample.dim() or any(a not in (1, b) for a, b in pairs):
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected one that broadcasts to that of sample, "
                         f"{tuple(sample.shape)}")
    if mask.device != sample.device:
        raise ValueError(f"mask is on {mask.device}, expected the device of sample, {sample.device}")


def _differentiates(*xs: object) -> bool:
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in xs)


__all__ = ["STREAM_TAG", "denoise_step"]
