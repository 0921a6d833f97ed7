"""Compositing along rays on the CPU and on CUDA devices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.volrend import DEPTHS, offsets_error
from . import _C, DTYPES, kernels, on_device, pointer

_TASK = 4096  # samples that are worth a thread of their own

_Samples = tuple[int, int, int]


class _Call:
    """The kernel's description of a call, and the tensors that it points into."""

    def __init__(
        self, sigmas: Tensor | None, features: Tensor, t_starts: Tensor, t_ends: Tensor, alphas: Tensor | None,
        ray_offsets: Tensor | None, background: Tensor | None, prefix_trans: Tensor | None, early_stop_eps: float,
        depth: str, backward: bool,
    ) -> None:
        self.held: list[Tensor] = []
        density = alphas if sigmas is None else sigmas
        assert density is not None
        self.density, self.packed = density, ray_offsets is not None
        offsets = None if ray_offsets is None else self.keep(ray_offsets.contiguous())
        self.n_rays = density.shape[0] if offsets is None else offsets.shape[0] - 1
        self.native, place = kernels(density)
        self.place: tuple[Any, ...] = ()
        if on_device(density):      # whose offsets the kernel checks
            self.place, threads, tasks = (place,), 1, 1
            n_samples = density.shape[-1]
            floats = self.native.composite_scratch(density.numel(), self.n_rays, features.shape[-1], backward)
        else:
            threads, tasks = place, max(1, min(place, density.numel() // _TASK))
            n_samples = self.longest(ray_offsets)
            floats = tasks * _C.composite_scratch(n_samples)
        scratch = self.keep(self.floats(floats))
        back = None if background is None else self.keep(background.float().contiguous())
        prefix = None if prefix_trans is None else self.keep(prefix_trans.float().contiguous())
        self.described = _C.Composite(
            self.n_rays, n_samples, features.shape[-1], pointer(offsets),
            self.samples(sigmas), self.samples(alphas), self.samples(features), self.samples(t_starts),
            self.samples(t_ends), pointer(back), 0 if back is None or back.dim() == 1 else back.shape[1],
            pointer(prefix), early_stop_eps, DEPTHS.index(depth), threads, tasks, scratch.data_ptr(),
        )

    def longest(self, ray_offsets: Tensor | None) -> int:
        """The samples of the longest ray, of offsets in host memory."""
        if ray_offsets is None:
            return self.density.shape[1]
        total = self.density.shape[0]
        longest = _C.longest_ray(ray_offsets.contiguous().data_ptr(), self.n_rays, total)
        if longest < 0:
            raise ValueError(offsets_error(ray_offsets, total))
        return longest

    def keep(self, x: Tensor) -> Tensor:
        self.held.append(x)
        return x

    def floats(self, count: int) -> Tensor:
        return self.density.new_empty(count, dtype=torch.float32)

    def samples(self, x: Tensor | None) -> _Samples:
        """A tensor of samples, copied unless it has unit stride inside a ray; one that is not there is null."""
        if x is None:
            return 0, 0, DTYPES[self.density.dtype]
        if not (x.is_contiguous() or (not self.packed and x.shape[0] and x[0].is_contiguous())):
            x = x.contiguous()
        self.keep(x)
        return x.data_ptr(), x.stride(0), DTYPES[x.dtype]

    def by_ray(self, grad: Tensor | None) -> int:
        return 0 if grad is None else self.keep(grad.float().contiguous()).data_ptr()


def forward(
    sigmas: Tensor | None, features: Tensor, t_starts: Tensor, t_ends: Tensor, alphas: Tensor | None,
    ray_offsets: Tensor | None, background: Tensor | None, prefix_trans: Tensor | None, early_stop_eps: float,
    depth: str, return_weights: bool, distortion: bool, out: tuple[Tensor | None, ...] | None = None,
) -> tuple[Tensor, ...]:
    call = _Call(
        sigmas, features, t_starts, t_ends, alphas, ray_offsets, background, prefix_trans, early_stop_eps, depth,
        backward=False,
    )
    n_rays, density = call.n_rays, call.density
    given = (None,) * 5 if out is None else out
    results = [
        x if x is not None and x.is_contiguous() else density.new_empty(shape, dtype=dtype)
        for x, shape, dtype in zip(
            given,
            (
                (n_rays, features.shape[-1]), n_rays, n_rays, density.shape if return_weights else 0,
                n_rays if distortion else 0,
            ),
            (features.dtype, t_starts.dtype, density.dtype, density.dtype, t_starts.dtype),
            strict=True,
        )
    ]
    wanted = (True, True, True, return_weights, distortion)
    if n_rays:
        pointers = [x.data_ptr() if want else 0 for x, want in zip(results, wanted, strict=True)]
        call.native.composite_forward(call.described, *pointers, *call.place)
    return tuple(r if x is None or x is r else x.copy_(r) for r, x in zip(results, given, strict=True))


def backward(
    grad_features: Tensor | None, grad_depth: Tensor | None, grad_opacity: Tensor | None, grad_weights: Tensor | None,
    grad_distortion: Tensor | None, sigmas: Tensor | None, features: Tensor, t_starts: Tensor, t_ends: Tensor,
    alphas: Tensor | None, ray_offsets: Tensor | None, background: Tensor | None, prefix_trans: Tensor | None,
    early_stop_eps: float, depth: str, needs: list[bool], out: None = None,
) -> tuple[Tensor, ...]:
    call = _Call(
        sigmas, features, t_starts, t_ends, alphas, ray_offsets, background, prefix_trans, early_stop_eps, depth,
        backward=True,
    )
    inputs = (sigmas, features, t_starts, t_ends, alphas, background, prefix_trans)
    wanted = [x if need else None for x, need in zip(inputs, needs, strict=True)]
    by_sample = [None if x is None else x.new_empty(x.shape) for x in wanted[:5]]
    # One value a channel or a ray: summed in float32, rounded at the end.
    by_ray = [None if x is None else x.new_zeros(x.shape, dtype=torch.float32) for x in wanted[5:]]
    if call.n_rays:
        left = call.floats(call.n_rays)
        call.native.composite_backward(
            call.described, call.by_ray(grad_features), call.by_ray(grad_depth), call.by_ray(grad_opacity),
            call.by_ray(grad_distortion), call.samples(grad_weights), *map(pointer, (*by_sample, *by_ray)),
            left.data_ptr(), *call.place,
        )
    rounded = (None if x is None or g is None else g.to(x.dtype) for x, g in zip(wanted[5:], by_ray, strict=True))
    return tuple(call.floats(0) if g is None else g for g in (*by_sample, *rounded))
