"""denoise_step on every backend: values, noise, history, inpainting, batches, views and instruction sets."""
from __future__ import annotations

import math

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

import onepass
from onepass import denoise_step, plans
from onepass.plans import Row

import cases
from denoise_rows import NOISE, PLAN, ROWS, inputs, plain_batch, plan_of
from helpers import (
    ALL_BACKENDS,
    INTERPRETED,
    ISAS,
    KERNELS,
    assert_as_good_as_torch,
    device_of,
    run_python,
)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("shape", [shape for shape in cases.LATENTS if math.prod(shape)])
def test_values(shape, dtype, backend):
    device = device_of(backend)
    x, u, c, z, known, state, mask = inputs(shape, dtype, device=device)
    steps = torch.arange(shape[0], device=device) % len(ROWS)
    guidance = torch.linspace(0, 3, shape[0]).to(device)        # the first row has none
    mine, same = state.clone(), state.clone()
    wide = [t.double() for t in (x, u, c, z, known, state, mask)]
    got = denoise_step(x, (u, c), PLAN.to(device), steps, state=mine, guidance=guidance, noise=z, mask=mask,
                       known=known, backend=backend)
    truth = plain_batch(wide, steps.tolist(), guidance.tolist())
    eager = plain_batch((x, u, c, z, known, same, mask), steps.tolist(), guidance.tolist())
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert_as_good_as_torch(got, eager, truth, "prev")
    assert_as_good_as_torch(mine, same, wide[5], "state")


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("row", range(len(ROWS)))
def test_an_int_is_that_step_for_every_row(row, backend):
    device = device_of(backend)
    x, u, c, z, _, state, _ = inputs((3, 2, 5, 11), device=device)
    results = []
    for step in (row, torch.tensor(row, device=device), torch.full((3,), row, device=device)):
        mine = state.clone()
        results.append((denoise_step(x, torch.cat((u, c)), PLAN.to(device), step, state=mine, guidance=2.5, noise=z,
                                     backend=backend), mine))
    for prev, mine in results[1:]:
        assert torch.equal(prev, results[0][0])
        assert torch.equal(mine, results[0][1])


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_half_precision_models_with_float32_samples(backend):
    x, m, *_ = inputs((3, 4, 9, 5), device=device_of(backend))
    plan = plans.ddim(10, clip_sample=False).to(x.device)
    for dtype in cases.FLOATS:
        got = denoise_step(x, m.to(dtype), plan, 4, backend=backend)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, denoise_step(x, m.to(dtype).float(), plan, 4, backend="reference"))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("shape", [(5, 3, 7, 9), (4, 5003), (6, 1), (3, 4, 16, 16)])
def test_noise_is_that_of_the_recipe(shape, backend):
    device = device_of(backend)
    zero = torch.zeros(shape, device=device)
    plan = plan_of(Row(z=1.0, number=11), Row(z=1.0, number=4)).to(device)
    seeds = torch.arange(shape[0], device=device) * 2**40 - 3
    expected = lambda **k: onepass.rng.normal(shape, device=device, backend="reference", **k)
    got = denoise_step(zero, zero, plan, 0, seed=seeds, backend=backend)
    assert torch.equal(got, expected(seed=seeds, stream=NOISE + 11))
    for seed in (77, torch.tensor(77, device=device)):          # one seed: the batch is one row of numbers
        got = denoise_step(zero, zero, plan, 1, seed=seed, backend=backend)
        assert torch.equal(got, expected(seed=77, stream=NOISE + 4))
    steps = torch.arange(shape[0], device=device) % 2           # each row keeps its place in it, on its own stream
    got = denoise_step(zero, zero, plan, steps, seed=77, backend=backend)
    whole = [expected(seed=77, stream=NOISE + n) for n in (11, 4)]
    assert torch.equal(got, torch.stack([whole[i % 2][i] for i in range(shape[0])]))
    for dtype in (torch.bfloat16, torch.float16):
        half = denoise_step(zero.to(dtype), zero.to(dtype), plan, 0, seed=seeds, backend=backend)
        assert torch.equal(half, expected(seed=seeds, stream=NOISE + 11, dtype=dtype))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_a_missing_seed_is_drawn_from_torch_where_the_plan_needs_one(backend):
    zero = torch.zeros(2, 300, device=device_of(backend))
    plan = plan_of(Row(z=1.0)).to(zero.device)
    torch.manual_seed(3)
    first, second = (denoise_step(zero, zero, plan, 0, backend=backend) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(denoise_step(zero, zero, plan, 0, backend=backend), first)
    state = torch.get_rng_state()
    denoise_step(zero, zero, plans.ddim(4).to(zero.device), 0, backend=backend)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_rows_do_not_depend_on_the_batch_or_the_threads(backend):
    device = device_of(backend)
    x, u, c, _, known, state, mask = inputs((8, 3, 37, 41), device=device)
    steps, seeds = torch.arange(8, device=device), torch.arange(8, device=device) + 2**33
    plan, guidance = PLAN.to(device), torch.linspace(0, 4, 8).to(device)

    def run(rows):
        mine = state[rows].clone()
        prev = denoise_step(x[rows], (u[rows], c[rows]), plan, steps[rows], state=mine, guidance=guidance[rows],
                            seed=seeds[rows], mask=mask[rows], known=known[rows], backend=backend)
        return prev, mine

    whole = run(slice(None))
    assert all(map(torch.equal, run(slice(None)), whole))
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3) if backend == "cpu" else (threads,):
            torch.set_num_threads(n)
            for b in range(8):
                alone = run(slice(b, b + 1))
                assert torch.equal(alone[0][0], whole[0][b])
                assert torch.equal(alone[1][0], whole[1][b])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_a_batch_mixes_samplers_late_joins_and_guidance(backend):
    """Requests of three samplers, admitted at different times, give what each gives alone."""
    device = device_of(backend)
    single = [plan.to(device) for plan in (plans.dpmpp_2m(6), plans.ddpm(5), plans.euler_ancestral(4))]
    whole = (plans.dpmpp_2m(6) + plans.ddpm(5) + plans.euler_ancestral(4)).to(device)
    start = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(5)).to(device)
    seeds, weights = torch.tensor([4, 5, 6], device=device), torch.tensor([1.0, 0.0, 5.0], device=device)
    model = lambda x: (torch.sin(x), torch.cos(2 * x))
    alone = []
    for k, plan in enumerate(single):
        x, state = start[k : k + 1], plan.new_state(start[k : k + 1])
        for i in range(len(plan)):
            x = denoise_step(x, model(plan.scale_input(x, i)), plan, i, state=state, guidance=float(weights[k]),
                             seed=seeds[k : k + 1], backend=backend)
        alone.append(x[0])
    x, state, done, joined = start.clone(), whole.new_state(start), [0, 0, 0], (0, 2, 1)
    lengths = [6, 5, 4]
    for tick in range(8):
        rows = [k for k in range(3) if joined[k] <= tick and done[k] < lengths[k]]
        if not rows:
            continue
        steps = torch.tensor([whole.offsets[k] + done[k] for k in rows], device=device)
        part = state[rows]
        x[rows] = denoise_step(x[rows], model(whole.scale_input(x[rows], steps)), whole, steps, state=part,
                               guidance=weights[rows], seed=seeds[rows], backend=backend)
        state[rows] = part
        for k in rows:
            done[k] += 1
    assert done == lengths
    for k in range(3):
        assert torch.equal(x[k], alone[k])


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_operands_whose_coefficient_is_zero_are_not_read(backend):
    device = device_of(backend)
    x, u, c, z, known, state, _ = inputs((2, 3, 33), device=device)
    nan = torch.full_like(x, math.nan)
    poisoned = torch.full_like(state, math.nan)
    run = lambda row, **k: denoise_step(plan=PLAN.to(device), step=row, **{
        "sample": x, "model_output": (u, c), "guidance": 3.0, "state": poisoned.clone(), "noise": nan,
        "backend": backend, **k})
    assert run(0).isfinite().all()                                              # no history, no noise
    assert run(6, sample=nan).isfinite().all()
    assert torch.equal(run(5, sample=nan, model_output=(nan, nan), noise=z), z)
    assert torch.equal(run(0, model_output=(nan, c), guidance=1.0), run(0, model_output=(c, c)))
    assert torch.equal(run(0, model_output=(u, nan), guidance=0.0), run(0, model_output=(u, u)))
    half = state.clone()
    half[:, 0] = math.nan
    assert run(7, state=half).isfinite().all()
    assert run(3, state=(mine := torch.stack((state[:, 0], nan), 1))).isfinite().all()
    assert mine[:, 0].isfinite().all()
    assert mine[:, 1].isnan().all()
    for kind in (torch.bool, torch.float32):
        mask = torch.ones(2, 3, 33, dtype=kind, device=device)
        assert torch.equal(run(0, mask=mask, known=nan), run(0))
        assert torch.equal(run(0, sample=nan, mask=~mask if kind == torch.bool else 0 * mask, known=known), known)
    kept = torch.zeros(2, 1, 3, 33, device=device)     # p is 0: only prev is lost with x
    plan = plan_of(Row(x=0.5, q=1.0, slot=0, history=(0.0,))).to(device)
    denoise_step(nan, u, plan, 0, state=kept, backend=backend)
    assert torch.equal(kept[:, 0], u)
    assert run(1, sample=nan).isnan().all()                                     # but what is read is not hidden
    clamped = plan_of(Row(u=1.0, p=1.0, limit=0.5)).to(device)
    assert denoise_step(nan, u, clamped, 0, backend=backend).isnan().all()


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_mask_of_ones_changes_no_bit(prediction, backend):
    """With and without a mask a kernel may take different loops; the clamp, its coefficients of 0, Inf and NaN."""
    device = device_of(backend)
    plan = plans.ddim(5, prediction_type=prediction).to(device)
    x, u, c, _, known, _, _ = inputs((5, 3, 23, 31), device=device)
    x[:, 0, 0, :3] = x.new_tensor([math.inf, -math.inf, math.nan])
    u[:, 0, 0, 3:6] = x.new_tensor([math.inf, -math.inf, math.nan])
    steps, ones = torch.arange(5, device=device), torch.ones_like(x, dtype=torch.bool)
    for model in (u, (u, c)):
        guidance = None if model is u else 2.5
        plain = denoise_step(x, model, plan, steps, guidance=guidance, backend=backend)
        masked = denoise_step(x, model, plan, steps, guidance=guidance, mask=ones, known=known, backend=backend)
        assert torch.equal(plain.nan_to_num(7.0), masked.nan_to_num(7.0))
        assert torch.equal(plain.isnan(), masked.isnan())


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [
    (3, 4, 41, 53), (3, 1, 41, 53), (1, 1, 41, 53), (41, 53), (4, 41, 1),       # a row is several tiles
    (3, 4, 10, 13), (3, 1, 10, 13), (1, 1, 10, 13), (10, 13), (4, 1, 1), (3, 1, 1, 1), (1, 13), (4, 1, 13), (),
])
def test_masks_broadcast(shape, kind, backend):
    device = device_of(backend)
    x, m, _, _, known, _, _ = inputs((3, 4, 41, 53) if 41 in shape else (3, 4, 10, 13), device=device)
    mask = (torch.rand(shape) * 2 - 0.5).clamp(0, 1).to(device)
    mask = (mask > 0.5) if kind == torch.bool else mask.to(kind)
    plan = plans.flow_match_euler(4).to(device)
    got = denoise_step(x, m, plan, 1, mask=mask, known=known, backend=backend)
    step = denoise_step(x, m, plan, 1, backend=backend)
    weight = mask.float()
    torch.testing.assert_close(got, weight * step + (1 - weight) * known)


@pytest.mark.parametrize("backend", KERNELS)
@settings(deadline=None, max_examples=15 if INTERPRETED else 40)
@given(data=st.data())
def test_views_and_strides(backend, data):
    """Chunks of one tensor, permuted dims, expanded and offset views: the values of their contiguous copies."""
    shape = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    order = data.draw(st.permutations(range(len(shape))))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    base = torch.randn([4, *(s + data.draw(st.integers(0, 3)) for s in shape)], generator=g)
    base, plan = base.to(device_of(backend)), PLAN.to(device_of(backend))
    crop = tuple(slice(b - s, b) for s, b in zip(shape, base.shape[1:], strict=True))
    x, m, z, known = (base[i][crop].permute(order) for i in range(4))
    if data.draw(st.booleans()):
        m = m[:1].expand_as(m)
    state = torch.randn(x.shape[0], PLAN.slots, *x.shape[1:], generator=g).to(base.device)
    copies = state.clone()
    step = data.draw(st.integers(0, len(ROWS) - 1))
    mask = torch.rand(x.shape[-1:], generator=g).to(base.device)
    got = denoise_step(x, m, plan, step, state=state, noise=z, mask=mask, known=known, backend=backend)
    x, m, z, known = (t.contiguous() for t in (x, m, z, known))
    expected = denoise_step(x, m, plan, step, state=copies, noise=z, mask=mask, known=known, backend=backend)
    assert torch.equal(got, expected)
    assert torch.equal(state, copies)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("shape", [shape for shape in cases.LATENTS if not math.prod(shape)])
def test_empty_batches_and_samples(shape, backend):
    x = torch.zeros(shape, device=device_of(backend))
    plan = PLAN.to(x.device)
    state = plan.new_state(x)
    steps = torch.zeros(shape[0], dtype=torch.int64, device=x.device)
    got = denoise_step(x, torch.cat((x, x)), plan, steps, state=state, guidance=2.0, seed=1,
                       mask=x.new_ones(1, dtype=torch.bool), known=x, backend=backend)
    assert got.shape == shape


ISA_CODE = """
import torch, denoise_rows as t
from onepass import _native, denoise_step
assert _native._C.isa == {isa!r}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    x, u, c, z, known, state, mask = t.inputs((8, 3, 23, 31), dtype)
    kwargs = dict(guidance=torch.linspace(0, 3, 8), mask=mask, known=known)
    for extra in (dict(noise=z), dict(seed=9), dict(seed=torch.arange(8))):
        states = [state.clone() for _ in range(2)]
        a, b = (denoise_step(x, (u, c), t.PLAN, torch.arange(8), state=s, backend=k, **kwargs, **extra)
                for s, k in zip(states, ("cpu", "reference")))
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(*states)
    plan = t.plan_of(t.Row(z=1.0))
    zero = torch.zeros(3, 1031, dtype=dtype)
    assert torch.equal(*(denoise_step(zero, zero, plan, 0, seed=5, backend=k) for k in ("cpu", "reference")))
print("ok")
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    path = {"PYTHONPATH": __file__.rpartition("/")[0]}
    assert run_python(ISA_CODE.format(isa=isa), ONEPASS_CPU_ISA=isa, **path).strip() == "ok"
