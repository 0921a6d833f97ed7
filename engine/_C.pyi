"""Native kernels: see csrc/bindings.cpp. Tensors are read as they are; where a pointer is an int, 0 is none."""

from typing import Any

from torch import Tensor

_Key = tuple[int, Tensor | None, int, Tensor | None, int, Tensor | None]    # seed, stream, offset: number or tensor
_LatentOptions = tuple[float, float, int, bool, int, float, float]      # clamp, samples, antithetic, terms, beta, bits

isa: str
compiler: str
attention_isa: str
usable_isas: list[str]
has_cuda: bool

def signature(gradients: bool, /, *arguments: Any) -> bytes | None: ...
def read_by_attributes(on: bool, /) -> None: ...
def cuda_devices() -> list[str]: ...
cuda: Any       # where has_cuda: the functions below that have a CUDA kernel, with (device, stream) for num_threads

# Of the functions that return a number, bit i says that argument i lies otherwise than the kernel reads, and that
# nothing was done.

def rng_fill(distribution: int, key: _Key, out: Tensor, num_threads: int, /) -> None: ...
def reparam_forward(
    mean: Tensor, logvar: Tensor, noise: Tensor | None, key: _Key, z: Tensor, kl: Tensor | None, num_threads: int, /
) -> int: ...
def reparam_backward(
    mean: Tensor, logvar: Tensor, noise: Tensor | None, key: _Key, grad_z: Tensor | None, grad_kl: Tensor | None,
    grad_mean: Tensor, grad_logvar: Tensor, grad_noise: Tensor | None, num_threads: int, /,
) -> int: ...
def latent_forward(
    mean: Tensor, logvar: Tensor | None, noise: Tensor | None, key: _Key, prior_mean: Tensor | None,
    prior_logvar: Tensor | None, chunk_dim: int, options: _LatentOptions, z: Tensor, first: Tensor, second: Tensor,
    num_threads: int, /,
) -> int: ...
def latent_backward(
    mean: Tensor, logvar: Tensor | None, noise: Tensor | None, key: _Key, prior_mean: Tensor | None,
    prior_logvar: Tensor | None, chunk_dim: int, options: _LatentOptions, grad_z: Tensor | None,
    grad_first: Tensor | None, grad_second: Tensor | None, to_mean: Tensor, to_logvar: Tensor | None,
    to_prior_mean: Tensor | None, to_prior_logvar: Tensor | None, to_noise: Tensor | None, num_threads: int, /,
) -> int: ...
def gumbel_softmax(
    logits: Tensor, grad: Tensor | None, key: _Key, tau: float, hard: bool, out: Tensor, num_threads: int, /
) -> None: ...
def interpolate_forward(
    start: Tensor, end: Tensor, weight: float, weights: Tensor | None, arc: bool, out: Tensor, num_threads: int, /
) -> int: ...
def interpolate_backward(
    start: Tensor, end: Tensor, grad: Tensor, weight: float, weights: Tensor | None, arc: bool, to_start: Tensor,
    to_end: Tensor, to_weights: Tensor | None, num_threads: int, /,
) -> int: ...
def denoise_step(
    sample: Tensor, model: Tensor, cond: Tensor | None, noise: Tensor | None, known: Tensor | None, mask: Tensor | None,
    mask_step: int, period: int, table: Tensor, step: int, steps: Tensor | None, guidance: float,
    guidances: Tensor | None, seed: int, seeds: Tensor | None, state: Tensor | None, out: Tensor, num_threads: int, /,
) -> int: ...

class Attention:
    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, queries: int, seqlens: Tensor | None,
        appended: int, block_table: Tensor | None, batch_idx: Tensor | None, leftpad: Tensor | None,
        cu_seqlens: Tensor | None, cos: Tensor | None, sin: Tensor | None, interleaved: bool, rotary_ordered: bool,
        causal: bool, window_left: int, window_right: int, softcap: float, scale: float, slopes: Tensor | None,
        sinks: Tensor | None, mask: Tensor | None, tree: Tensor | None, codes: int, k_scale: Tensor | None,
        v_scale: Tensor | None, num_threads: int, /,
    ) -> None: ...

def cache_fits(
    cache: Tensor, seqlens: Tensor, appended: int, block_table: Tensor | None, batch_idx: Tensor | None,
    leftpad: Tensor | None, cu_seqlens: Tensor | None, queries: int, tokens: int, positions: int, /,
) -> bool: ...
def attention_forward(call: Attention, q: Tensor, /) -> None: ...
def attention_backward(
    forward: Attention, grad_out: Tensor, grad_lse: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor, top: Tensor,
    excess: Tensor, delta: Tensor, /,
) -> None: ...
def merge_attention(
    outs: Tensor, lses: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor, num_threads: int, /
) -> None: ...
def merge_attention_backward(
    outs: Tensor, lses: Tensor, sinks: Tensor | None, grad_out: Tensor, grad_lse: Tensor | None,
    douts: Tensor, dlses: Tensor, dsinks: Tensor | None, num_threads: int, /,
) -> None: ...
def kvcache_append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor, block_table: Tensor | None,
    batch_idx: Tensor | None, cu_seqlens: Tensor | None, cos: Tensor | None, sin: Tensor | None, interleaved: bool,
    codes: int, k_scale: Tensor | None, v_scale: Tensor | None, num_threads: int, /,
) -> None: ...

def read_bytes(source: int, bytes: int, num_threads: int, /) -> int: ...
def copy_bytes(source: int, target: int, bytes: int, num_threads: int, /) -> None: ...

_Samples = tuple[int, int, int]     # pointer, elements from one ray to the next, dtype

def composite_scratch(longest: int, /) -> int: ...
def longest_ray(offsets: int, n_rays: int, total: int, /) -> int: ...

class Composite:
    def __init__(
        self, n_rays: int, n_samples: int, n_channels: int, ray_offsets: int, sigmas: _Samples, alphas: _Samples,
        features: _Samples, t_starts: _Samples, t_ends: _Samples, background: int, background_step: int,
        prefix_trans: int, early_stop_eps: float, depth: int, num_threads: int, tasks: int, scratch: int, /,
    ) -> None: ...

def composite_forward(
    call: Composite, features: int, depth: int, opacity: int, weights: int, distortion: int, /
) -> None: ...
def composite_backward(
    call: Composite, grad_features: int, grad_depth: int, grad_opacity: int, grad_distortion: int,
    grad_weights: _Samples, /, *outputs: int,       # sigmas, features, t_starts, t_ends, alphas, background,
) -> None: ...                                      # prefix_trans, left
