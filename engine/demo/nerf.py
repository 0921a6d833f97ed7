"""A radiance field of a small scene: a voxel grid trained through the compositing of its samples, then a turntable.

Both sides train from the same start on the same rays, step by step in turn; frames are compared on one set of weights.
"""
from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import composite
from . import pictures, scene
from .workload import Bar, Figure, Result, Side, Stopwatch, Time

NAME = "nerf"
TOLERANCE = 1e-3
_DISTORTION = 1e-3      # weight of the distortion loss, against haze (Barron et al., 2022)


@dataclass(frozen=True)
class Size:
    views: int = 30         # that are learned from
    view: int = 64          # pixels of their side
    truth: int = 192        # quadrature samples a ray
    grid: int = 64
    steps: int = 140
    rays: int = 4096        # a step
    samples: int = 64       # a ray, in training
    frames: int = 24
    frame: int = 112
    frame_samples: int = 128


QUICK = Size(views=3, view=16, truth=48, grid=16, steps=3, rays=128, samples=16, frames=2, frame=16, frame_samples=24)

# (sigmas [R,S], colours [R,S,3], starts [R,S], ends [R,S], background [3]) -> colours [R,3], depth [R], opacity [R],
# distortion [R]
Composite = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor, Tensor, Tensor | None]]


def stock_composite(
    sigmas: Tensor, colors: Tensor, starts: Tensor, ends: Tensor, background: Tensor, distortion: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    tau = sigmas * (ends - starts)
    weights = torch.exp(tau - tau.cumsum(dim=1)) * -torch.expm1(-tau)
    middle = (starts + ends) / 2
    opacity = weights.sum(dim=1)
    color = torch.einsum("rs,rsc->rc", weights, colors) + (1 - opacity)[:, None] * background
    depth = (weights * middle).sum(dim=1)
    if not distortion:
        return color, depth, opacity, None
    moment = weights * middle
    before, moment_before = weights.cumsum(dim=1) - weights, moment.cumsum(dim=1) - moment
    pairs = 2 * (weights * (middle * before - moment_before)).sum(dim=1)
    return color, depth, opacity, pairs + (weights.square() * (ends - starts)).sum(dim=1) / 3


def onepass_composite(
    sigmas: Tensor, colors: Tensor, starts: Tensor, ends: Tensor, background: Tensor, distortion: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    out = composite(sigmas, colors, starts, ends, background=background, distortion=distortion)
    return out.features, out.depth, out.opacity, out.distortion if distortion else None


class VoxelField(nn.Module):
    """Density and colour at points of the cube, by linear interpolation in a grid."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.grid = nn.Parameter(torch.zeros(1, 4, size, size, size))

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        raw = F.grid_sample(self.grid, points.reshape(1, 1, 1, -1, 3), align_corners=True).reshape(4, -1)
        raw = raw.reshape(4, *points.shape[:-1])
        return 25 * F.softplus(raw[0] - 4), torch.sigmoid(raw[1:]).movedim(0, -1).contiguous()


@dataclass
class Trainee:
    """One side: its compositing, its field and its times."""

    composite: Composite
    field: VoxelField
    optimizer: torch.optim.Optimizer
    steps: list[tuple[float, float]] = field(default_factory=list)      # (whole, op) seconds each
    frames: list[tuple[float, float]] = field(default_factory=list)

    def side(self) -> Side:
        """A step's time and a frame's, times how many there are of them."""
        step, frame = ([Time.of(column) for column in zip(*rows, strict=True)] for rows in (self.steps, self.frames))
        return Side(*(a * len(self.steps) + b * len(self.frames) for a, b in zip(step, frame, strict=True)))


def _edges(origins: Tensor, directions: Tensor, samples: int, jitter: Tensor | None) -> Tensor:
    """Bounds [R, samples + 1] of the samples on each ray's part in the cube, moved by `jitter` [R, samples]."""
    near, far = scene.span(origins, directions)
    at = torch.linspace(0, 1, samples + 1, device=origins.device).expand(len(origins), -1)
    if jitter is not None:
        at = torch.cat((at[:, :1], at[:, 1:-1] + (jitter[:, 1:] - 0.5) / samples, at[:, -1:]), dim=1)
    return near[:, None] + (far - near)[:, None] * at


def _points(origins: Tensor, directions: Tensor, edges: Tensor) -> Tensor:
    middle = (edges[:, 1:] + edges[:, :-1]) / 2
    return torch.addcmul(origins[:, None], middle[..., None], directions[:, None])


def _truth(origins: Tensor, directions: Tensor, samples: int, background: Tensor) -> Tensor:
    """The scene's own colours [R, 3], by dense quadrature; many small steps, which threads would only wait for."""
    colors = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for o, d in zip(origins.split(1024), directions.split(1024), strict=True):
        edges = _edges(o, d, samples, None)
        density, color = scene.density_and_color(_points(o, d, edges))
        colors.append(stock_composite(density, color, edges[:, :-1], edges[:, 1:], background, False)[0])
    torch.set_num_threads(threads)
    return torch.cat(colors)


def _train_step(
    one: Trainee, origins: Tensor, directions: Tensor, target: Tensor, jitter: Tensor, background: Tensor
) -> None:
    whole, op = Stopwatch(origins.device), Stopwatch(origins.device)
    with whole:
        edges = _edges(origins, directions, jitter.shape[1], jitter)
        sigmas, colors = one.field(_points(origins, directions, edges))
        # The graph is cut at the op's inputs, so that its backward can be timed apart from the field's.
        inputs = sigmas.detach().requires_grad_(), colors.detach().requires_grad_()
        with op:
            color, _, _, distortion = one.composite(*inputs, edges[:, :-1], edges[:, 1:], background, True)
            assert distortion is not None
            loss = F.mse_loss(color, target) + _DISTORTION * distortion.mean()
            gradients = torch.autograd.grad(loss, inputs)
        one.optimizer.zero_grad()
        torch.autograd.backward((sigmas, colors), gradients)
        one.optimizer.step()
    one.steps.append((whole.seconds, op.seconds))


@torch.inference_mode()
def _render(
    one: Trainee, model: VoxelField, origins: Tensor, directions: Tensor, samples: int, background: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(colours [R, 3], depth [R], opacity [R]) of `model` through this side's compositing."""
    whole, op = Stopwatch(origins.device), Stopwatch(origins.device)
    with whole:
        edges = _edges(origins, directions, samples, None)
        sigmas, colors = model(_points(origins, directions, edges))
        with op:
            color, depth, opacity, _ = one.composite(sigmas, colors, edges[:, :-1], edges[:, 1:], background, False)
    one.frames.append((whole.seconds, op.seconds))
    return color, depth, opacity


def _psnr(a: Tensor, b: Tensor) -> float:
    return -10 * math.log10(max(F.mse_loss(a, b).item(), 1e-12))


def _views(count: int, size: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Cameras on a spiral, from the horizon up."""
    golden = math.pi * (3 - math.sqrt(5))
    places = [(i * golden, math.radians(8 + 55 * (i + 0.5) / count)) for i in range(count)]
    rays = (scene.camera_rays(*place, size) for place in places)
    return [(origins.to(device), directions.to(device)) for origins, directions in rays]


def run(device: torch.device, bar: Bar, quick: bool = False) -> Result:
    size = QUICK if quick else Size()
    background = torch.tensor(scene.BACKGROUND, device=device)
    bar.start(size.views + size.steps + size.frames + 1)

    views = _views(size.views, size.view, device)
    seen = []
    for origins, directions in views:
        seen.append(_truth(origins, directions, size.truth, background))
        bar.tick()
    origins, directions, target = torch.cat([o for o, _ in views]), torch.cat([d for _, d in views]), torch.cat(seen)

    trainees = []
    for way in (stock_composite, onepass_composite):
        model = VoxelField(size.grid).to(device)
        trainees.append(Trainee(way, model, torch.optim.Adam(model.parameters(), lr=0.3, betas=(0.9, 0.95))))
    stock, onepass = trainees
    generator = torch.Generator().manual_seed(0)
    for step in range(size.steps):
        for trainee in trainees:
            trainee.optimizer.param_groups[0]["lr"] = 0.3 * 0.05 ** (step / size.steps)
        rows = torch.randint(len(origins), (size.rays,), generator=generator).to(device)
        jitter = torch.rand(size.rays, size.samples, generator=generator).to(device)
        for trainee in (stock, onepass) if step % 2 == 0 else (onepass, stock):
            _train_step(trainee, origins[rows], directions[rows], target[rows], jitter, background)
        bar.tick()

    film, error = [], 0.0
    for i in range(size.frames):
        rays = scene.camera_rays(2 * math.pi * i / size.frames, math.radians(26), size.frame)
        eye, ahead = (part.to(device) for part in rays)
        order = (stock, onepass) if i % 2 == 0 else (onepass, stock)
        pair = {id(one): _render(one, onepass.field, eye, ahead, size.frame_samples, background) for one in order}
        error = max(error, (pair[id(stock)][0] - pair[id(onepass)][0]).abs().max().item())
        color, depth, opacity = pair[id(onepass)]
        near, far = scene.span(eye, ahead)
        part = (depth / opacity.clamp_min(1e-3) - near.min()) / (far.max() - near.min())
        nearness = (opacity * (1 - part.clamp(0, 1)))[:, None].expand(-1, 3)
        film.append(torch.cat([x.reshape(size.frame, size.frame, 3) for x in (color, nearness)], dim=1))
        bar.tick()

    eye, ahead = (part.to(device) for part in scene.camera_rays(0.35, math.radians(33), size.frame))
    truth = _truth(eye, ahead, size.truth, background)
    sides = stock.side(), onepass.side()
    new = [_render(one, one.field, eye, ahead, size.frame_samples, background)[0] for one in trainees]
    psnr = [_psnr(picture, truth) for picture in new]
    bar.tick()
    sheet = torch.stack([x.reshape(size.frame, size.frame, 3) for x in (truth, *new)])
    step_ms = [statistics.median(whole for whole, _ in one.steps) * 1e3 for one in trainees]
    frame_ms = [statistics.median(whole for whole, _ in one.frames) * 1e3 for one in trainees]
    return Result(
        name=NAME,
        what=f"a {size.grid}^3 grid trained for {size.steps} steps of {size.rays} rays x {size.samples} samples "
             f"and {size.frames} frames of a turntable rendered at {size.frame} x {size.frame} x {size.frame_samples}",
        op="composite",
        stock=sides[0],
        onepass=sides[1],
        agrees=error < TOLERANCE,
        agreement=f"within {error:.0e}",
        notes=[
            f"Frames of one set of weights differ by {error:.1e} at most. Trained through either side, a view that was "
            f"not learned from has {psnr[0]:.2f} dB (stock) and {psnr[1]:.2f} dB (onepass).",
            f"A training step takes {step_ms[0]:.1f} ms stock and {step_ms[1]:.1f} ms with onepass, a frame "
            f"{frame_ms[0]:.1f} and {frame_ms[1]:.1f} ms.",
            "The op is compositing with the distortion loss, forward and backward in training, forward in frames. "
            "Times are medians of a step and a frame, times their numbers.",
        ],
        figures=[
            Figure("Turntable", "Left: colour. Right: depth, near is bright.",
                   pictures.film(torch.stack(film), 80), "image/png", width=2 * 224),
            Figure("A view that was not learned from",
                   f"The scene itself; trained through stock ({psnr[0]:.1f} dB); through onepass ({psnr[1]:.1f} dB).",
                   pictures.grid(sheet, 3, 2 * size.frame), "image/png"),
        ],
    )
