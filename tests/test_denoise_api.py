"""denoise_step in PyTorch: out, gradients, torch.library, compile and transforms, and what is refused and why."""
from __future__ import annotations

import math

import pytest
import torch
import torch._dynamo.testing

from onepass import denoise_step, plans

from denoise_rows import PLAN, inputs
from helpers import ALL_BACKENDS, INTERPRETED, ISAS, device_of, needs_native


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_out_may_be_the_sample_or_a_view(backend):
    x, m, _, z, _, state, _ = inputs((4, 3, 21), device=device_of(backend))
    plan = PLAN.to(x.device)
    expected = denoise_step(x, m, plan, 4, state=state.clone(), noise=z, backend=backend)
    wide = torch.full((4, 5, 25), math.nan, device=x.device)
    for out in (x.clone(), torch.empty_like(x), wide[:, 1:4, 2:23], x.new_empty(3, 4, 21).transpose(0, 1)):
        out.copy_(x)
        got = denoise_step(out, m, plan, 4, state=state.clone(), noise=z, out=out, backend=backend)
        assert got is out
        assert torch.equal(got, expected)
    assert wide[:, 0].isnan().all()
    assert wide[:, :, 23:].isnan().all()


def test_gradients_come_from_the_reference():
    x, u, c, z, known, state, mask = (t.double() for t in inputs((8, 2, 3)))
    leaves = [t.requires_grad_() for t in (x, u, c, z, known)]
    steps = torch.arange(8)

    def f(x, u, c, z, known):
        mine = state.clone()
        prev = denoise_step(x, (u, c), PLAN, steps, state=mine, guidance=2.0, noise=z, mask=mask, known=known)
        return prev, mine

    assert torch.autograd.gradcheck(f, leaves)
    single = x.detach().float().requires_grad_()
    plan = plans.dpmpp_2m(4)

    def loop(backend):          # the gradient also flows through the history
        value, history = single, plan.new_state(single)
        for i in range(4):
            value = denoise_step(value, value.sin(), plan, i, state=history, backend=backend)
        return value

    chosen = loop(None)
    with torch.no_grad():
        torch.testing.assert_close(chosen, loop("cpu" if ISAS else "reference"))
    assert torch.autograd.grad(chosen.sum(), single)[0].abs().sum() > 0
    if ISAS:
        with pytest.raises(ValueError, match="backend='cpu' cannot take this call: a gradient is needed"):
            loop("cpu")


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_library_op(backend):
    x, u, c, z, known, state, mask = inputs((3, 7), device=device_of(backend))
    rows, table = torch.arange(3, device=x.device), PLAN.to(x.device).table
    for steps, noise, cond in ((None, z, c), (rows + 2, None, None)):
        args = (x, u, cond, table, 4, steps, state, 2.0, None, 5, rows, noise, True, mask, known)
        torch.library.opcheck(torch.ops.onepass.denoise_step.default, args, {"backend": backend})


def test_compile_fake_make_fx_vmap_autocast():
    torch._dynamo.reset()
    x, u, c, z, _, state, _ = inputs((3, 7))
    plan = plans.dpmpp_2m(6) + plans.ddim(4, eta=1.0)

    def f(x, u, c, steps, seeds, state):
        return denoise_step(x * 2, (u, c), plan, steps, state=state, guidance=3.0, seed=seeds).sin()

    state = state[:, :1].contiguous()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for first in (0, 3, 6):
        steps, mine, theirs = torch.arange(3) + first, state.clone(), state.clone()
        torch.testing.assert_close(compiled(x, u, c, steps, steps, mine), f(x, u, c, steps, steps, theirs))
        assert torch.equal(mine, theirs)
    assert counter.frame_count == 1
    leaf = x.clone().requires_grad_()               # with a gradient the reference is traced
    g = lambda x: denoise_step(x, u, plan, torch.tensor([7, 8, 9]), state=state.clone(), noise=z).sum()
    torch.testing.assert_close(torch.autograd.grad(torch.compile(g, fullgraph=True, backend="aot_eager")(leaf), leaf),
                               torch.autograd.grad(g(leaf), leaf))

    with torch._subclasses.FakeTensorMode():
        fake, imagined = torch.empty(3, 7), plans.dpmpp_2m(6)
        assert denoise_step(fake, fake, imagined, 0, state=imagined.new_state(fake)).shape == (3, 7)
    steps = torch.arange(3)
    traced = torch.fx.experimental.proxy_tensor.make_fx(f)(x, u, c, steps, steps, state.clone())
    torch.testing.assert_close(traced(x, u, c, steps, steps, state.clone()), f(x, u, c, steps, steps, state.clone()))
    run = lambda x, m: denoise_step(x[None], m[None], plans.ddim(4), 2)[0]
    torch.testing.assert_close(torch.func.vmap(run)(x, u), denoise_step(x, u, plans.ddim(4), 2))
    torch.testing.assert_close(torch.func.grad(lambda x: run(x, u[0]).sum())(x[0]),
                               torch.autograd.functional.jacobian(lambda x: run(x, u[0]).sum(), x[0]))
    expected = run(x, u)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(x, u), expected)


def test_compiles_with_inductor():
    torch._dynamo.reset()
    x, m, *_ = inputs((3, 7))
    plan = plans.dpmpp_2m(6)
    state = plan.new_state(x)
    f = torch.compile(lambda x, m, s: denoise_step(x, m, plan, 2, state=s).sin(), fullgraph=True)
    again = state.clone()
    torch.testing.assert_close(f(x, m, state), denoise_step(x, m, plan, 2, state=again).sin())
    assert torch.equal(state, again)


X = torch.zeros(2, 3)


@pytest.mark.parametrize(("change", "error", "text"), [
    ({"sample": 3}, TypeError, "sample is int, expected a tensor"),
    ({"sample": torch.zeros(())}, ValueError, r"sample has shape \(\), expected \[B, \.\.\.\]"),
    ({"sample": X.long()}, TypeError, "sample has dtype torch.int64, expected float32"),
    ({"plan": PLAN.table}, TypeError, "plan is Tensor, expected a DenoisePlan"),
    ({"plan": PLAN.to("meta")}, ValueError, "plan is on meta, expected the device of sample, cpu"),
    ({"model_output": torch.zeros(3, 3)}, ValueError, r"model_output has shape \(3, 3\), expected that of sample"),
    ({"model_output": (X, X, X)}, ValueError, r"model_output has 3 parts, expected \(uncond, cond\)"),
    ({"model_output": (X, X)}, ValueError, "model_output is a pair, expected a guidance with it"),
    ({"model_output": torch.zeros(4, 3)}, ValueError, r"model_output has shape \(4, 3\).*with guidance twice as many"),
    ({"model_output": (X, X.half()), "guidance": 2.0}, TypeError, r"model_output\[1\] has dtype torch.float16"),
    ({"model_output": (X, X), "guidance": "3"}, TypeError, "guidance is str, expected a number"),
    ({"model_output": (X, X), "guidance": torch.ones(3)}, ValueError, r"guidance has shape \(3,\), expected \(\) or"),
    ({"guidance": 2.0}, ValueError, "guidance is given with one model_output"),
    ({"step": 8}, ValueError, r"step=8, expected 0 \.\. 7"),
    ({"step": -1}, ValueError, r"step=-1, expected 0 \.\. 7"),
    ({"step": torch.tensor([0, 8])}, ValueError, r"step has values 0 \.\. 8, expected 0 \.\. 7"),
    ({"step": torch.tensor([0.0, 1.0])}, TypeError, "step has dtype torch.float32, expected an int or an int64 tensor"),
    ({"step": torch.arange(3)}, ValueError, r"step has shape \(3,\), expected \(\) or \(2,\)"),
    ({"state": None}, ValueError, r"state is None, expected plan.new_state\(sample\), of shape \(2, 2, 3\)"),
    ({"state": torch.zeros(2, 1, 3)}, ValueError, r"state has shape \(2, 1, 3\), expected \(2, 2, 3\)"),
    ({"state": torch.zeros(2, 2, 3).half()}, TypeError, "state has dtype torch.float16"),
    ({"state": torch.zeros(2, 3, 2).transpose(1, 2)}, ValueError, "state has strides .* expected a contiguous tensor"),
    ({"plan": plans.ddim(8)}, ValueError, "state is given, expected None"),
    ({"seed": 1, "noise": X}, ValueError, "noise and seed are both given"),
    ({"seed": torch.arange(3)}, ValueError, r"seed has shape \(3,\), expected \(\) or \(2,\)"),
    ({"noise": torch.zeros(2, 4)}, ValueError, r"noise has shape \(2, 4\)"),
    ({"mask": X.bool()}, ValueError, "known is None, expected mask and known together"),
    ({"known": X}, ValueError, "mask is None, expected mask and known together"),
    ({"mask": X.long(), "known": X}, TypeError, "mask has dtype torch.int64"),
    ({"mask": torch.zeros(2, 2), "known": X}, ValueError, r"mask has shape \(2, 2\), expected one that broadcasts"),
    ({"mask": torch.zeros(1, 2, 3), "known": X}, ValueError, r"mask has shape \(1, 2, 3\), expected one that"),
    ({"out": X.half()}, TypeError, "out has dtype torch.float16, expected torch.float32"),
    pytest.param({"backend": "triton"}, ValueError, "backend='triton' cannot take this call: .* (installed|on cpu)",
                 marks=pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")),
])
def test_bad_input_writes_nothing(change, error, text):
    state, out = torch.full((2, 2, 3), 7.0), torch.full((2, 3), 7.0)
    args = {"sample": X, "model_output": X, "plan": PLAN, "step": 4, "state": state, "out": out}
    with pytest.raises(error, match=text):
        denoise_step(**{**args, **change})
    assert (state == 7).all()
    assert (out == 7).all()


@needs_native
def test_the_kernel_checks_steps_that_no_check_saw():
    state = torch.full((2, 2, 3), 7.0)
    args = (X, X, None, PLAN.table, 0, torch.tensor([3, 99]), state, 1.0, None, 0, None, X, True, None, None)
    with pytest.raises(ValueError, match=r"step of row 1 is 99, expected 0 \.\. 7"):
        torch.ops.onepass.denoise_step(*args, backend="cpu")
    assert (state == 7).all()


@needs_native
def test_backends_that_refuse_say_why():
    with pytest.raises(ValueError, match=r"dtype is torch\.float64, the kernel takes"):
        denoise_step(X.double(), X.double(), plans.ddim(4), 0, backend="cpu")
    with pytest.raises(ValueError, match=r"model_output is torch\.float32 with a torch\.bfloat16 sample"):
        denoise_step(X.bfloat16(), X, plans.ddim(4), 0, backend="cpu")
