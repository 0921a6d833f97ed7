"""THE table: which op runs on which backend. `onepass info` prints it, docs/ops.md is made from it."""
from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import _attention_checks as expect
from . import _supports as supports
from . import _supports_triton as triton

BACKENDS = ("cuda", "triton", "cpu", "reference")
_DEVICE_BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}      # the reference takes the rest


class FallbackWarning(UserWarning):
    """No kernel could take a call and the reference took it; given once per op and reason."""


@dataclass(frozen=True)
class Impl:
    path: str                               # "module:function", imported at first use
    supports: Callable[..., str | None]     # of the core arguments: None, or why this implementation cannot take them
    takes: str                              # the same in words, for the table

    @functools.cached_property
    def function(self) -> Callable[..., Any]:
        module, name = self.path.split(":")
        return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Op:
    """A core op: tensors and scalars in, a fixed tuple of tensors out."""

    name: str
    schema: str                             # without the name; every op ends in `*, str? backend=None`
    public: str                             # the public functions that it serves
    impls: dict[str, Impl]                  # preferred first
    check: Callable[..., None] | None = None    # of the core arguments, before any implementation: may read values


_KEYS = "SymInt seed, Tensor? seeds, SymInt stream, Tensor? streams, SymInt offset, Tensor? offsets"
_LATENT = (
    "Tensor? prior_mean, Tensor? prior_logvar, SymInt chunk_dim, float clamp_low, float clamp_high, SymInt samples, "
    "bool antithetic, str terms, float beta, float free_bits"
)
_SCORES = "bool causal, SymInt window_left, SymInt window_right, float softcap, float scale"
_ROWS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
_PAGES = "float32, bfloat16, float16; pages with unit stride in the head dim"
_CACHES = "float32, bfloat16, float16; caches with unit stride in the head dim"
_CODES = f"{_CACHES}; caches of int8 or float8_e4m3fn with scales"
_CLOSED_FORM = "the closed form of the reference, in PyTorch"
_HALF_AND_SINGLE = "float32, bfloat16, float16"
_ANY_STRIDES = f"{_HALF_AND_SINGLE}; any strides"
_STEPS = f"{_HALF_AND_SINGLE}; model_output as sample, or any of them with a float32 sample; any strides"
_BUILT = "needs the CUDA build"
_BUILT_CLOSED_FORM = f"{_CLOSED_FORM}; {_BUILT}"
_ON_CUDA = f"head dims up to 256; {_BUILT}"
_CUDA_CACHES = f"{_CACHES}; {_ON_CUDA}"

_RAY_TYPES = f"{_HALF_AND_SINGLE}; views of rays"
_RAYS = (
    "Tensor? sigmas, Tensor features, Tensor t_starts, Tensor t_ends, Tensor? alphas, Tensor? ray_offsets, "
    "Tensor? background, Tensor? prefix_trans, float early_stop_eps, str depth"
)


def _reference(path: str) -> Impl:
    return Impl(f"onepass.reference.{path}", lambda *args: None, "every dtype and device")


_TABLE = [
    Op(
        "rng_fill",
        f"(SymInt[] shape, str distribution, {_KEYS}, ScalarType dtype, Device device, *, str? backend=None) -> Tensor",
        "rng.bits, rng.uniform, rng.normal, rng.gumbel, rng.exponential, rng.laplace, rng.logistic",
        {
            "cuda": Impl("onepass._native.rng:fill", supports.rng_cuda, f"{_HALF_AND_SINGLE}; {_BUILT}"),
            "triton": Impl("onepass.kernels.rng:fill", triton.rng, _HALF_AND_SINGLE),
            "cpu": Impl("onepass._native.rng:fill", supports.rng_cpu, _HALF_AND_SINGLE),
            "reference": _reference("rng:fill"),
        },
    ),
    Op(
        "reparameterize",
        f"(Tensor mean, Tensor logvar, Tensor? noise, {_KEYS}, bool kl, *, str? backend=None) -> (Tensor z, Tensor kl)",
        "reparameterize, reparameterize_kl",
        {
            "cuda": Impl("onepass._native.reparam:forward", supports.floats_cuda, f"{_ANY_STRIDES}; {_BUILT}"),
            "triton": Impl("onepass.kernels.reparam:forward", triton.reparam, _ANY_STRIDES),
            "cpu": Impl("onepass._native.reparam:forward", supports.floats_cpu, _ANY_STRIDES),
            "reference": _reference("reparam:reparameterize"),
        },
    ),
    Op(
        "reparameterize_backward",
        "(Tensor? grad_z, Tensor? grad_kl, Tensor mean, Tensor logvar, Tensor? noise, "
        f"{_KEYS}, bool noise_grad, *, str? backend=None) -> (Tensor grad_mean, Tensor grad_logvar, Tensor grad_noise)",
        "the gradient of reparameterize and reparameterize_kl",
        {
            "cuda": Impl(
                "onepass._native.reparam:backward", supports.reparam_backward_cuda, f"{_ANY_STRIDES}; {_BUILT}"
            ),
            "triton": Impl("onepass.kernels.reparam:backward", triton.reparam_backward, _ANY_STRIDES),
            "cpu": Impl(
                "onepass._native.reparam:backward", supports.reparam_backward_cpu, _ANY_STRIDES
            ),
            "reference": _reference("reparam:reparameterize_backward"),
        },
    ),
    Op(
        "latent_sample",
        f"(Tensor mean, Tensor? logvar, Tensor? noise, {_KEYS}, {_LATENT}, *, str? backend=None) "
        "-> (Tensor z, Tensor first, Tensor second)",
        "reparameterize, reparameterize_kl with options, reparameterize_log_weights",
        {
            "cuda": Impl("onepass._native.latent:forward", supports.floats_cuda, f"{_ANY_STRIDES}; {_BUILT}"),
            "triton": Impl("onepass.kernels.latent:forward", triton.reparam, _ANY_STRIDES),
            "cpu": Impl("onepass._native.latent:forward", supports.floats_cpu, _ANY_STRIDES),
            "reference": _reference("latent:latent_sample"),
        },
    ),
    Op(
        "latent_sample_backward",
        "(Tensor? grad_z, Tensor? grad_first, Tensor? grad_second, Tensor mean, Tensor? logvar, Tensor? noise, "
        f"{_KEYS}, {_LATENT}, bool noise_grad, bool prior_grad, *, str? backend=None) -> (Tensor grad_mean, "
        "Tensor grad_logvar, Tensor grad_noise, Tensor grad_prior_mean, Tensor grad_prior_logvar)",
        "their gradients",
        {
            "cuda": Impl(
                "onepass._native.latent:backward", supports.latent_backward_cuda, f"{_ANY_STRIDES}; {_BUILT}"
            ),
            "triton": Impl("onepass.kernels.latent:backward", triton.latent_backward, _ANY_STRIDES),
            "cpu": Impl("onepass._native.latent:backward", supports.latent_backward_cpu, _ANY_STRIDES),
            "reference": _reference("latent:latent_sample_backward"),
        },
    ),
    Op(
        "gumbel_softmax",
        f"(Tensor logits, {_KEYS}, float tau, bool hard, *, str? backend=None) -> Tensor",
        "gumbel_softmax",
        {
            "cuda": Impl("onepass._native.gumbel:forward", supports.floats_cuda, f"{_ANY_STRIDES}; {_BUILT}"),
            "triton": Impl("onepass.kernels.gumbel:forward", triton.gumbel, _ANY_STRIDES),
            "cpu": Impl("onepass._native.gumbel:forward", supports.floats_cpu, _ANY_STRIDES),
            "reference": _reference("gumbel:gumbel_softmax"),
        },
    ),
    Op(
        "gumbel_softmax_backward",
        f"(Tensor grad, Tensor logits, {_KEYS}, float tau, *, str? backend=None) -> Tensor",
        "the gradient of gumbel_softmax",
        {
            "cuda": Impl("onepass._native.gumbel:backward", supports.floats_cuda, f"{_ANY_STRIDES}; {_BUILT}"),
            "triton": Impl("onepass.kernels.gumbel:backward", triton.gumbel, _ANY_STRIDES),
            "cpu": Impl("onepass._native.gumbel:backward", supports.floats_cpu, _ANY_STRIDES),
            "reference": _reference("gumbel:gumbel_softmax_backward"),
        },
    ),
    Op(
        "interpolate",
        "(Tensor start, Tensor end, float weight, Tensor? weights, bool arc, *, str? backend=None) -> Tensor",
        "lerp, slerp",
        {
            "cuda": Impl("onepass._native.interpolate:forward", supports.floats_cuda, f"{_ANY_STRIDES}; {_BUILT}"),
            "triton": Impl("onepass.kernels.interpolate:forward", triton.floats, _ANY_STRIDES),
            "cpu": Impl("onepass._native.interpolate:forward", supports.floats_cpu, _ANY_STRIDES),
            "reference": _reference("interpolate:interpolate"),
        },
    ),
    Op(
        "interpolate_backward",
        "(Tensor grad, Tensor start, Tensor end, float weight, Tensor? weights, bool arc, bool weight_grad, "
        "*, str? backend=None) -> (Tensor grad_start, Tensor grad_end, Tensor grad_weights)",
        "the gradients of lerp and slerp",
        {
            "cuda": Impl("onepass._native.interpolate:backward", supports.floats_cuda, f"{_ANY_STRIDES}; {_BUILT}"),
            "triton": Impl("onepass.kernels.interpolate:backward", triton.floats, _ANY_STRIDES),
            "cpu": Impl("onepass._native.interpolate:backward", supports.floats_cpu, _ANY_STRIDES),
            "reference": _reference("interpolate:interpolate_backward"),
        },
    ),
    Op(
        "attention_forward",
        f"(Tensor q, Tensor k, Tensor v, {_SCORES}, Tensor? alibi_slopes, Tensor? sinks, Tensor? mask, "
        "*, str? backend=None) -> (Tensor out, Tensor lse)",
        "attention",
        {
            "cuda": Impl("onepass._native.attention:forward", supports.attention_cuda, f"{_ANY_STRIDES}; {_ON_CUDA}"),
            "triton": Impl("onepass.kernels.attention:forward", triton.floats, _ANY_STRIDES),
            "cpu": Impl("onepass._native.attention:forward", supports.floats_cpu, _ANY_STRIDES),
            "reference": _reference("attention:attention_forward"),
        },
    ),
    Op(
        "attention_backward",
        f"(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_SCORES}, "
        "Tensor? alibi_slopes, Tensor? sinks, Tensor? mask, *, str? backend=None) "
        "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)",
        "the gradient of attention",
        {
            "triton": Impl("onepass.kernels.attention_backward:backward", triton.floats, _ANY_STRIDES),
            "cuda": Impl("onepass.reference.attention:attention_backward", supports.floats_cuda, _BUILT_CLOSED_FORM),
            "cpu": Impl("onepass._native.attention:backward", supports.floats_cpu, f"{_HALF_AND_SINGLE}; any strides"),
            "reference": _reference("attention:attention_backward"),
        },
    ),
    Op(
        "attention_varlen_forward",
        f"(Tensor q, Tensor k, Tensor v, {_ROWS}, Tensor? block_table, {_SCORES}, Tensor? alibi_slopes, Tensor? sinks, "
        "*, str? backend=None) -> (Tensor out, Tensor lse)",
        "attention_varlen",
        {
            "cuda": Impl(
                "onepass._native.attention_varlen:forward", supports.varlen_cuda, f"{_PAGES}; no gradient; {_ON_CUDA}"
            ),
            "triton": Impl("onepass.kernels.attention:varlen_forward", triton.varlen, _PAGES),
            "cpu": Impl("onepass._native.attention_varlen:forward", supports.varlen_cpu, _PAGES),
            "reference": _reference("attention_varlen:attention_varlen_forward"),
        },
        check=expect.varlen_values,
    ),
    Op(
        "attention_varlen_backward",
        f"(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_ROWS}, "
        f"{_SCORES}, Tensor? alibi_slopes, Tensor? sinks, *, str? backend=None) "
        "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)",
        "the gradient of attention_varlen",
        {
            "triton": Impl("onepass.kernels.attention_backward:varlen_backward", triton.floats, _ANY_STRIDES),
            "cpu": Impl(
                "onepass._native.attention_varlen:backward", supports.floats_cpu, f"{_HALF_AND_SINGLE}; any strides"
            ),
            "reference": _reference("attention_varlen:attention_varlen_backward"),
        },
    ),
    Op(
        "kvcache_append",
        "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor cache_seqlens, Tensor? block_table, "
        "Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? cu_seqlens, SymInt max_seqlen_q, Tensor? rotary_cos, "
        "Tensor? rotary_sin, bool rotary_interleaved, Tensor? k_head_scale=None, Tensor? v_head_scale=None, "
        "Tensor(c!)? k_token_scale=None, Tensor(d!)? v_token_scale=None, *, str? backend=None) -> ()",
        "attention_with_kvcache, the append",
        {
            "cuda": Impl("onepass._native.attention:kvcache_append", supports.append_cuda, _CUDA_CACHES),
            "triton": Impl("onepass.kernels.kvcache:kvcache_append", triton.append, _CACHES),
            "cpu": Impl("onepass._native.attention:kvcache_append", supports.append_cpu, _CODES),
            "reference": _reference("kvcache:kvcache_append"),
        },
        check=expect.append_values,
    ),
    Op(
        "kvcache_attention",
        "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, SymInt appended, Tensor? block_table, "
        "Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? cu_seqlens_q, SymInt max_seqlen_q, "
        f"Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved, {_SCORES}, Tensor? alibi_slopes, "
        "Tensor? sinks, Tensor? tree_mask, Tensor? k_scale=None, Tensor? v_scale=None, *, str? backend=None) "
        "-> (Tensor out, Tensor lse)",
        "attention_with_kvcache",
        {
            "cuda": Impl("onepass._native.attention:kvcache_attention", supports.kvcache_cuda, _CUDA_CACHES),
            "triton": Impl("onepass.kernels.attention:kvcache_attention", triton.kvcache, _CACHES),
            "cpu": Impl("onepass._native.attention:kvcache_attention", supports.kvcache_cpu, _CODES),
            "reference": _reference("kvcache:kvcache_attention"),
        },
        check=expect.attention_values,
    ),
    Op(
        "merge_attention",
        "(Tensor outs, Tensor lses, Tensor? sinks, *, str? backend=None) -> (Tensor out, Tensor lse)",
        "merge_attention",
        {
            "cuda": Impl(
                "onepass._native.attention_merge:merge_attention", supports.merge_cuda, f"{_ANY_STRIDES}; {_BUILT}"
            ),
            "triton": Impl("onepass.kernels.attention_merge:forward", triton.merge, _ANY_STRIDES),
            "cpu": Impl("onepass._native.attention_merge:merge_attention", supports.merge_cpu, _ANY_STRIDES),
            "reference": _reference("attention:merge_attention"),
        },
    ),
    Op(
        "merge_attention_backward",
        "(Tensor grad_out, Tensor? grad_lse, Tensor outs, Tensor lses, Tensor out, Tensor lse, Tensor? sinks, "
        "*, str? backend=None) -> (Tensor douts, Tensor dlses, Tensor dsinks)",
        "the gradient of merge_attention",
        {
            "cuda": Impl(
                "onepass._native.attention_merge:merge_attention_backward", supports.merge_backward_cuda,
                f"{_ANY_STRIDES}; {_BUILT}",
            ),
            "triton": Impl("onepass.kernels.attention_merge:backward", triton.merge_backward, _ANY_STRIDES),
            "cpu": Impl(
                "onepass._native.attention_merge:merge_attention_backward", supports.merge_backward_cpu, _ANY_STRIDES
            ),
            "reference": _reference("attention:merge_attention_backward"),
        },
    ),
    Op(
        "denoise_step",
        "(Tensor sample, Tensor model_output, Tensor? cond, Tensor table, SymInt step, Tensor? steps, "
        "Tensor(a!)? state, float guidance, Tensor? guidances, SymInt seed, Tensor? seeds, Tensor? noise, "
        "bool stochastic, Tensor? mask, Tensor? known, *, str? backend=None) -> Tensor",
        "denoise_step",
        {
            "cuda": Impl("onepass._native.denoise:denoise_step", supports.denoise_cuda, f"{_STEPS}; {_BUILT}"),
            "triton": Impl("onepass.kernels.denoise:denoise_step", triton.denoise, _STEPS),
            "cpu": Impl("onepass._native.denoise:denoise_step", supports.denoise_cpu, _STEPS),
            "reference": _reference("denoise:denoise_step"),
        },
    ),
    Op(
        "composite",
        f"({_RAYS}, bool return_weights, bool distortion, *, str? backend=None) "
        "-> (Tensor features, Tensor depth, Tensor opacity, Tensor weights, Tensor distortion)",
        "composite",
        {
            "cuda": Impl("onepass._native.volrend:forward", supports.composite_cuda, f"{_RAY_TYPES}; {_BUILT}"),
            "triton": Impl("onepass.kernels.volrend:forward", triton.composite, _RAY_TYPES),
            "cpu": Impl("onepass._native.volrend:forward", supports.composite_cpu, _RAY_TYPES),
            "reference": _reference("volrend:composite"),
        },
    ),
    Op(
        "composite_backward",
        "(Tensor? grad_features, Tensor? grad_depth, Tensor? grad_opacity, Tensor? grad_weights, "
        f"Tensor? grad_distortion, {_RAYS}, bool[] needs, *, str? backend=None) -> (Tensor grad_sigmas, "
        "Tensor grad_features_in, Tensor grad_t_starts, Tensor grad_t_ends, Tensor grad_alphas, "
        "Tensor grad_background, Tensor grad_prefix_trans)",
        "the gradient of composite",
        {
            "cuda": Impl("onepass._native.volrend:backward", supports.composite_cuda, f"{_RAY_TYPES}; {_BUILT}"),
            "triton": Impl("onepass.kernels.volrend:backward", triton.composite, _RAY_TYPES),
            "cpu": Impl("onepass._native.volrend:backward", supports.composite_cpu, _RAY_TYPES),
            "reference": _reference("volrend:composite_backward"),
        },
    ),
]

OPS = {op.name: op for op in _TABLE}


def _known(backend: str | None, what: str = "backend") -> str | None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{what}={backend!r}: expected one of {', '.join(BACKENDS)} or None")
    return backend


_from_environment = _known(os.environ.get("ONEPASS_BACKEND") or None, "ONEPASS_BACKEND")
_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("onepass_backend", default=_from_environment)
_warned: set[tuple[str, str]] = set()


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Calls inside the block run on backend `name`, or raise ValueError with the reason; None restores the choice."""
    token = _chosen.set(_known(name))
    try:
        yield
    finally:
        _chosen.reset(token)


def wanted() -> str | None:
    """The backend that use_backend or ONEPASS_BACKEND asks for."""
    return _chosen.get()


def refusal(op: Op, backend: str, args: tuple[Any, ...]) -> str | None:
    """Why `backend` cannot take this call of the core op, or None."""
    impl = op.impls.get(backend)
    if impl is None:
        return f"{op.name} has no {backend} kernel yet"
    return impl.supports(*args)


def choose(name: str, args: tuple[Any, ...], backend: str | None = None) -> str:
    """The backend that takes this call: the one asked for or ValueError, else the first of the row that can.

    Reads dtype, device, layout and a row's own sizes; never the batch size or the thread count.
    """
    op = OPS[name]
    asked = _known(backend) if backend is not None else wanted()
    if asked is not None:
        if why := refusal(op, asked, args):
            raise ValueError(f"{name}: backend={asked!r} cannot take this call: {why}")
        return asked
    reasons = []
    there = _DEVICE_BACKENDS.get(_device_type(args), ())
    for candidate in filter(there.__contains__, op.impls):
        why = refusal(op, candidate, args)
        if why is None:
            return candidate
        reasons.append(why)
    if reasons:
        _warn(name, "; ".join(reasons))
    return "reference"


def resolve(name: str, args: tuple[Any, ...], backend: str | None = None) -> Callable[..., Any]:
    """The function of the backend that `choose` names."""
    return OPS[name].impls[choose(name, args, backend)].function


def _device_type(args: tuple[Any, ...]) -> str:
    for x in args:
        if isinstance(x, torch.Tensor):
            return "cpu" if x.is_cpu else x.device.type
        if isinstance(x, torch.device):
            return x.type
    return "cpu"


def _warn(name: str, reason: str) -> None:
    if (name, reason) not in _warned:
        _warned.add((name, reason))
        warnings.warn(f"{name} runs on the reference: {reason}", FallbackWarning, stacklevel=2)
