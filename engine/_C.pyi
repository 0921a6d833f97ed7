"""Native kernels: see csrc/bindings.cpp. Tensors are read as they are; where a pointer is an int, 0 is none."""

from typing import Any

from torch import Tensor

_Key = tuple[int, int, int]     # number, pointer to int64 values, step from row to row
_Keys = tuple[_Key, ...]       # of seed, stream and offset
_Rows = tuple[int, int]         # pointer, elements from one row to the next

isa: str
compiler: str
attention_isa: str
usable_isas: list[str]
has_cuda: bool
KL_TILE: int
LATENT_TILE: int
GUMBEL_MARGIN: int
INTERPOLATE_TILE: int
PAIR_SUMS: int
DENOISE_COLUMNS: int
MAX_HISTORY: int

def signature(gradients: bool, /, *arguments: Any) -> bytes | None: ...
def read_by_attributes(on: bool, /) -> None: ...
def cuda_devices() -> list[str]: ...
cuda: Any       # where has_cuda: the functions below that have a CUDA kernel, with (device, stream) for num_threads

def rng_fill(
    distribution: int, keys: _Keys, rows: int, length: int, dtype: int, out: int, num_threads: int, /
) -> None: ...
def reparam_forward(
    rows: int, length: int, dtype: int, mean: int, mean_step: int, logvar: int, logvar_step: int, noise: int,
    noise_step: int, keys: _Keys | None, keys_per_row: bool, num_threads: int, z: int, kl: int, partial: int, /,
) -> None: ...
def reparam_backward(
    rows: int, length: int, dtype: int, mean: int, mean_step: int, logvar: int, logvar_step: int, noise: int,
    noise_step: int, keys: _Keys | None, keys_per_row: bool, num_threads: int, grad_z: int, grad_z_step: int,
    grad_kl: int, grad_mean: int, grad_logvar: int, grad_noise: int, /,
) -> None: ...

def gumbel_softmax(
    groups: int, n: int, keyed: int, dtype: int, logits: int, grad: int, keys: _Keys, tau: float, hard: bool, out: int,
    scratch: int, num_threads: int, /,
) -> None: ...

class Interpolate:
    def __init__(
        self, rows: int, groups: int, length: int, dtype: int, start: int, start_step: int, end: int, end_step: int,
        grad: int, grad_step: int, weight: float, weights: int, weight_step: int, arc: bool, num_threads: int, /,
    ) -> None: ...

def interpolate_forward(call: Interpolate, out: int, partial: int, /) -> None: ...
def interpolate_backward(
    call: Interpolate, start: int, end: int, weights: int, vectors: int, partial: int, /
) -> None: ...

_Segments = tuple[int, int, int]        # pointer, elements from a row and from a segment to the next

class Latent:
    def __init__(
        self, rows: int, segments: int, run: int, dtype: int, mean: _Segments, logvar: _Segments,
        prior_mean: _Segments, prior_logvar: _Segments, noise: _Segments, noise_draw: int, keys: _Keys | None,
        keys_per_row: bool, clamp_low: float, clamp_high: float, samples: int, antithetic: bool, terms: int,
        beta: float, free_bits: float, num_threads: int, /,
    ) -> None: ...

def latent_forward(call: Latent, z: int, first: int, second: int, partial: int, /) -> None: ...
def latent_backward(
    call: Latent, grad_z: _Segments, z_sample: int, grad_first: int, grad_second: int, mean: _Segments,
    logvar: _Segments, prior_mean: _Segments, prior_logvar: _Segments, noise: int, /,
) -> None: ...

def denoise_step(
    batch: int, length: int, dtype: int, model_dtype: int, sample: _Rows, model: _Rows, cond: _Rows, noise: _Rows,
    known: _Rows, mask: tuple[int, bool, int, int], table: tuple[int, int, int], step: _Key,
    guidance: tuple[float, int, int], seed: _Key, keys_per_row: bool, state: int, out: _Rows, num_threads: int, /,
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
