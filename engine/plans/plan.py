"""The table of coefficients that every sampler is reduced to."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# Columns of the table; those of the history follow. csrc/include/onepass/denoise.h has the same list.
X, M, U, Z, P, Q, LIMIT, SLOT, NUMBER, HISTORY = range(10)
MAX_SLOTS = 8


class Row(NamedTuple):
    """One step:  u = clamp(p x + q m, -limit, limit);  prev = x X + m M + u U + z Z + sum_j history[j] h_j.

    Afterwards h_slot = u, where `slot` is not -1. An operand whose coefficient is exactly 0 is not read.
    """

    x: float = 0.0                        # of the sample
    m: float = 0.0                        # of the model's output
    u: float = 0.0                        # of the remembered quantity, usually the predicted clean sample
    z: float = 0.0                        # of the noise
    p: float = 0.0                        # of the sample within u
    q: float = 0.0                        # of the model's output within u
    limit: float = math.inf               # of |u|
    slot: int = -1                        # of the history, where u is kept for later rows
    number: int = 0                       # of the step within its own schedule: keys the noise
    history: tuple[float, ...] = ()       # of each slot, as it was before this step


class Level(NamedTuple):
    """How noisy a sample is: signal * clean + noise * N(0, 1)."""

    signal: float
    noise: float


@dataclass(frozen=True, eq=False)
class DenoisePlan:
    """The steps of one sampler, or of several (`a + b`), for `denoise_step`. Immutable: threads may share one.

    Row i of every field belongs to step i. What changes from step to step is kept outside, see `new_state`.
    """

    table: Tensor                         # [rows, 9 + slots] float64: Row, the history spread over the last columns
    timesteps: Tensor                     # [rows] int64 or float32: what the model is told
    input_scale: Tensor                   # [rows] float64: the model sees input_scale * sample
    levels: Tensor                        # [rows, 4] float64: Level of the sample before and after the step
    names: tuple[str, ...]                # of the samplers, in order
    offsets: tuple[int, ...]              # the row at which each of them starts
    init_noise_sigmas: tuple[float, ...]  # of each: the standard deviation of the first sample of its schedule
    slots: int                            # of history in the state
    stochastic: bool                      # whether any row adds noise

    @staticmethod
    def build(
        name: str,
        rows: Sequence[Row],
        timesteps: Tensor,                # [len(rows)]
        levels: Sequence[Level],          # [len(rows) + 1]: before each step, and after the last
        *,
        input_scale: Sequence[float] | None = None,
        init_noise_sigma: float = 1.0,
    ) -> DenoisePlan:
        """A plan out of rows of your own. Raises ValueError where lengths differ or a coefficient is not finite."""
        if not rows:
            raise ValueError("rows is empty, expected one Row per step")
        if len(timesteps) != len(rows) or len(levels) != len(rows) + 1:
            raise ValueError(f"timesteps and levels have lengths {len(timesteps)} and {len(levels)}, "
                             f"expected {len(rows)} and {len(rows) + 1} for {len(rows)} rows")
        slots = max(len(row.history) for row in rows)
        if slots > MAX_SLOTS:
            raise ValueError(f"rows have {slots} slots of history, expected at most {MAX_SLOTS}")
        for i, row in enumerate(rows):
            if not all(map(math.isfinite, (row.x, row.m, row.u, row.z, row.p, row.q, *row.history))):
                raise ValueError(f"{name}: step {i} (timestep {timesteps[i].item():g}) has a coefficient that is not "
                                 f"finite, {row}: at zero signal epsilon says nothing of the clean sample, "
                                 "take prediction_type 'v' or 'sample'")
            if not row.limit >= 0:
                raise ValueError(f"{name}: step {i} has limit {row.limit}, expected a number >= 0 or inf")
            if not -1 <= row.slot < slots:
                raise ValueError(f"{name}: step {i} has slot {row.slot}, expected -1 .. {slots - 1}")
        table = [(*row[:HISTORY], *row.history, *[0.0] * (slots - len(row.history))) for row in rows]
        scale = [1.0] * len(rows) if input_scale is None else list(input_scale)
        return DenoisePlan(
            table=torch.tensor(table, dtype=torch.float64),
            timesteps=timesteps,
            input_scale=torch.tensor(scale, dtype=torch.float64),
            levels=torch.tensor([(*a, *b) for a, b in pairwise(levels)], dtype=torch.float64),
            names=(name,),
            offsets=(0,),
            init_noise_sigmas=(float(init_noise_sigma),),
            slots=slots,
            stochastic=any(row.z != 0 for row in rows),
        )

    def __len__(self) -> int:
        return self.table.shape[0]

    def __repr__(self) -> str:
        parts = ", ".join(f"{name} at {offset}" for name, offset in zip(self.names, self.offsets, strict=True))
        return (f"DenoisePlan({len(self)} rows: {parts}; {self.slots} slots of history, "
                f"{'stochastic' if self.stochastic else 'deterministic'}, {self.device})")

    @property
    def device(self) -> torch.device:
        return self.table.device

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the first sample. Of several samplers that differ, see `init_noise_sigmas`."""
        if len(set(self.init_noise_sigmas)) > 1:
            raise ValueError(f"the plan joins samplers with different init_noise_sigma, {self.init_noise_sigmas}: "
                             "read init_noise_sigmas")
        return self.init_noise_sigmas[0]

    def to(self, device: torch.device | str) -> DenoisePlan:
        return dataclasses.replace(self, **{
            name: getattr(self, name).to(device) for name in ("table", "timesteps", "input_scale", "levels")})

    @staticmethod
    def concat(plans: Iterable[DenoisePlan]) -> DenoisePlan:
        """One table for several samplers, so that a batch can mix them; row r of plan k becomes offsets[k] + r.

        Timesteps become float32 unless all are int64.
        """
        joined = tuple(plans)
        if not joined:
            raise ValueError("plans is empty, expected at least one DenoisePlan")
        slots = max(plan.slots for plan in joined)
        offsets: list[int] = []
        rows = 0
        for plan in joined:
            offsets += [rows + offset for offset in plan.offsets]
            rows += len(plan)
        integral = all(plan.timesteps.dtype == torch.int64 for plan in joined)
        return DenoisePlan(
            table=torch.cat([torch.nn.functional.pad(plan.table, (0, slots - plan.slots)) for plan in joined]),
            timesteps=torch.cat([plan.timesteps if integral else plan.timesteps.float() for plan in joined]),
            input_scale=torch.cat([plan.input_scale for plan in joined]),
            levels=torch.cat([plan.levels for plan in joined]),
            names=sum((plan.names for plan in joined), ()),
            offsets=tuple(offsets),
            init_noise_sigmas=sum((plan.init_noise_sigmas for plan in joined), ()),
            slots=slots,
            stochastic=any(plan.stochastic for plan in joined),
        )

    def __add__(self, other: DenoisePlan) -> DenoisePlan:
        if not isinstance(other, DenoisePlan):
            return NotImplemented
        return DenoisePlan.concat((self, other))

    def new_state(
        self,
        sample: Tensor,                   # [B, ...]
    ) -> Tensor | None:
        """What `denoise_step` remembers between steps: [B, slots, ...] like sample, or None where nothing is.

        Row b belongs to row b of the batch: to admit or retire a request, copy or drop that row.
        """
        if self.slots == 0:
            return None
        return sample.new_zeros((sample.shape[0], self.slots, *sample.shape[1:]))

    def scale_input(
        self,
        sample: Tensor,                   # [B, ...]
        step: int | Tensor,               # rows of the plan, an int or int64 [B]
    ) -> Tensor:
        """What the model is fed at `step`: input_scale * sample, in the dtype of sample."""
        return (_column(self.input_scale[step], sample) * sample).to(sample.dtype)

    def add_noise(
        self,
        clean: Tensor,                    # [B, ...]
        noise: Tensor,                    # [B, ...] standard normal
        step: int | Tensor,               # rows of the plan, an int or int64 [B]
        *,
        after: bool = False,
    ) -> Tensor:
        """`clean` as noisy as the sample is before `step`, or after it: what `known` of denoise_step has to be."""
        level = self.levels[step][..., 2:] if after else self.levels[step][..., :2]
        signal, scale = (_column(part, clean) for part in level.unbind(-1))
        return (signal * clean + scale * noise).to(clean.dtype)


def _column(values: Tensor, like: Tensor) -> Tensor:
    """A coefficient per row (or one for all) that broadcasts against [B, ...], in fp32 or the dtype of `like`."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return values.to(dtype).reshape(-1, *[1] * (like.dim() - 1))
