"""Which backend takes a call, and what is said when none of the kernels can."""
import json
import warnings
from pathlib import Path

import pytest
import torch

import onepass
import onepass.kernels
from onepass import _ops, _supports_triton, registry

from helpers import ISAS, needs_native, run_python

ZERO = torch.zeros(2, 3)


def test_every_row_has_a_reference_and_its_functions_exist():
    for op in registry.OPS.values():
        assert "reference" in op.impls and set(op.impls) <= set(registry.BACKENDS)
        assert op.schema.rpartition("->")[0].rstrip().endswith("*, str? backend=None)")
        for impl in op.impls.values():
            if impl.path.startswith("onepass.kernels.") and _supports_triton.missing():
                module, name = impl.path.removeprefix("onepass.kernels.").split(":")
                source = (Path(onepass.kernels.__file__).parent / f"{module}.py").read_text()
                assert f"\ndef {name}(" in source, impl.path
            else:
                assert callable(impl.function), impl.path


@needs_native
def test_argument_before_context_before_environment():
    args = (ZERO, ZERO, None, 0, None, 0, None, 0, None, False)
    assert registry.choose("reparameterize", args) == "cpu"
    with onepass.use_backend("reference"):
        assert registry.choose("reparameterize", args) == "reference"
        assert registry.choose("reparameterize", args, "cpu") == "cpu"
        with onepass.use_backend(None):
            assert registry.choose("reparameterize", args) == "cpu"
    with pytest.raises(ValueError, match="backend='fast': expected one of"), onepass.use_backend("fast"):
        pass
    code = (
        "from onepass import registry; import torch; z = torch.zeros(1)\n"
        "args = (z, z, None, 0, None, 0, None, 0, None, False)\n"
        "print(registry.choose('reparameterize', args), registry.choose('reparameterize', args, 'cpu'))"
    )
    assert run_python(code, ONEPASS_BACKEND="reference").split() == ["reference", "cpu"]
    with pytest.raises(AssertionError, match="ONEPASS_BACKEND='fast': expected one of"):
        run_python("import onepass", ONEPASS_BACKEND="fast")


@needs_native
def test_a_fallback_warns_once_with_its_reason():
    registry._warned.clear()
    wide = ZERO.double()
    with pytest.warns(onepass.FallbackWarning, match="reparameterize runs on the reference: dtype is torch.float64"):
        onepass.reparameterize(wide, wide, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        onepass.reparameterize(wide, wide, seed=1)
        onepass.reparameterize(wide, wide, seed=1, backend="reference")


BROKEN = """
import sys, warnings
sys.modules["onepass._C"] = None        # as a missing or unloadable extension looks
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import torch, onepass
    for _ in range(2):
        onepass.reparameterize(torch.zeros(2), torch.zeros(2), seed=1)
mine = [str(w.message) for w in seen if w.category is onepass.FallbackWarning]
assert len(mine) == 1 and "the native extension onepass._C is not usable" in mine[0], mine
try:
    onepass.reparameterize(torch.zeros(2), torch.zeros(2), seed=1, backend="cpu")
except ValueError as error:
    assert "onepass._C is not usable" in str(error)
    print("ok")
"""


def test_a_broken_extension_falls_back_with_one_warning():
    assert run_python(BROKEN).strip() == "ok"


@needs_native
def test_an_instruction_set_that_this_cpu_lacks_is_named():
    code = "import onepass._native as n; print(n.error)"
    assert "ONEPASS_CPU_ISA='avx1024': this CPU runs" in run_python(code, ONEPASS_CPU_ISA="avx1024")


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_attention_obeys_the_instruction_set_asked_for(isa):
    code = "from onepass._native import _C; print(_C.isa, _C.attention_isa)"
    assert run_python(code, ONEPASS_CPU_ISA=isa).split() == [isa, isa]


@needs_native
def test_attention_widens_bfloat16_on_intel():
    """Where dot products of bfloat16 are the slower way, left to choose."""
    code = "from onepass._native import _C; print(_C.isa, _C.attention_isa)"
    isa, attention = run_python(code, ONEPASS_CPU_ISA="").split()
    facts = Path("/proc/cpuinfo")
    intel = facts.exists() and "GenuineIntel" in facts.read_text()
    assert attention == ("avx512_vnni" if intel and isa == "avx512_bf16" else isa)


@needs_native
def test_backward_uses_the_backend_of_forward(monkeypatch):
    ran = []
    for name in ("reference", "cpu"):
        impl = registry.OPS["reparameterize_backward"].impls[name]
        monkeypatch.setitem(
            impl.__dict__, "function", lambda *a, _f=impl.function, _n=name: ran.append(_n) or _f(*a)
        )
    for backend in ("reference", "cpu"):
        mean, logvar = (torch.zeros(2, 3, requires_grad=True) for _ in range(2))
        with onepass.use_backend(backend):
            z = onepass.reparameterize(mean, logvar, seed=1)
        z.sum().backward()
    assert ran == ["reference", "cpu"]


def gradients(f, *shapes):
    torch.manual_seed(0)
    leaves = [torch.rand(shape, requires_grad=True) for shape in shapes]
    outputs = [x for x in f(*leaves) if x is not None and x.numel()]
    weights = [torch.linspace(-1, 1, x.numel()).view(x.shape) for x in outputs]
    return outputs, torch.autograd.grad(outputs, leaves, weights)


def makers(outputs):
    nodes = [x.grad_fn for x in outputs]
    return {node.name() for node in (*nodes, *(n for node in nodes for n, _ in node.next_functions)) if node}


DIFFERENTIABLE = {
    "reparameterize": (lambda m, lv: onepass.reparameterize_kl(m, lv, seed=1), (3, 5), (3, 5)),
    "latent_sample": (lambda x: onepass.reparameterize_kl(x, samples=2, beta=0.5, seed=1), (3, 6)),
    "gumbel_softmax": (lambda x: [onepass.gumbel_softmax(x, seed=1)], (3, 7)),
    "interpolate": (lambda a, b, t: [onepass.slerp(a, b, t), onepass.lerp(a, b, t)], (3, 5), (3, 5), (3,)),
    "attention_forward": (lambda q, k, v, s: onepass.attention(q, k, v, sinks=s, return_lse=True),
                          (2, 3, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8), (4,)),
    "attention_varlen_forward": (lambda q, k, v: [onepass.attention_varlen(
        q, k, v, *(torch.tensor([0, 2, 5], dtype=torch.int32),) * 2, 3, 3)], (5, 4, 8), (5, 4, 8), (5, 4, 8)),
    "merge_attention": (lambda outs, lses: onepass.merge_attention(outs, lses), (3, 2, 4, 2, 8), (3, 2, 2, 4)),
    "composite": (lambda s, c, t: onepass.composite(s, c, t, t + 0.1), (2, 6), (2, 6, 3), (2, 6)),
}


@needs_native
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_a_gradient_past_the_dispatcher_is_the_dispatchers(op):
    f, *shapes = DIFFERENTIABLE[op]
    outputs, direct = gradients(f, *shapes)
    assert "DirectBackward" in makers(outputs)
    with torch.device("cpu"):           # a mode, as far as torch is concerned
        outputs, dispatched = gradients(f, *shapes)
    assert any(op in name for name in makers(outputs))
    assert all(map(torch.equal, direct, dispatched))


def test_every_differentiable_op_is_among_them():
    assert DIFFERENTIABLE.keys() == _ops._gradients.keys()


def test_a_second_derivative_is_refused():
    x = torch.rand(3, 5, requires_grad=True)
    grad, = torch.autograd.grad(onepass.gumbel_softmax(x, seed=1).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_info():
    from onepass import _info, cli

    facts = _info.collect()
    assert set(facts["ops"]) == set(registry.OPS) and json.loads(json.dumps(facts)) == facts
    text = _info.text()
    assert max(map(len, text.splitlines())) <= 100
    assert "cuda: no kernel yet" in text
    assert all(f"`{name}`" in _info.markdown() for name in registry.OPS)
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0


def test_a_missing_extra_is_named():
    code = "import sys; sys.modules['rich'] = None\nfrom onepass.cli import main\nmain(['demo', '--only', 'vae'])"
    with pytest.raises(AssertionError, match=r"onepass demo needs rich.*pip install 'onepass\[demo\]'"):
        run_python(code)


@needs_native
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_torchs_default_dtype_and_device_change_nothing(backend):
    """Buffers that a kernel writes have its types, whatever torch.empty would make: a smaller one would overflow."""
    x, t = torch.rand(3, 40), torch.rand(3, 41).cumsum(1)
    heads = torch.rand(2, 5, 4, 8)
    plan, noise = onepass.plans.ddpm(4), torch.rand(3, 40)
    leaf = x.clone().requires_grad_()

    def results():
        rendering = onepass.composite(leaf, x[..., None], t[:, :-1], t[:, 1:], background=x[0, :1],
                                      prefix_trans=x[:, 0], return_weights=True, distortion=True, backend=backend)
        z, kl = onepass.reparameterize_kl(leaf, x, noise=noise, backend=backend)
        return (
            *rendering, z, kl, *torch.autograd.grad(sum(y.sum() for y in (*rendering, z, kl)), leaf),
            *onepass.reparameterize_kl(x, x, seed=1, backend=backend),
            *onepass.attention(heads, heads, heads, return_lse=True, backend=backend),
            onepass.denoise_step(x, x, plan, 0, noise=noise, backend=backend),
            onepass.rng.normal((3, 5), seed=1, dtype=torch.float32, device="cpu", backend=backend),
        )

    expected = results()
    try:
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(results(), expected, strict=True))
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        found = results()
    assert all(a.device == b.device and torch.equal(a, b) for a, b in zip(found, expected, strict=True))
