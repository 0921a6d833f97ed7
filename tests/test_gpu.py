"""A first look at a real GPU, run by `make gpu-check`: the same call on CUDA tensors and on CPU tensors."""
from __future__ import annotations

import pytest
import torch

import onepass
from onepass import _native

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.filterwarnings("ignore::onepass.FallbackWarning"),
]


def test_device_information() -> None:
    properties = torch.cuda.get_device_properties(0)
    assert properties.multi_processor_count > 0
    assert properties.L2_cache_size > 0
    if _native.error is None and _native._C.has_cuda:
        assert any(properties.name in device for device in _native._C.cuda_devices())


@pytest.mark.parametrize("name", ["uniform", "normal", "gumbel", "exponential", "laplace", "logistic"])
def test_random_numbers_have_the_same_bits(name: str) -> None:
    draw = getattr(onepass.rng, name)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        on_gpu = draw([3, 1021], seed=5, stream=3, dtype=dtype, device="cuda")
        on_cpu = draw([3, 1021], seed=5, stream=3, dtype=dtype, device="cpu", backend="reference")
        assert torch.equal(on_gpu.cpu(), on_cpu)


def test_seed_tensors_are_read_on_the_device() -> None:
    seeds = torch.tensor([3, -1, 7])
    on_gpu = onepass.rng.normal([3, 257], seed=seeds.cuda())
    assert torch.equal(on_gpu.cpu(), onepass.rng.normal([3, 257], seed=seeds, backend="reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reparameterize_agrees_with_the_cpu(dtype: torch.dtype) -> None:
    mean, logvar = torch.randn(2, 5, 3, 33).to(dtype)
    results = []
    for device in ("cpu", "cuda"):
        leaves = [x.detach().to(device).requires_grad_() for x in (mean, logvar)]
        z, kl = onepass.reparameterize_kl(*leaves, seed=11)
        gradients = torch.autograd.grad((z, kl), leaves, (torch.ones_like(z), torch.ones_like(kl)))
        results.append([x.detach().cpu() for x in (z, kl, *gradients)])
    for cpu, gpu in zip(*results, strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=2 * torch.finfo(cpu.dtype).eps, atol=1e-5)


def test_calls_are_captured_in_a_graph() -> None:
    mean, logvar, noise = torch.randn(3, 4, 64, device="cuda")
    onepass.reparameterize(mean, logvar, noise=noise)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = onepass.reparameterize(mean, logvar, noise=noise)
    noise.normal_()
    graph.replay()
    torch.testing.assert_close(captured, mean + torch.exp(0.5 * logvar) * noise)
