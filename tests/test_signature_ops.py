"""As test_signature.py, of all ops but attention: what a signature leaves out is looked at each time; what lies
otherwise than a kernel reads is copied, and nothing else."""
from __future__ import annotations

import pytest
import torch

import onepass
from onepass import _native, _ops, plans

from helpers import needs_native

pytestmark = [needs_native, pytest.mark.usefixtures("nothing_kept")]

SHAPE = (4, 6, 5)


def inputs(count, shape=SHAPE):
    torch.manual_seed(1)
    return torch.randn(count, *shape)


def every_call():
    """Results of the ops with each kind of option."""
    mean, logvar, prior_mean, prior_logvar = inputs(4)
    moments, seeds = torch.cat((mean, logvar), 1), torch.arange(4)
    prior = {"prior_mean": prior_mean[0].mT, "prior_logvar": prior_logvar[:, :1].mT}
    yield from onepass.reparameterize_kl(mean, logvar, seed=1)
    yield from onepass.reparameterize_kl(moments, seed=seeds, stream=2)
    yield from onepass.reparameterize_kl(moments.movedim(1, 2), chunk_dim=-1, seed=1, clamp=(-1.0, None), **prior)
    yield onepass.reparameterize(torch.cat((mean, logvar)), chunk_dim=0, seed=3)
    yield onepass.reparameterize(mean, logvar, noise=prior_mean, clamp=(None, 0.5))
    yield onepass.reparameterize(mean, logvar, samples=3, noise=inputs(3))
    yield from onepass.reparameterize_log_weights(moments, samples=4, antithetic=True, seed=5)
    yield onepass.reparameterize_kl(mean, logvar, beta=0.5, free_bits=0.1, reduction="none", seed=1)[1]
    for shape in (6, (), (4, 3), [4, 3]):
        yield onepass.rng.normal(shape, seed=7, stream=1, offset=2)
    yield onepass.rng.uniform((4, 3), seed=seeds, dtype=torch.bfloat16)
    yield onepass.rng.bits((5,), seed=7)
    yield onepass.rng.gumbel((4, 3), seed=7, out=torch.empty(3, 4).T)
    yield onepass.gumbel_softmax(mean, 0.5, seed=1)
    yield onepass.gumbel_softmax(mean, 0.5, dim=0, hard=True, seed=1)
    yield onepass.gumbel_softmax(mean[0, 0], seed=torch.tensor([3]))
    ddim, ddpm, multistep = plans.ddim(8), plans.ddpm(8), plans.dpmpp_2m(8)
    steps = torch.tensor([0, 3, 3, 7])
    yield onepass.denoise_step(mean, logvar, ddim, 3)
    yield onepass.denoise_step(mean, (logvar, prior_mean), ddim, steps, guidance=torch.arange(4.0))
    yield onepass.denoise_step(mean, torch.cat((logvar, prior_mean)), ddim, 2, guidance=3)
    yield onepass.denoise_step(mean, logvar, ddpm, steps, seed=seeds, mask=mean[:, :1] > 0, known=prior_mean)
    yield onepass.denoise_step(mean, logvar, ddpm, 4, noise=prior_mean, out=torch.empty(4, 5, 6).mT)
    state = multistep.new_state(mean)
    yield onepass.denoise_step(mean, logvar, multistep, 0, state=state)
    yield state
    for weight in (0.25, torch.tensor(0.5), torch.linspace(0, 1, 4, dtype=torch.float64)):
        yield onepass.lerp(mean, logvar, weight)
        yield onepass.lerp(mean, logvar.mT.contiguous().mT, weight, out=torch.empty(4, 5, 6).mT)
        yield onepass.slerp(mean, logvar, weight)
        yield onepass.slerp(mean, logvar.mT.contiguous().mT, weight, dim=1)
    yield onepass.slerp(mean, logvar, 0.5, dim=[0, -1])
    yield onepass.slerp(mean[0, 0], logvar[0, 0], 0.5)
    colors, behind = inputs(2, (4, 6, 3)).sigmoid()
    for options in ({}, {"background": behind[0, 0], "depth": "median"}, {"return_weights": True, "distortion": True}):
        yield from (x for x in onepass.composite(DENSITY, colors, TIMES, TIMES + 1, **options) if x is not None)
        yield from (x for x in onepass.composite(
            DENSITY.flatten(), colors.flatten(0, 1), TIMES.flatten(), TIMES.flatten() + 1, ray_offsets=OFFSETS,
            early_stop_eps=0.1, **options) if x is not None)


@pytest.mark.parametrize("by_attributes", [False, True])
def test_both_ways_through_a_function_agree(by_attributes):
    with onepass.use_backend("reference"):
        expected = list(every_call())
    _native._C.read_by_attributes(by_attributes)
    first, kept = list(every_call()), len(_ops._kept)
    second = list(every_call())
    assert len(_ops._kept) == kept > 20
    for got, again, reference in zip(first, second, expected, strict=True):
        assert torch.equal(got, again)
        torch.testing.assert_close(got, reference, rtol=2e-5, atol=2e-5)


MEAN, LOGVAR = inputs(2)
DENSITY, TIMES = inputs(1, (4, 6))[0].exp(), torch.arange(6.0).expand(4, 6)
OFFSETS = torch.tensor([0, 5, 5, 20, 24])
PLAN, MULTISTEP = plans.ddim(8), plans.dpmpp_2m(8)
STATE = MULTISTEP.new_state(MEAN)
BAD = {
    "rng.normal": (lambda **o: onepass.rng.normal(**{"shape": (4, 3), "seed": 1} | o), [
        {"shape": (4, -3)}, {"shape": (4, True)}, {"dtype": torch.int64}, {"seed": 1.0}, {"seed": True},
        {"seed": torch.arange(3)}, {"stream": 0.5}, {"offset": None}, {"out": torch.empty(3, 4)},
        {"out": torch.empty(4, 3, dtype=torch.float64), "dtype": torch.float32}, {"generator": torch.Generator()},
    ]),
    "reparameterize": (lambda **o: onepass.reparameterize(**{"mean": MEAN, "clamp": (-1, 1), "seed": 1} | o), [
        {"mean": MEAN[:, :5]}, {"mean": MEAN[0, 0]}, {"logvar": LOGVAR[:3]}, {"clamp": (1, -1)}, {"clamp": 3},
        {"samples": 0}, {"samples": True}, {"antithetic": True}, {"chunk_dim": 3}, {"stream": 2**56},
        {"noise": MEAN}, {"out": torch.empty(4, 6, 5)},
    ]),
    "gumbel_softmax": (lambda **o: onepass.gumbel_softmax(**{"logits": MEAN, "seed": 1} | o), [
        {"tau": 0}, {"tau": float("inf")}, {"tau": "a"}, {"dim": 3}, {"logits": MEAN.int()}, {"seed": 0.5},
        {"out": torch.empty(4, 6)}, {"seed": torch.arange(3)},
    ]),
    "denoise_step": (lambda **o: onepass.denoise_step(**{
        "sample": MEAN, "model_output": LOGVAR, "plan": PLAN, "step": 3} | o), [
        {"step": 8}, {"step": -1}, {"step": 1.0}, {"step": True}, {"step": torch.tensor([0, 8, 0, 0])},
        {"step": torch.arange(3)}, {"guidance": 1.0}, {"model_output": (LOGVAR, LOGVAR)}, {"model_output": LOGVAR[:2]},
        {"model_output": (LOGVAR,), "guidance": 1.0}, {"plan": MULTISTEP}, {"plan": PLAN.table}, {"state": STATE},
        {"plan": MULTISTEP, "state": STATE[:, :0]}, {"mask": MEAN > 0}, {"known": MEAN}, {"out": MEAN[:2].clone()},
        {"noise": MEAN, "seed": 1}, {"mask": MEAN, "known": LOGVAR[0]},
    ]),
    "lerp": (lambda **o: onepass.lerp(**{"start": MEAN, "end": LOGVAR, "weight": 0.5} | o), [
        {"weight": "a"}, {"weight": True}, {"weight": torch.arange(4)}, {"weight": torch.rand(3)}, {"end": LOGVAR[:2]},
        {"end": LOGVAR.double()}, {"start": MEAN.int()}, {"out": torch.empty(4, 6)},
    ]),
    "slerp": (lambda **o: onepass.slerp(**{"start": MEAN, "end": LOGVAR, "weight": 0.5} | o), [
        {"dim": 3}, {"dim": (1, -4)}, {"dim": 0, "weight": torch.rand(4)}, {"weight": None}, {"end": LOGVAR[0]},
        {"start": MEAN.sum(), "end": LOGVAR.sum()}, {"out": torch.empty(4, 6)},
    ]),
    "composite": (lambda **o: onepass.composite(**{
        "sigmas": DENSITY, "features": torch.ones(4, 6, 3), "t_starts": TIMES, "t_ends": TIMES + 1} | o), [
        {"sigmas": None}, {"alphas": DENSITY}, {"sigmas": DENSITY[:3]}, {"features": MEAN[:, :5]}, {"t_ends": TIMES[0]},
        {"t_starts": TIMES.double()}, {"background": torch.ones(4)}, {"prefix_trans": torch.ones(3)}, {"depth": "mean"},
        {"early_stop_eps": 2.0}, {"early_stop_eps": True}, {"early_stop_eps": None}, {"out": (None,) * 4},
        {"out": (None, None, None, DENSITY, None)}, {"ray_offsets": OFFSETS},
    ]),
    "composite of packed rays": (lambda **o: onepass.composite(**{
        "sigmas": DENSITY.flatten(), "features": torch.ones(24, 3), "t_starts": TIMES.flatten(),
        "t_ends": TIMES.flatten() + 1, "ray_offsets": OFFSETS} | o), [
        {"ray_offsets": OFFSETS.int()}, {"ray_offsets": OFFSETS[:4]}, {"ray_offsets": OFFSETS.flip(0)},
        {"ray_offsets": OFFSETS + 1}, {"ray_offsets": OFFSETS[None]}, {"ray_offsets": None},
    ]),
}


@pytest.mark.parametrize("name", BAD)
def test_what_changed_is_checked(name):
    run, changes = BAD[name]
    for change in changes:
        _ops.forget()
        with pytest.raises((ValueError, TypeError)) as alone:
            run(**change)
        run()
        for _ in range(2):          # a call that was refused is not kept
            with pytest.raises(type(alone.value)) as after:
                run(**change)
            assert str(after.value) == str(alone.value)


def test_numbers_are_no_part_of_a_signature():
    for n in range(3):
        onepass.rng.normal((4,), seed=n, stream=n, offset=n)
        onepass.reparameterize(MEAN, LOGVAR, seed=n, stream=n, offset=n)
        onepass.gumbel_softmax(MEAN, 1.0 + n, seed=n)
        onepass.denoise_step(MEAN, (LOGVAR, MEAN), PLAN, n, guidance=1.0 + n)
        onepass.lerp(MEAN, LOGVAR, 0.1 * n)
        onepass.slerp(MEAN, LOGVAR, 0.1 * n)
    assert len(_ops._kept) == 6


def test_what_torch_takes_as_default_is_looked_at():
    draw = lambda seed=1, **options: onepass.rng.normal((3,), seed=seed, **options)
    expected = draw()
    try:
        torch.set_default_dtype(torch.float16)
        assert draw().dtype == torch.float16
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert draw().is_meta
    assert torch.equal(draw(), expected) and draw(device="meta").is_meta
    assert len({draw(seed=None).sum().item() for _ in range(4)}) == 4
    assert draw(out=torch.empty(3, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.fixture
def copies(monkeypatch):
    """The tensors that were made contiguous and were not."""
    made, own = [], torch.Tensor.contiguous

    def contiguous(x, *args, **options):
        if not x.is_contiguous():
            made.append(x)
        return own(x, *args, **options)

    monkeypatch.setattr(torch.Tensor, "contiguous", contiguous)
    return made


def test_rows_in_one_piece_are_not_copied(copies):
    moments, other = torch.randn(3, 8, 6, 6), torch.randn(3, 6, 6, 4).movedim(3, 1)
    mean, logvar = moments.chunk(2, 1)
    onepass.reparameterize_kl(mean, logvar, seed=1)
    onepass.reparameterize_kl(mean, logvar.expand_as(mean), noise=moments[:, 2:6])
    onepass.denoise_step(mean, (logvar, moments[:, 2:6]), PLAN, 2, guidance=2.0)
    assert not copies
    onepass.reparameterize_kl(mean.contiguous(), other, seed=1)
    assert [x.shape for x in copies] == [mean.shape, logvar.shape]         # this test's own copy, and logvar


def test_segments_that_all_share_are_not_copied(copies):
    last = torch.randn(3, 6, 6, 8)
    for chunk_dim, moments in ((3, last), (2, last), (0, last[:2]), (1, torch.randn(3, 8, 9).mT.contiguous().mT)):
        copies.clear()
        got = onepass.reparameterize_kl(moments, chunk_dim=chunk_dim, seed=1)
        assert [x.shape for x in copies] == ([moments.shape] if chunk_dim == 1 else [])
        for x, reference in zip(got, onepass.reparameterize_kl(
                moments, chunk_dim=chunk_dim, seed=1, backend="reference"), strict=True):
            torch.testing.assert_close(x, reference, rtol=2e-5, atol=2e-5)
    mean, logvar = last.chunk(2, 3)
    copies.clear()
    onepass.reparameterize(mean, logvar, clamp=(-1, 1), samples=2, noise=torch.randn(2, 3, 6, 6, 4))
    assert not copies
