"""The options of reparameterize, reparameterize_kl and reparameterize_log_weights: every pair of them against
torch.distributions and autograd in float64, on every backend that has them."""
from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import distributions

import onepass
from onepass import rng
from onepass.reference.latent import SAMPLE_STEP

import cases
from helpers import ALL_BACKENDS as BACKENDS
from helpers import (
    INTERPRETED,
    ISAS,
    TRITON,
    assert_as_good_as_torch,
    needs_native,
    run_python,
)

pytestmark = pytest.mark.usefixtures("on_its_device")

SEEDS = torch.tensor([5, -1, 2**40])
# Several rows a tile; rows of several tiles, with a tail; rows that begin inside a block of random numbers.
SHAPES = ((3, 4, 2, 6), (3, 2, 520 if INTERPRETED else 1100), (3, 3, 5))
OPTIONS = {
    "form": ("two", 0, 1, -1),
    "clamp": (None, (-0.5, 0.75), (None, 0.5)),
    "prior": (None, "own", "broadcast"),
    "samples": (None, 1, 3, "pairs"),
    "result": ("z", "row", "sum", "mean", "none", "weights"),
    "beta": (1.0, 0.3),
    "free_bits": (None, "element", "row"),
    "noise": ("given", "seed", "seeds", "generator"),
    "dtype": cases.FLOATS,
    "shape": SHAPES,
}


def all_pairs(options, allowed, seed=0):
    """Few rows in which every pair of values of two options occurs together, where it is allowed."""
    chance = random.Random(seed)
    names = list(options)
    draw = lambda fixed: {name: fixed.get(name, chance.choice(options[name])) for name in names}
    rows, seen = [], set()
    for a, b in itertools.combinations(names, 2):
        for x, y in itertools.product(options[a], options[b]):
            if (a, x, b, y) in seen:
                continue
            row = next((r for r in (draw({a: x, b: y}) for _ in range(400)) if allowed(r)), None)
            if row is not None:
                rows.append(row)
                seen.update((c, row[c], d, row[d]) for c, d in itertools.combinations(names, 2))
    return rows


def allowed(row):
    kl = row["result"] in ("row", "sum", "mean", "none")
    if not kl and (row["beta"] != 1.0 or row["free_bits"]):
        return False
    if row["result"] == "z" and row["prior"]:
        return False
    return not (row["result"] == "none" and row["free_bits"] == "row")


ROWS = all_pairs(OPTIONS, allowed)
LEAVES = ("mean", "logvar", "noise", "prior_mean", "prior_logvar")


def randn(shape, generator):
    """On the test's device; the numbers are the same on each."""
    return torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device())


def operands(row):
    """float64 leaves that the dtype represents exactly, and the noise that the call draws or is given."""
    g = torch.Generator().manual_seed(1)
    shape = row["shape"]
    make = lambda size, scale=1.0: (scale * randn(size, g)).to(row["dtype"]).double()
    leaves = {"mean": make(shape), "logvar": make(shape, 0.7)}
    if row["prior"]:
        prior = shape if row["prior"] == "own" else shape[1:] if len(shape) == 4 else (shape[1], 1)
        leaves |= {"prior_mean": make(prior), "prior_logvar": make(prior, 0.5)}
    count = {None: 1, "pairs": 2}.get(row["samples"], row["samples"])
    if row["noise"] == "given":
        leaves["noise"] = make((count, *shape) if row["samples"] else shape)
        return leaves, None
    key = {"seed": SEEDS if row["noise"] == "seeds" else 11, "stream": (1 << 56) + 3, "dtype": torch.float32}
    drawn = [
        rng.normal(shape, **key, offset=2 + i * SAMPLE_STEP, device="cpu", backend="reference") for i in range(count)
    ]
    return leaves, torch.stack(drawn).double().to(torch.get_default_device())


def expected(row, leaves, drawn, dtype):
    """What an author would write, in dtype."""
    m, lv = leaves["mean"], leaves["logvar"]
    eps = leaves["noise"].reshape(-1, *row["shape"]) if drawn is None else drawn.to(dtype)
    if row["samples"] == "pairs":
        eps = torch.stack((eps, -eps), 1).flatten(0, 1)
    if row["clamp"]:
        lv = lv.clamp(*row["clamp"])
    std = (0.5 * lv).exp()
    z = m + std * eps
    pm = leaves.get("prior_mean", torch.zeros_like(m)).expand_as(m)
    plv = leaves.get("prior_logvar", torch.zeros_like(m)).expand_as(m)
    q = distributions.Normal(m, std, validate_args=False)
    p = distributions.Normal(pm, (0.5 * plv).exp(), validate_args=False)
    dims = tuple(range(1, m.dim()))
    outputs = [z if row["samples"] else z[0]]
    if row["result"] == "weights":
        inner = tuple(d + 1 for d in dims)
        outputs += [q.log_prob(z).sum(inner), p.log_prob(z).sum(inner)]
    elif row["result"] != "z":
        kl = distributions.kl_divergence(q, p)
        if row["free_bits"] == "element":
            kl = kl.clamp_min(0.25)
        if row["result"] != "none":
            kl = kl.sum(dims)
        if row["free_bits"] == "row":
            kl = kl.clamp_min(FLOOR[0])
        kl = row["beta"] * kl
        outputs.append({"sum": torch.sum, "mean": torch.mean}.get(row["result"], lambda x: x)(kl))
    return outputs


FLOOR = [0.0]       # the rows' free bits of the case at hand: between two rows of the truth


def call(row, leaves, backend):
    """What onepass gives, in the case's dtype."""
    options = {"backend": backend, "clamp": row["clamp"]}
    if row["form"] == "two":
        options |= {"mean": leaves["mean"], "logvar": leaves["logvar"]}
    else:
        options |= {"mean": torch.cat((leaves["mean"], leaves["logvar"]), row["form"]), "chunk_dim": row["form"]}
    if row["prior"]:
        options |= {name: leaves[name] for name in ("prior_mean", "prior_logvar")}
    if row["samples"]:
        options |= {"samples": 4, "antithetic": True} if row["samples"] == "pairs" else {"samples": row["samples"]}
    options |= {
        "given": {"noise": leaves.get("noise")},
        "seed": {"seed": 11, "stream": 3, "offset": 2},
        "seeds": {"seed": SEEDS.to(torch.get_default_device()), "stream": 3, "offset": 2},
        "generator": {"generator": rng.Generator(11, 2), "stream": 1, "offset": 2},
    }[row["noise"]]
    if row["result"] == "weights":
        return list(onepass.reparameterize_log_weights(**{"samples": 1, **options}))
    if row["result"] == "z":
        return [onepass.reparameterize(**options)]
    if row["free_bits"]:
        floor = FLOOR[0] if row["free_bits"] == "row" else 0.25
        options |= {"free_bits": floor, "free_bits_of": row["free_bits"]}
    return list(onepass.reparameterize_kl(**options, reduction=row["result"], beta=row["beta"]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(str(x).replace("torch.", "") for x in row.values()))
def test_every_pair_of_options(row, backend):
    leaves, drawn = operands(row)
    if row["result"] == "weights" and row["samples"] is None:
        row = {**row, "samples": 1}                                     # samples= is required there
        leaves |= {"noise": leaves["noise"][None]} if "noise" in leaves else {}
    names = [name for name in LEAVES if name in leaves]

    def run(function, dtype):
        own = {name: leaves[name].to(dtype).requires_grad_() for name in names}
        outputs = function(own)
        g = torch.Generator().manual_seed(2)
        grads = [randn(x.shape, g).to(x.dtype) for x in outputs]
        return outputs, torch.autograd.grad(outputs, list(own.values()), grads, allow_unused=True)

    if row["free_bits"] == "row":
        with torch.no_grad():
            rows = expected({**row, "free_bits": None, "beta": 1.0, "result": "row"}, leaves, drawn, torch.float64)[1]
        FLOOR[0] = rows.sort().values[:2].mean().item()
    truth, same = (run(lambda own, d=d: expected(row, own, drawn, d), d) for d in (torch.float64, row["dtype"]))
    got = run(lambda own: call(row, own, backend), row["dtype"])
    for name, a, b, c in zip(("z", "first", "second"), got[0], same[0], truth[0], strict=False):
        assert a.shape == c.shape and a.dtype == (row["dtype"] if name == "z" else torch.float32)
        assert_as_good_as_torch(a, b, c, name)
    for name, a, b, c in zip(names, got[1], same[1], truth[1], strict=True):
        if c is None:
            assert a is None or not a.any()
            continue
        assert a.dtype == row["dtype"]
        assert_as_good_as_torch(a, b, c, f"gradient of {name}")


@pytest.mark.parametrize("terms", ["none", "row", "element", "weights"])
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("antithetic", [False, True])
def test_reference_gradcheck(terms, prior, antithetic):
    g = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
    parameters, noise = make(2, 6, 3), make(2 if antithetic else 4, 2, 3, 3)
    given = (make(2, 3, 3), make(2, 3, 3)) if prior else ()

    def run(parameters, noise, *given):
        args = (parameters, None, noise, 0, None, 0, None, 0, None, *(given or (None, None)))
        out = torch.ops.onepass.latent_sample(*args, 1, -0.5, 1.0, 4, antithetic, terms, 0.7, 0.2, backend="reference")
        return out[: {"none": 1, "row": 2, "element": 2, "weights": 3}[terms]]

    assert torch.autograd.gradcheck(run, (parameters, noise, *given))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_clamp_passes_gradient_at_its_bounds_as_torchs_does(backend):
    logvar = torch.tensor([[-2.0, -1.0, 0.0, 1.0, 2.0, math.nan]], requires_grad=True)
    mean, noise = torch.zeros(1, 6, requires_grad=True), torch.ones(1, 6)
    z = onepass.reparameterize(mean, logvar, noise=noise, clamp=(-1.0, 1.0), backend=backend)
    plain = mean + (0.5 * logvar.clamp(-1.0, 1.0)).exp() * noise
    torch.testing.assert_close(z, plain, equal_nan=True)
    got, want = (torch.autograd.grad(x.sum(), logvar)[0] for x in (z, plain))
    torch.testing.assert_close(got, want, equal_nan=True)
    assert (got[0, 1:4] != 0).all() and (got[0, [0, 4]] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_are_calls_further_on_and_pairs_are_mirrored(backend):
    g = torch.Generator().manual_seed(3)
    mean, logvar = randn((2, 3, 5, 7), g)
    for key in ({"seed": 9, "offset": 4}, {"seed": torch.arange(3)}):
        z = onepass.reparameterize(mean, logvar, samples=4, **key, backend=backend)
        assert torch.equal(onepass.reparameterize(mean, logvar, samples=2, **key, backend=backend), z[:2])
        for k in range(4):
            later = {**key, "offset": key.get("offset", 0) + k * SAMPLE_STEP}
            assert torch.equal(onepass.reparameterize(mean, logvar, **later, backend=backend), z[k])
        pairs = onepass.reparameterize(mean, logvar, samples=4, antithetic=True, **key, backend=backend)
        assert torch.equal(pairs[0::2], z[:2])
        torch.testing.assert_close((pairs[0::2] + pairs[1::2]) / 2, mean.expand(2, 3, 5, 7))


@needs_native
@pytest.mark.parametrize("chunk_dim", [0, 1, 2, -1])
def test_a_chunked_tensor_is_read_and_its_gradient_written_where_it_lies(chunk_dim, monkeypatch):
    from onepass._native import latent

    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x, *a, **k: pytest.fail("a copy"))
    shape = [4, 6, 8, 10]
    parameters = torch.randn(shape)
    key = (3, None, 1 << 56, None, 0, None)
    options = (None, None, chunk_dim % 4, -30.0, 20.0, 0, False, "row", 1.0, -math.inf)
    half = parameters.narrow(chunk_dim, 0, shape[chunk_dim] // 2)
    z, _, _ = latent.forward(parameters, None, None, *key, *options)
    assert z.shape == half.shape
    grad, *_ = latent.backward(torch.ones_like(z), None, None, parameters, None, None, *key, *options, False, False)
    on_mean = grad.narrow(chunk_dim, 0, half.shape[chunk_dim])
    assert grad.shape == parameters.shape and torch.equal(on_mean, torch.ones_like(z))


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("chunk_dim", [0, 1, 2, -1])
def test_triton_reads_and_writes_halves_where_they_lie(chunk_dim, backend, monkeypatch):
    from onepass.kernels import latent

    parameters = torch.randn(4, 6, 8, 16)
    mean, logvar = parameters.chunk(2, chunk_dim)
    options = (chunk_dim % 4, -30.0, 20.0, 0, False, "row", 1.0, -math.inf)
    call = latent._Call(mean, logvar, (None, None), None, (3, None, 1 << 56, None, 0, None), options, mean, mean)
    assert call.place(mean)[0] is mean and call.place(logvar)[0] is logvar and call.unit == 4

    def run():
        x = parameters.clone().requires_grad_()
        z, kl = onepass.reparameterize_kl(x, chunk_dim=chunk_dim, seed=3, backend=backend)
        return z, kl, torch.autograd.grad(z.sum() + kl.sum(), x)[0]

    narrow = run()
    monkeypatch.setattr(latent, "_NARROW", 0)                           # places counted in int64, as in huge segments
    assert all(map(torch.equal, run(), narrow))


@needs_native
def test_forward_saves_nothing_but_its_inputs():
    parameters, prior = torch.randn(4, 64, 32, requires_grad=True), torch.randn(2, 4, 32, 32, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        onepass.reparameterize_log_weights(
            parameters, samples=8, seed=1, prior_mean=prior[0], prior_logvar=prior[1], backend="cpu"
        )
    assert {x.untyped_storage().data_ptr() for x in saved} == {
        x.untyped_storage().data_ptr() for x in (parameters, prior)
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_depend_on_the_batch_or_the_threads(backend):
    threads = torch.get_num_threads()
    for shape in ((5, 6, 7), (40, 2, 3), (3, 2, 1100 if INTERPRETED else 2500)):
        g = torch.Generator().manual_seed(4)
        parameters, seeds = randn(shape, g), torch.arange(shape[0]) + 2**35
        run = lambda x, s: onepass.reparameterize_log_weights(x, samples=3, seed=s, backend=backend)
        whole = run(parameters, seeds)
        assert all(map(torch.equal, run(parameters, seeds), whole))
        try:
            for n in (1, 2, 3) if backend == "cpu" else (threads,):
                torch.set_num_threads(n)
                for b in range(0, shape[0], 1 + shape[0] // 5):
                    alone = run(parameters[b : b + 1], seeds[b : b + 1])
                    assert all(torch.equal(x[:, 0], y[:, b]) for x, y in zip(alone, whole, strict=True))
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_sizes_and_scalars(backend):
    for shape in ((0, 4), (3, 0)):
        mean = torch.zeros(shape, requires_grad=True)
        z, kl = onepass.reparameterize_kl(mean, mean, samples=2, seed=1, clamp=(-1, 1), backend=backend)
        (grad,) = torch.autograd.grad(z.sum() + kl.sum(), mean)
        assert z.shape == (2, *shape) and torch.equal(kl, torch.zeros(shape[0])) and grad.shape == shape
    one = torch.tensor(0.5)
    assert onepass.reparameterize(one, one, samples=2, seed=1, backend=backend).shape == (2,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_and_strides(backend):
    g = torch.Generator().manual_seed(5)
    base = randn((3, 9, 5, 8), g)
    parameters = base.permute(0, 3, 2, 1)                              # no dim where its neighbours expect it
    out = torch.full((2, 3, 4, 5, 9), math.nan).transpose(0, 1).contiguous().transpose(0, 1)
    got = onepass.reparameterize(parameters, samples=2, seed=3, out=out, backend=backend)
    want = onepass.reparameterize(parameters.contiguous(), samples=2, seed=3, backend=backend)
    assert got.data_ptr() == out.data_ptr() and torch.equal(got, want)
    leaves = [parameters.detach().requires_grad_(), parameters.contiguous().requires_grad_()]
    grads = [torch.autograd.grad(onepass.reparameterize(x, seed=3, backend=backend).sin().sum(), x)[0] for x in leaves]
    assert torch.equal(*grads)


ISA_CODE = """
import torch, onepass
from onepass import _native
assert _native._C.isa == {isa!r}
g = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for shape in ((3, 14, 5), (2, 2, 1300)):
        p, pm, plv = (torch.randn(s, generator=g).to(dtype).requires_grad_()
                      for s in (shape, (shape[1] // 2, 1), (shape[1] // 2, 1)))
        results = []
        for backend in ("cpu", "reference"):
            z, *both = onepass.reparameterize_log_weights(
                p, samples=4, antithetic=True, seed=3, clamp=(-1, 1), prior_mean=pm, prior_logvar=plv, backend=backend)
            z2, kl = onepass.reparameterize_kl(
                p, seed=3, beta=0.5, free_bits=0.1, prior_mean=pm, prior_logvar=plv, backend=backend)
            loss = z.float().sin().sum() + both[1].sum() - both[0].sum() + kl.sum()
            results.append((z, *both, z2, kl, *torch.autograd.grad(loss, (p, pm, plv))))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-3)
print("ok")
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    assert run_python(ISA_CODE.format(isa=isa), ONEPASS_CPU_ISA=isa).strip() == "ok"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("terms", ["none", "row", "element", "weights"])
def test_library_op(terms, backend):
    g = torch.Generator().manual_seed(0)
    parameters = randn((3, 4, 2), g).requires_grad_()
    prior = [randn((3, 2, 2), g).requires_grad_() for _ in range(2)]
    noise = randn((2, 3, 2, 2), g).requires_grad_()
    for given in (noise, None):
        args = (parameters, None, given, 3, None, 2, None, 0, None, *prior, 1, -1.0, 1.0, 4, True, terms, 0.5, 0.1)
        torch.library.opcheck(torch.ops.onepass.latent_sample.default, args, {"backend": backend})


def test_compiles_and_vmaps():
    torch._dynamo.reset()
    f = lambda x: onepass.reparameterize_kl(x, seed=3, clamp=(-1, 1), beta=0.5)[1].sum()
    x = torch.randn(3, 4, 2, requires_grad=True)
    got, want = (torch.autograd.grad(g(x), x)[0] for g in (torch.compile(f, fullgraph=True, backend="aot_eager"), f))
    torch.testing.assert_close(got, want)
    with torch._subclasses.FakeTensorMode():
        z, q, p = onepass.reparameterize_log_weights(torch.empty(3, 4, 2), samples=5, seed=1)
        assert z.shape == (5, 3, 2, 2) and q.shape == p.shape == (5, 3)


@pytest.mark.parametrize(("function", "change", "error", "text"), [
    ("reparameterize", {"mean": torch.zeros(2, 3)}, ValueError, "mean has 3 elements in dim 1, expected an even"),
    ("reparameterize", {"chunk_dim": 2}, ValueError, "chunk_dim=2: expected a dim of mean, which has 2"),
    ("reparameterize", {"logvar": torch.zeros(2, 4), "chunk_dim": 1}, ValueError, "logvar and chunk_dim are both"),
    ("reparameterize", {"clamp": 3.0}, TypeError, r"clamp=3.0: expected \(low, high\)"),
    ("reparameterize", {"clamp": (1, -1)}, ValueError, "expected low <= high"),
    ("reparameterize", {"samples": 0}, ValueError, "samples=0: expected an int from 1"),
    ("reparameterize", {"antithetic": True}, ValueError, "antithetic=True: expected samples, an even number"),
    ("reparameterize", {"samples": 3, "antithetic": True}, ValueError, "samples=3 with antithetic=True"),
    ("reparameterize", {"samples": 2, "noise": torch.zeros(2, 2)}, ValueError,
     r"noise has shape \(2, 2\), expected \(2, 2, 2\)"),
    ("reparameterize", {"seed": 1, "generator": rng.Generator(1)}, ValueError, "seed and generator are both given"),
    ("reparameterize", {"noise": torch.zeros(2, 2), "generator": rng.Generator(1)}, ValueError,
     "noise and generator are both given"),
    ("reparameterize", {"generator": 3}, TypeError, "generator is int, expected a Generator"),
    ("reparameterize", {"generator": [rng.Generator(1)]}, ValueError, "generator is a list of 1, expected one for"),
    ("reparameterize", {"out": torch.zeros(2, 4)}, ValueError, r"out has shape \(2, 4\), expected \(2, 2\)"),
    ("reparameterize_kl", {"prior_mean": torch.zeros(2, 2)}, ValueError, "expected both or neither"),
    ("reparameterize_kl", {"prior_mean": torch.zeros(3), "prior_logvar": torch.zeros(2)}, ValueError,
     r"prior_mean has shape \(3,\), expected one that broadcasts to \(2, 2\)"),
    ("reparameterize_kl", {"prior_mean": torch.zeros(2).half(), "prior_logvar": torch.zeros(2)}, TypeError,
     "prior_mean is torch.float16 on cpu, expected torch.float32"),
    ("reparameterize_kl", {"free_bits": 1.0, "free_bits_of": "row", "reduction": "none"}, ValueError,
     "free_bits_of='row'"),
    ("reparameterize_kl", {"free_bits": 1.0, "free_bits_of": "batch"}, ValueError, "expected one of element, row"),
    ("reparameterize_kl", {"backend": "cuda"}, ValueError, "a tensor is on cpu, the kernel reads device memory"),
])
def test_bad_input(function, change, error, text):
    with pytest.raises(error, match=text):
        getattr(onepass, function)(**{"mean": torch.zeros(2, 4), **change})
