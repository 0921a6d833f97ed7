"""Every plan against the sampler of diffusers that it stands for, whole loops with the same noise."""
from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import onepass
from onepass import DenoisePlan, denoise_step, plans
from onepass.plans.schedule import alphas_bar

# diffusers' class, the module whose randn_tensor it calls, our factory
SAMPLERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "lcm": "LCMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "flow_match_euler": "FlowMatchEulerDiscreteScheduler",
}
IN_FLOAT64 = ("ddim", "ddpm", "lcm")         # the others round their sample to float32 in each step
V, SAMPLE = {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
KARRAS, EXPONENTIAL = {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}

# sampler, steps, options of its config, options of its step
CASES: list[tuple[str, int, dict[str, object], dict[str, object]]] = [
    *(("ddim", n, {**a, **b}, {}) for n in (1, 7, 50) for a in ({}, V, SAMPLE)
      for b in ({"clip_sample": False}, {"clip_sample_range": 0.6})),
    *(("ddim", 12, {"timestep_spacing": s, "clip_sample": False}, {"eta": 0.7}) for s in ("trailing", "linspace")),
    *(("ddim", 10, {"beta_schedule": b}, {"eta": eta, "use_clipped_model_output": clipped})
      for b in ("scaled_linear", "squaredcos_cap_v2") for eta in (0.0, 1.0) for clipped in (False, True)),
    ("ddim", 20, {**SD, "clip_sample": False, "set_alpha_to_one": False}, {}),
    ("ddim", 15, {**ZERO_SNR, **V}, {"eta": 0.5}),
    ("ddim", 15, {**ZERO_SNR, **SAMPLE}, {}),
    ("ddim", 4, {"num_train_timesteps": 10, "trained_betas": [0.01 * i for i in range(1, 11)]}, {}),
    *(("ddpm", 9, {**a, "variance_type": v, "clip_sample": c}, {}) for a in ({}, V, SAMPLE)
      for v in ("fixed_small", "fixed_large") for c in (True, False)),
    *(("ddpm", 11, {"timestep_spacing": s, "beta_schedule": b}, {}) for s in ("trailing", "linspace")
      for b in ("scaled_linear", "squaredcos_cap_v2")),
    ("ddpm", 8, {**SD, "variance_type": "fixed_large"}, {}),
    ("ddpm", 10, {**ZERO_SNR, **V}, {}),
    *(("lcm", n, {**a, "clip_sample": c}, {}) for n in (1, 4, 10) for a in ({}, V, SAMPLE) for c in (True, False)),
    ("lcm", 5, {"original_inference_steps": 20, "timestep_scaling": 3.0}, {}),
    *(("euler", n, {**a, "timestep_spacing": s}, {}) for n in (1, 10) for a in ({}, V, SAMPLE)
      for s in ("linspace", "leading", "trailing")),
    *(("euler", 10, {**a, **s, **SD}, {}) for a in ({}, V) for s in (KARRAS, EXPONENTIAL)),
    ("euler", 10, {"final_sigmas_type": "sigma_min"}, {}),
    ("euler", 10, {**ZERO_SNR, **V}, {}),
    *(("euler", 10, a, {"s_churn": 3.0, "s_noise": 1.1, "s_tmin": 0.5, "s_tmax": 20.0}) for a in ({}, V, SAMPLE)),
    *(("euler_ancestral", n, {**a, "timestep_spacing": s}, {}) for n in (1, 10) for a in ({}, V)
      for s in ("linspace", "leading", "trailing")),
    ("euler_ancestral", 9, {**ZERO_SNR, **V}, {}),
    *(("dpmpp_2m", n, {**a, "solver_type": s, "algorithm_type": g}, {}) for n in (1, 2, 10, 20) for a in ({}, V, SAMPLE)
      for s in ("midpoint", "heun") for g in ("dpmsolver++", "sde-dpmsolver++")),
    *(("dpmpp_2m", n, {"final_sigmas_type": "sigma_min", "lower_order_final": low, "euler_at_final": e}, {})
      for n in (10, 20) for low in (True, False) for e in (True, False)),
    *(("dpmpp_2m", 10, {**SD, "timestep_spacing": s, **k}, {}) for s in ("leading", "trailing")
      for k in ({}, KARRAS, EXPONENTIAL)),
    ("dpmpp_2m", 12, {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}, {}),
    ("dpmpp_2m", 10, {"solver_order": 1}, {}),
    ("dpmpp_2m", 10, {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}, {}),
    *(("flow_match_euler", n, {"shift": s, "stochastic_sampling": z}, {}) for n in (1, 4, 28) for s in (1.0, 3.0)
      for z in (False, True)),
    *(("flow_match_euler", 6, {"use_dynamic_shifting": True, "time_shift_type": k}, {"mu": 0.8})
      for k in ("exponential", "linear")),
    *(("flow_match_euler", 6, k, {}) for k in ({"shift_terminal": 0.1}, {"invert_sigmas": True}, KARRAS, EXPONENTIAL)),
]


def ours(name: str, steps: int, config: dict[str, object], options: dict[str, object], **more: object) -> DenoisePlan:
    config = {**config, **options, **more}
    for flag, kind in (("use_karras_sigmas", "karras"), ("use_exponential_sigmas", "exponential")):
        if config.pop(flag, False):
            config["sigma_schedule"] = kind
    for unused in ("use_flow_sigmas", "use_dynamic_shifting"):
        config.pop(unused, None)
    return getattr(plans, name)(steps, **config)


def theirs(name: str, steps: int, config: dict[str, object], options: dict[str, object]):
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, SAMPLERS[name])(**config)
    options = dict(options)
    mu = {"mu": options.pop("mu")} if "mu" in options else {}
    if name in IN_FLOAT64:                   # its tables are float32: give it the same ones in float64
        c = scheduler.config
        exact = torch.from_numpy(alphas_bar(
            c.num_train_timesteps, c.beta_start, c.beta_end, c.beta_schedule, c.trained_betas,
            c.rescale_betas_zero_snr))
        torch.testing.assert_close(scheduler.alphas_cumprod.double(), exact, rtol=3e-5, atol=1e-6)
        scheduler.alphas_cumprod = exact
        if name != "ddpm":
            scheduler.final_alpha_cumprod = torch.tensor(1.0).double() if c.set_alpha_to_one else exact[0]
    scheduler.set_timesteps(steps, **mu)
    return scheduler, options


def model(x: Tensor, t: float) -> Tensor:
    return 0.6 * torch.sin(3 * x + 0.01 * t) + 0.3 * x.clamp(-2, 2)


@pytest.mark.parametrize(("name", "steps", "config", "options"), CASES, ids=lambda x: str(x).replace(" ", ""))
def test_loop_is_that_of_diffusers(name, steps, config, options, monkeypatch):
    scheduler, step_options = theirs(name, steps, config, options)
    plan = ours(name, steps, config, options)
    dtype = torch.float64 if name in IN_FLOAT64 else torch.float32
    generator = torch.Generator().manual_seed(steps)
    randn = lambda: torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=generator).to(dtype)
    noises = [randn() for _ in range(len(plan))]
    assert len(scheduler.timesteps) == len(plan)
    # Fractional timesteps are cut to integers, and its float32 puts 998.9999 where float64 has 999.
    rounding = 1.0 if name == "dpmpp_2m" and EXPONENTIAL.keys() & config.keys() else 0.0
    torch.testing.assert_close(
        plan.timesteps.double(), scheduler.timesteps.double(), rtol=2e-5, atol=1e-3 + rounding)
    if hasattr(scheduler, "init_noise_sigma"):
        assert plan.init_noise_sigma == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-4)
    x = y = randn() * plan.init_noise_sigma
    state = plan.new_state(y)
    module = importlib.import_module(type(scheduler).__module__)
    tolerance = 1e-9 if dtype == torch.float64 else 3e-5       # DDPM draws noise of 1e-10 where the variance is 0
    for i, t in enumerate(scheduler.timesteps):
        t = t if t.is_floating_point() else int(t)          # a float32 product would round LCM's scalings
        monkeypatch.setattr(module, "randn_tensor", lambda *a, noise=noises[i], **k: noise)
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        torch.testing.assert_close(plan.scale_input(y, i), scaled, rtol=1e-4, atol=1e-4)
        m = model(scaled, float(t))
        x = scheduler.step(m, t, x, return_dict=False, **step_options)[0]
        y = denoise_step(y, m, plan, i, state=state, noise=noises[i], backend="reference")
        scale = max(x.abs().max().item(), 1.0)
        assert (x - y).abs().max() <= tolerance * scale, f"step {i} of {len(plan)}"


def test_karras_sigmas_of_the_cosine_schedule():
    """Its first sigma is 20000, where float32 has lost the clean sample: the tables are compared, not the loops."""
    config = {"beta_schedule": "squaredcos_cap_v2", **KARRAS}
    scheduler, plan = theirs("dpmpp_2m", 12, config, {})[0], ours("dpmpp_2m", 12, config, {})
    torch.testing.assert_close(plan.timesteps, scheduler.timesteps, atol=1, rtol=0)
    sigmas = plan.levels[:, 1] / plan.levels[:, 0]
    torch.testing.assert_close(sigmas, scheduler.sigmas[:-1].double(), rtol=1e-3, atol=0)


def test_cases_name_every_sampler():
    assert {case[0] for case in CASES} == set(SAMPLERS) == {name for name in plans.__all__ if name[0].islower()}


# Sum and mean of |x| of diffusers' own test loops: sample and model of its scheduler tests.
GOLDEN = [
    ("ddim", 10, {}, 172.0067, 0.223967),
    ("ddim", 10, V, 52.5302, 0.0684),
    ("euler", 10, {}, 10.0807, 0.0131),
    ("euler", 10, KARRAS, 124.52299499511719, 0.16213932633399963),
    ("dpmpp_2m", 10, {}, None, 0.3301),
    ("lcm", 10, {}, 197.7616, 0.2575),
    ("euler_ancestral", 10, {}, 152.3192, 0.1983),
    ("ddpm", 1000, {}, 258.9606, 0.3372),
    ("ddpm", 1000, V, 202.0296, 0.2631),
]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("name", "steps", "config", "total", "mean"), GOLDEN, ids=lambda x: str(x))
def test_golden_figures(name, steps, config, total, mean, backend):
    lms = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
    extra = {
        "ddim": {"clip_sample": True}, "ddpm": {"variance_type": "fixed_small"}, "lcm": {"clip_sample": False},
        "dpmpp_2m": {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
    }.get(name, {})
    if name == "lcm":
        lms = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.0120}
    if name in ("euler", "euler_ancestral"):
        extra = {"num_train_timesteps": 1100}
    plan = ours(name, steps, {**lms, **extra, **config}, {})
    n = 4 * 3 * 8 * 8
    sample = (torch.arange(n).reshape(3, 8, 8, 4) / n).permute(3, 0, 1, 2)
    sample = sample * (plan.init_noise_sigma if name in ("euler", "euler_ancestral") else 1.0)
    generator = torch.manual_seed(0)
    state = plan.new_state(sample)
    for i, t in enumerate(plan.timesteps.tolist()):
        sample = x = plan.scale_input(sample, i)     # those loops step from the scaled sample
        needs_noise = plan.table[i, 3] != 0 or name == "euler_ancestral"
        noise = torch.randn(sample.shape, generator=generator) if needs_noise else None
        sample = denoise_step(sample, x * t / (t + 1), plan, i, state=state, noise=noise, backend=backend)
    got = sample.abs()
    if total is not None:
        assert got.sum().item() == pytest.approx(total, abs=1e-2)
    assert got.mean().item() == pytest.approx(mean, abs=1e-3)


def test_begin_is_the_rest_of_the_schedule():
    for name in SAMPLERS:
        whole, rest = ours(name, 10, {}, {}), ours(name, 10, {}, {}, begin=4)
        assert len(rest) == 6
        assert torch.equal(rest.timesteps, whole.timesteps[4:])
        assert torch.equal(rest.levels, whole.levels[4:])
        assert rest.table[0, 8] == 4         # keys the noise: a late start draws what the whole would
        if whole.slots:
            assert rest.table[0, 9] == 0
            assert whole.table[4, 9] != 0         # no history yet
            assert torch.equal(rest.table[1:], whole.table[5:])
        else:
            assert torch.equal(rest.table, whole.table[4:])


def test_concatenation_keeps_rows():
    a, b, c = plans.dpmpp_2m(6), plans.ddim(4, eta=1.0), plans.euler(3)
    joined = a + b + c
    assert (joined.names, joined.offsets, len(joined)) == (("dpmpp_2m", "ddim", "euler"), (0, 6, 10), 13)
    assert joined.slots == 1
    assert joined.stochastic
    assert torch.equal(joined.table[6:10, :9], b.table)
    assert not joined.table[6:, 9:].any()
    assert torch.equal(joined.input_scale[10:], c.input_scale)
    assert joined.init_noise_sigmas == (1.0, 1.0, c.init_noise_sigma)
    assert joined.timesteps.dtype == torch.float32
    assert (a + b).timesteps.dtype == torch.int64
    assert torch.equal(DenoisePlan.concat([a, b, c]).table, joined.table)
    with pytest.raises(ValueError, match="init_noise_sigmas"):
        joined.init_noise_sigma      # noqa: B018
    with pytest.raises(ValueError, match="plans is empty"):
        DenoisePlan.concat([])


def test_add_noise_meets_the_schedule():
    clean, noise = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    abar = np.cumprod(1 - np.linspace(0.0001, 0.02, 1000))
    plan = plans.ddim(10, clip_sample=False)
    a = abar[900]
    torch.testing.assert_close(plan.add_noise(clean, noise, 0), math.sqrt(a) * clean + math.sqrt(1 - a) * noise)
    for other in (plan, plans.euler(10), plans.dpmpp_2m(10), plans.flow_match_euler(10), plans.ddpm(10), plans.lcm(4)):
        assert torch.equal(other.add_noise(clean, noise, len(other) - 1, after=True), clean)
        steps = torch.tensor([1, 3])
        both = other.add_noise(clean, noise, steps)
        assert torch.equal(both[1], other.add_noise(clean, noise, 3)[1])
        if other.names != ("lcm",):          # an exact step leads from level to level: the model here knows the noise
            continue
    level = plan.levels
    sample = plan.add_noise(clean, noise, 3)
    after = denoise_step(sample, noise, plan, 3, backend="reference")
    torch.testing.assert_close(after, plan.add_noise(clean, noise, 3, after=True))
    assert torch.equal(level[1:, :2], level[:-1, 2:])


def test_a_model_that_knows_the_noise_is_led_to_the_clean_sample():
    """An independent truth for the deterministic samplers: with the exact noise every one of them ends at `clean`."""
    clean, noise = torch.rand(2, 2, 3, 5, dtype=torch.float64) * 2 - 1, torch.randn(2, 2, 3, 5, dtype=torch.float64)
    for plan in (plans.ddim(7, clip_sample=False), plans.euler(7), plans.dpmpp_2m(7),
                 plans.dpmpp_2m(20, solver_type="heun"), plans.dpmpp_2m(20, sigma_schedule="karras")):
        x, state = plan.add_noise(clean, noise, 0), plan.new_state(clean)
        for i in range(len(plan)):
            torch.testing.assert_close(x, plan.add_noise(clean, noise, i), rtol=1e-9, atol=1e-9)
            x = denoise_step(x, noise, plan, i, state=state)
        torch.testing.assert_close(x, clean, rtol=1e-9, atol=1e-9)
    plan = plans.flow_match_euler(7, shift=3.0)
    x = plan.add_noise(clean, noise, 0)
    for i in range(len(plan)):
        x = denoise_step(x, noise - clean, plan, i)
    torch.testing.assert_close(x, clean)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: plans.ddim(0), r"steps=0, expected 1 \.\. num_train_timesteps = 1000"),
    (lambda: plans.ddim(10, prediction_type="x"), "prediction_type='x': expected one of epsilon, v, sample"),
    (lambda: plans.euler(10, prediction_type="flow"), "prediction_type='flow': expected one of"),
    (lambda: plans.ddim(10, beta_schedule="cubic"), "beta_schedule='cubic': expected one of linear"),
    (lambda: plans.ddim(10, timestep_spacing="even"), "timestep_spacing='even': expected one of"),
    (lambda: plans.ddim(10, begin=10), r"begin=10, expected 0 \.\. 9"),
    (lambda: plans.ddim(10, rescale_betas_zero_snr=True, timestep_spacing="trailing"), "timestep 999.*not finite"),
    (lambda: plans.ddim(1000, steps_offset=1), "steps_offset=1 leads to timestep 1000"),
    (lambda: plans.ddim(10, trained_betas=[0.1]), r"trained_betas has shape \(1,\)"),
    (lambda: plans.ddim(10, beta_end=1.5), "betas run from"),
    (lambda: plans.ddpm(10, variance_type="learned"), "variance_type='learned': expected one of"),
    (lambda: plans.euler(10, sigma_schedule="beta"), "sigma_schedule='beta': expected one of karras"),
    (lambda: plans.euler(10, final_sigmas_type="one"), "final_sigmas_type='one'"),
    (lambda: plans.dpmpp_2m(10, solver_order=3), "solver_order=3"),
    (lambda: plans.dpmpp_2m(10, algorithm_type="dpmsolver"), "algorithm_type='dpmsolver'"),
    (lambda: plans.dpmpp_2m(10, prediction_type="flow", sigma_schedule="karras"), "expected None"),
    (lambda: plans.flow_match_euler(), "expected exactly one of the two"),
    (lambda: plans.flow_match_euler(sigmas=[1.2]), "sigmas="),
    (lambda: plans.flow_match_euler(4, shift=0.0), "shift=0.0"),
    (lambda: plans.lcm(60), r"steps=60, expected 1 \.\. original_inference_steps = 50"),
])
def test_bad_options_say_what_is_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_own_rows_are_checked():
    levels = [plans.plan.Level(1.0, 1.0)] * 2
    times = torch.tensor([3])
    with pytest.raises(ValueError, match="rows is empty"):
        DenoisePlan.build("own", [], times[:0], levels[:1])
    with pytest.raises(ValueError, match="expected 1 and 2 for 1 rows"):
        DenoisePlan.build("own", [plans.Row()], times, levels[:1])
    with pytest.raises(ValueError, match="slot 0, expected -1"):
        DenoisePlan.build("own", [plans.Row(slot=0)], times, levels)
    with pytest.raises(ValueError, match="at most 8"):
        DenoisePlan.build("own", [plans.Row(history=(1.0,) * 9)], times, levels)
    with pytest.raises(ValueError, match="limit -1"):
        DenoisePlan.build("own", [plans.Row(limit=-1.0)], times, levels)
    assert "own at 0" in repr(DenoisePlan.build("own", [plans.Row(x=1.0)], times, levels))
    assert onepass.plans is plans
