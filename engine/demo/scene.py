"""A small scene as density and colour in the cube [-1, 1]^3, z up, and cameras around it: what the NeRF learns from."""
from __future__ import annotations

import math

import torch
from torch import Tensor

BACKGROUND = (1.0, 1.0, 1.0)
_EDGE = 0.01        # over which a surface's density rises
_LIGHT = (0.36, -0.48, 0.8)


def _length(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return (x * x + y * y + z * z).sqrt().clamp_min(1e-9)


def _ball(x: Tensor, y: Tensor, z: Tensor, centre: tuple[float, float, float], radius: float) -> tuple[Tensor, Tensor]:
    """(signed distance, cosine of the normal with the light)."""
    dx, dy, dz = x - centre[0], y - centre[1], z - centre[2]
    length = _length(dx, dy, dz)
    return length - radius, (dx * _LIGHT[0] + dy * _LIGHT[1] + dz * _LIGHT[2]) / length


def _box(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """A cube of half side 0.26, turned by 30 degrees about the vertical."""
    c, s = math.cos(math.pi / 6), math.sin(math.pi / 6)
    dx, dy, dz = x - 0.42, y - 0.38, z + 0.43
    ux, uy, uz = c * dx + s * dy, c * dy - s * dx, dz
    ax, ay, az = ux.abs(), uy.abs(), uz.abs()
    far = torch.maximum(torch.maximum(ax, ay), az)
    lx, ly = c * _LIGHT[0] + s * _LIGHT[1], c * _LIGHT[1] - s * _LIGHT[0]
    cosine = torch.where(far == ax, lx * ux.sign(), torch.where(far == ay, ly * uy.sign(), _LIGHT[2] * uz.sign()))
    return far - 0.26, cosine


def _ring(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """A torus that stands upright in the plane y = 0.1."""
    dx, dy, dz = x + 0.05, y - 0.1, z - 0.25
    around = (dx * dx + dz * dz).sqrt().clamp_min(1e-9)
    out = around - 0.42
    length = _length(out, dy, torch.zeros_like(dy))
    nx, nz = dx / around * out, dz / around * out
    return length - 0.09, (nx * _LIGHT[0] + dy * _LIGHT[1] + nz * _LIGHT[2]) / length


def _floor(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """A disc, 0.08 thick."""
    return torch.maximum((z + 0.73).abs() - 0.04, (x * x + y * y).sqrt() - 0.95), torch.full_like(x, _LIGHT[2])


def density_and_color(points: Tensor) -> tuple[Tensor, Tensor]:
    """Per unit length [...], and colour in [0, 1] [..., 3], at `points` [..., 3]."""
    x, y, z = points.unbind(-1)
    checker = ((x * 4).floor() + (y * 4).floor()).remainder(2)[..., None]
    tile = torch.lerp(points.new_tensor((0.20, 0.22, 0.27)), points.new_tensor((0.88, 0.87, 0.83)), checker)
    solids = (
        (_floor(x, y, z), tile, 80.0),
        (_ball(x, y, z, (-0.42, -0.30, -0.33), 0.36), points.new_tensor((0.86, 0.22, 0.18)), 80.0),
        (_ball(x, y, z, (0.36, -0.44, -0.50), 0.19), points.new_tensor((0.20, 0.62, 0.34)), 80.0),
        (_box(x, y, z), points.new_tensor((0.95, 0.72, 0.20)), 80.0),
        (_ring(x, y, z), points.new_tensor((0.22, 0.42, 0.85)), 80.0),
        (_ball(x, y, z, (-0.05, 0.10, 0.25), 0.24), points.new_tensor((0.72, 0.45, 0.85)), 5.0),   # a haze
    )
    density = torch.zeros_like(x)
    color = torch.zeros_like(points)
    for (distance, cosine), base, peak in solids:
        part = peak * torch.sigmoid(distance / -_EDGE)
        density += part
        color += (part * (0.55 + 0.45 * cosine.clamp_min(0)))[..., None] * base
    return density, color / density.clamp_min(1e-6)[..., None]


def camera_rays(
    azimuth: float,     # radians about the vertical
    elevation: float,   # radians above the horizon
    size: int,          # pixels of the square picture's side
) -> tuple[Tensor, Tensor]:
    """(origins, unit directions), each [size * size, 3], of a camera that looks at the scene from outside the cube."""
    aim = torch.tensor((0.0, 0.0, -0.22))
    out = torch.tensor(
        (math.cos(azimuth) * math.cos(elevation), math.sin(azimuth) * math.cos(elevation), math.sin(elevation))
    )
    eye = aim + 3.1 * out
    right = torch.tensor((-math.sin(azimuth), math.cos(azimuth), 0.0))
    up = torch.linalg.cross(out, right)
    at = (torch.arange(size) + 0.5) / size * 2 - 1
    v, u = torch.meshgrid(-at, at, indexing="ij")
    spread = math.tan(math.radians(22))
    directions = -out + spread * (u[..., None] * right + v[..., None] * up)
    directions = torch.nn.functional.normalize(directions.reshape(-1, 3), dim=1)
    return eye.expand_as(directions), directions


def span(origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Where each ray enters and leaves the cube [n], from the slabs; a ray that misses it gets an empty interval."""
    inverse = 1 / torch.where(directions.abs() < 1e-9, 1e-9, directions)
    a, b = (-1 - origins) * inverse, (1 - origins) * inverse
    near = torch.minimum(a, b).amax(dim=1)
    far = torch.maximum(a, b).amin(dim=1)
    return near, torch.maximum(far, near)
