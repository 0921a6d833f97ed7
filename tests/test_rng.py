"""Random numbers: known answers, the frozen recipe, the same bits everywhere; statistics are in a file of their own."""
import math

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

import onepass
from onepass import rng
from onepass.reference import rng as reference

from helpers import ALL_BACKENDS, INTERPRETED, ISAS, KERNELS, device_of, needs_native, run_python

FUNCTIONS = {name: getattr(rng, name) for name in reference.DISTRIBUTIONS}


KNOWN_ANSWERS = pytest.mark.parametrize(("counter", "key", "expected"), [     # Random123's, for philox4x32-10
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
])


@KNOWN_ANSWERS
def test_philox_known_answers(counter, key, expected):
    tensors = lambda xs: tuple(torch.tensor([x]) for x in xs)
    assert tuple(int(x) for x in reference.philox(tensors(counter), tensors(key))) == expected


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@KNOWN_ANSWERS
def test_bits_are_the_known_answers(counter, key, expected, backend):
    number = lambda low, high: low | high << 32
    drawn = rng.bits((4,), seed=number(*key), stream=number(*counter[2:]), offset=number(*counter[:2]),
                     device=device_of(backend), backend=backend)
    assert drawn.dtype == torch.int32 and tuple(x & 0xFFFFFFFF for x in drawn.tolist()) == expected


@pytest.mark.parametrize("backend", KERNELS)
def test_bits_take_every_shape_and_stride(backend):
    seeds = torch.arange(3, device=device_of(backend))
    keys = {(3, 7001): {"seed": seeds}, (5, 6): {"seed": -1, "offset": 2**40}, (0, 3): {"seed": 1}}
    for shape, key in keys.items():
        out = torch.zeros(*reversed(shape), dtype=torch.int32, device=seeds.device).t()
        got = rng.bits(shape, **key, out=out, backend=backend)
        assert got.data_ptr() == out.data_ptr()
        assert torch.equal(got, rng.bits(shape, **key, device=seeds.device, backend="reference"))


GOLDEN = {      # float32 bits of elements 0 to 7, seed 0x123456789ABCDEF0, stream 0x0100000000000007, offset 2^32 - 1
    "uniform": "3f7da2e1 3f5f4568 3f21cbc0 3f4978d7 3f58cbec 3e081c7b 3f036cf8 3efc4e48",
    "normal": "3dc1b0ae bdc8bf48 3e620042 bf6ea3d5 3ec6192e 3edade30 bf93a851 3d565b11",
    "gumbel": "bfc5ad45 bf38a130 39961d80 bedf3793 bf211de0 3ff948cb 3ea7ffab 3ec6593e",
    "exponential": "3c17fba7 3e0c12d8 3eeaed50 3e754689 3e2a350d 400126e6 3f2aaf37 3f352ab4",
    "laplace": "407f794f 3fae9018 3e9cf64a 3f5a72f3 3f977543 bfa994c0 3cde3ab9 bc6e26f5",
    "logistic": "40959eed 3ff5c6c9 3f0a7695 3fa749b5 3fdae7ad bff00c40 3d5b4b70 bcec7240",
}


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_golden_words(name, backend):
    drawn = FUNCTIONS[name](
        (8,), seed=0x123456789ABCDEF0, stream=0x0100000000000007, offset=2**32 - 1, dtype=torch.float32,
        backend=backend, device=device_of(backend),
    )
    assert [f"{x & 0xFFFFFFFF:08x}" for x in drawn.view(torch.int32).tolist()] == GOLDEN[name].split()


def test_uniform_follows_its_formula():
    words = reference.words(1, 4096, torch.tensor(3), torch.tensor(0), torch.tensor(0))[0].numpy().astype(np.uint32)
    u = np.minimum(words.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33), np.float32(1 - 2**-24))
    assert np.array_equal(rng.uniform((4096,), seed=3, dtype=torch.float32).numpy(), u)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_draws_follow_their_formulas(name):
    """float64 formulas on the same uniforms; the extreme words 0 and 2^32 - 1 too."""
    words = reference.words(1, 8192, torch.tensor(11), torch.tensor(5), torch.tensor(0))
    words[0, :4] = torch.tensor([0, 0xFFFFFFFF, 0xFFFFFFFF, 0])
    u = reference.unit(words).double()
    pair = u.reshape(1, -1, 2)
    radius, angle = (-2 * pair[..., 0].log()).sqrt(), 2 * math.pi * pair[..., 1]
    expected = {
        "uniform": u,
        "normal": torch.stack((radius * angle.cos(), radius * angle.sin()), -1).reshape(u.shape),
        "exponential": -u.log(),
        "gumbel": -(-torch.log1p(-u)).log(),
        "logistic": u.log() - torch.log1p(-u),
        "laplace": torch.where(u < 0.5, (2 * u).log(), -(2 * (1 - u)).log()),
    }[name]
    got = reference.draw(words, name)
    assert got.dtype == torch.float32 and got.isfinite().all()
    torch.testing.assert_close(got.double(), expected, rtol=6e-7, atol=8e-7)


@pytest.mark.parametrize("backend", KERNELS)
@settings(deadline=None, max_examples=20 if INTERPRETED else 60)
@given(
    name=st.sampled_from(sorted(FUNCTIONS)), shape=st.lists(st.integers(0, 70), min_size=0, max_size=3),
    seed=st.integers(0, 2**64 - 1), stream=st.integers(0, 2**64 - 1),
    offset=st.one_of(st.integers(0, 2**20), st.integers(2**32 - 40, 2**32 + 40), st.integers(2**63, 2**64 - 1)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_bit_equal_to_the_reference(backend, name, shape, seed, stream, offset, dtype):
    key = {"seed": seed, "stream": stream, "offset": offset}
    got, expected = (
        FUNCTIONS[name](shape, **key, dtype=dtype, backend=b, device=device_of(b)) for b in (backend, "reference")
    )
    assert torch.equal(got.cpu(), expected)


DIGEST = """
import hashlib, torch
from onepass import _native, rng
from onepass.reference.rng import DISTRIBUTIONS
assert _native._C.isa == {isa!r}
h = hashlib.sha256()
for name in DISTRIBUTIONS:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        seeds = torch.tensor([1, 2**40, -5])
        x = getattr(rng, name)((3, 40001), seed=seeds, stream=9, dtype=dtype, backend={backend!r})
        h.update(x.contiguous().view(torch.uint8).numpy().tobytes())
h.update(rng.bits((3, 40001), seed=seeds, stream=9, backend={backend!r}).numpy().tobytes())
print(h.hexdigest())
"""


@needs_native
def test_every_instruction_set_gives_the_same_bits():
    digests = {isa: run_python(DIGEST.format(isa=isa, backend="cpu"), ONEPASS_CPU_ISA=isa) for isa in ISAS}
    digests["reference"] = run_python(DIGEST.format(isa=ISAS[-1], backend="reference"))
    assert len(set(digests.values())) == 1, digests


@needs_native
def test_the_error_over_a_sample_of_words_is_below_two_ulp():
    import rng_error

    assert max(rng_error.measure(stride=4099).values()) < 2


@pytest.mark.slow
def test_the_error_over_every_word_is_below_two_ulp():
    import rng_error

    assert max(rng_error.measure(stride=1).values()) < 2


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_rows_offsets_and_prefixes(backend):
    """A row has the bits it has alone; a longer draw begins with the shorter one; offset skips blocks of four."""
    on = {"backend": backend, "device": device_of(backend)}
    seeds = torch.tensor([5, -1, 2**40, 5], device=on["device"])
    batch = rng.normal((4, 3, 37), seed=seeds, stream=torch.tensor([0, 1, 2, 3], device=on["device"]), **on)
    for b in range(4):
        alone = rng.normal((3, 37), seed=int(seeds[b]), stream=b, **on)
        assert torch.equal(batch[b], alone)
        assert torch.equal(rng.normal((1, 3, 37), seed=seeds[b : b + 1], stream=b, **on)[0], alone)
    longer = rng.normal((5000,), seed=8, **on)
    assert torch.equal(rng.normal((4999,), seed=8, **on), longer[:4999])
    assert torch.equal(rng.normal((4600,), seed=8, offset=100, **on), longer[400:])
    key = {name: torch.tensor(value, device=on["device"]) for name, value in (("seed", 8), ("offset", 100))}
    assert torch.equal(rng.normal((4600,), **key, **on), longer[400:])
    assert not torch.equal(rng.normal((5000,), seed=8, stream=1, **on), longer)


@needs_native
def test_strided_keys_and_thread_counts():
    seeds = torch.arange(12)[::3]
    whole = rng.normal((4, 50000), seed=seeds, backend="cpu")
    assert torch.equal(whole, rng.normal((4, 50000), seed=seeds.clone(), backend="reference"))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(whole, rng.normal((4, 50000), seed=seeds, backend="cpu"))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_out_takes_views_and_nothing_else_changes(backend):
    base = torch.full((6, 40), math.nan, device=device_of(backend))
    view = base[1:5, 3:37]
    got = rng.normal((4, 34), seed=3, out=view, backend=backend)
    assert got.data_ptr() == view.data_ptr()
    assert torch.equal(view.cpu(), rng.normal((4, 34), seed=3, backend="reference"))
    assert base[0].isnan().all() and base[5].isnan().all() and base[:, :3].isnan().all() and base[:, 37:].isnan().all()


def test_seed_none_follows_torchs_generator():
    torch.manual_seed(1)
    first, second = rng.normal((16,)), rng.normal((16,))
    torch.manual_seed(1)
    assert torch.equal(rng.normal((16,)), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("kwargs", "error", "text"), [
    ({"shape": (3, -1)}, ValueError, r"shape=\(3, -1\): expected sizes >= 0"),
    ({"seed": 1.5}, TypeError, "seed is float, expected an int or an int64 tensor"),
    ({"seed": torch.zeros(3)}, TypeError, "seed has dtype torch.float32"),
    ({"seed": torch.arange(5)}, ValueError, r"seed has shape \(5,\), expected \(\) or \(3,\)"),
    ({"dtype": torch.int32}, TypeError, "dtype=torch.int32: expected float32"),
    ({"out": torch.zeros(2)}, ValueError, r"out has shape \(2,\), expected \(3, 4\)"),
    ({"backend": "gpu"}, ValueError, "backend='gpu': expected one of cuda, triton, cpu, reference"),
    ({"backend": "cuda"}, ValueError, "rng_fill: backend='cuda' cannot take this call: device is cpu"),
])
def test_bad_input(kwargs, error, text):
    with pytest.raises(error, match=text):
        onepass.rng.normal(**{"shape": (3, 4), "seed": 0, **kwargs})


def test_library_op():
    args = ([3, 5], "normal", 7, None, 0, None, 0, None, torch.float32, torch.device("cpu"))
    torch.library.opcheck(torch.ops.onepass.rng_fill.default, args)
    seeds = ([3, 5], "normal", 0, torch.arange(3), 0, None, 0, None, torch.float32, torch.device("cpu"))
    torch.library.opcheck(torch.ops.onepass.rng_fill.default, seeds)


def test_compiles_without_recompiling_for_a_new_seed():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    f = torch.compile(lambda x, seed: x + rng.normal(x.shape, seed=seed), fullgraph=True, backend=counter)
    x = torch.zeros(4, 6)
    for seed in (torch.tensor(3), torch.tensor(4)):
        assert torch.equal(f(x, seed), rng.normal((4, 6), seed=seed))
    assert counter.frame_count == 1
    for seed in (5, 6, 7, 8):
        assert torch.equal(f(x, seed), rng.normal((4, 6), seed=seed))
    assert counter.frame_count <= 3         # an int argument: once as a constant, once as a symbol
