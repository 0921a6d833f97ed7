"""The replay of torch's CUDA streams: golden numbers, the layout word by word, and on a GPU the real thing."""
import math

import pytest
import torch

from onepass import rng
from onepass.reference import rng as reference

on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]


def test_the_first_numbers_of_seed_0():
    """Printed by many a user of torch.manual_seed(0) on a GPU."""
    drawn = rng.torch_cuda_normal((4,), 0, 0, 40, 1024)
    known = torch.tensor([-0.92466259, -0.42534415, -2.6438457, 0.14518388])
    torch.testing.assert_close(drawn, known, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("n", "sm_count", "threads"), [(1, 40, 1024), (1000, 2, 512), (5000, 2, 512), (9001, 3, 300)])
def test_the_layout_word_by_word(n, sm_count, threads):
    """Number i is word i // G % 4 of block i // 4 G of thread i % G, G threads in the grid."""
    grid = min(math.ceil(n / 256), sm_count * (threads // 256)) * 256
    u = rng.torch_cuda_uniform((n,), 2**40 + 5, 8, sm_count, threads)
    for i in range(0, n, 1 + n // 97):
        block, lane, thread = i // (4 * grid), i // grid % 4, i % grid
        words = reference.words(1, 4, torch.tensor(2**40 + 5), torch.tensor(thread), torch.tensor(2 + block))
        assert u[i] == words[0, lane].float() * 2.0**-32 + 2.0**-33
    z = rng.torch_cuda_normal((n,), 2**40 + 5, 8, sm_count, threads).double()
    for i in range(0, n, 1 + n // 97):
        at = i % grid + i // (4 * grid) * 4 * grid
        lane = i // grid % 4
        pair = [at + (lane // 2 * 2 + k) * grid for k in range(2)]
        if pair[1] < n:
            radius, angle = math.sqrt(-2 * math.log(u[pair[0]])), 2 * math.pi * u[pair[1]]
            assert abs(z[i] - radius * (math.sin(angle), math.cos(angle))[lane % 2]) < 2e-6


def test_one_wave_does_not_know_the_device_and_more_do():
    small = [rng.torch_cuda_normal((40_960,), 1, 0, *size) for size in ((40, 1024), (132, 2048))]
    assert torch.equal(*small)
    large = [rng.torch_cuda_normal((40_961,), 1, 0, *size) for size in ((40, 1024), (132, 2048))]
    assert not torch.equal(*large)


def test_offsets_follow_one_another():
    n, size = 700, (1, 256)
    later = rng.torch_cuda_uniform((n,), 3, rng.torch_cuda_offset_after(n, *size), *size)
    whole = rng.torch_cuda_uniform((1024 + n,), 3, 0, *size)
    assert rng.torch_cuda_offset_after(n, *size) == 4 and rng.torch_cuda_offset_after(1025, *size) == 8
    assert torch.equal(later, whole[1024:]) and rng.torch_cuda_offset_after(0, *size) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_types_round_once_and_uniforms_stay_below_1(dtype):
    u = rng.torch_cuda_uniform((300, 1000), 5, 0, 132, dtype=dtype)
    wide = rng.torch_cuda_uniform((300, 1000), 5, 0, 132).to(dtype)
    assert u.dtype == dtype and u.shape == (300, 1000) and u.max() < 1
    assert torch.equal(u, torch.where(wide == 1, 0, wide))
    z = rng.torch_cuda_normal((300, 1000), 5, 0, 132, dtype=dtype)
    assert torch.equal(z, rng.torch_cuda_normal((300, 1000), 5, 0, 132).to(dtype))
    assert abs(z.float().mean()) < 0.01 and abs(z.float().std() - 1) < 0.01


@pytest.mark.parametrize("n", [1, 1000, 300_000, 5_000_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [pytest.param("cuda", marks=on_a_gpu)])
def test_against_the_gpu_at_hand(backend, n, dtype):
    at = torch.cuda.get_device_properties(0)
    size = at.multi_processor_count, at.max_threads_per_multi_processor
    generator = torch.Generator("cuda").manual_seed(11)
    offset = 0
    for _ in range(2):
        real = torch.rand(n, dtype=dtype, device="cuda", generator=generator).cpu()
        assert torch.equal(rng.torch_cuda_uniform((n,), 11, offset, *size, dtype=dtype), real)
        offset += rng.torch_cuda_offset_after(n, *size)
        real = torch.randn(n, dtype=dtype, device="cuda", generator=generator).cpu()
        replayed = rng.torch_cuda_normal((n,), 11, offset, *size, dtype=dtype)
        torch.testing.assert_close(replayed, real, rtol=torch.finfo(dtype).eps, atol=2e-5)
        offset += rng.torch_cuda_offset_after(n, *size)


@pytest.mark.parametrize(("change", "error", "text"), [
    ({"shape": (-1,)}, ValueError, "shape=-1: expected at least 0"),
    ({"seed": 1.5}, TypeError, "seed is float, expected an int"),
    ({"offset": 3}, ValueError, "offset=3: expected a multiple of 4"),
    ({"sm_count": 0}, ValueError, "sm_count=0: expected at least 1"),
    ({"max_threads_per_sm": 255}, ValueError, "max_threads_per_sm=255: expected at least 256"),
    ({"dtype": torch.float64}, TypeError, "dtype=torch.float64: expected float32, bfloat16 or float16"),
])
def test_bad_input(change, error, text):
    with pytest.raises(error, match=text):
        rng.torch_cuda_normal(**{"shape": (4,), "seed": 0, "offset": 0, "sm_count": 40, **change})
