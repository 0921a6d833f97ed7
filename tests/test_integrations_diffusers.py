"""onepass.integrations.diffusers against diffusers itself."""
import copy

import pytest
import torch

import onepass

pytest.importorskip("diffusers", minversion="0.35", reason="the extra [diffusers] is not installed")

from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Stock

from onepass.integrations.diffusers import DiagonalGaussianDistribution, accelerate, randn_tensor, restore

LATENTS = ((3, 8, 6, 5), (2, 8, 3, 4, 5))      # images, video


def pair(shape, dtype=torch.float32, seed=0, **options):
    """Our distribution and diffusers' of the same parameters, some beyond the clamp."""
    parameters = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    parameters[:, -1] *= 15
    leaves = [parameters.to(dtype).requires_grad_() for _ in range(2)]
    return DiagonalGaussianDistribution(leaves[0], **options), Stock(leaves[1], **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("shape", LATENTS)
def test_attributes_kl_nll_and_mode(shape, deterministic, dtype):
    ours, stock = pair(shape, dtype, deterministic=deterministic)
    assert isinstance(ours, Stock) and ours.deterministic is deterministic
    for name in ("parameters", "mean", "logvar", "std", "var"):
        a, b = getattr(ours, name), getattr(stock, name)
        assert a.dtype == b.dtype and torch.equal(a, b), name
    close = {"rtol": 2e-2 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-4}
    others = pair(shape, dtype, seed=1)
    to_others = ((ours.kl(other), stock.kl(others[1])) for other in others)
    for a, b in ((ours.kl(), stock.kl()), *to_others):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, **close)
    point = torch.randn_like(stock.mean)
    torch.testing.assert_close(ours.nll(point), stock.nll(point), **close)
    assert torch.equal(ours.mode(), stock.mode())


def test_kl_to_a_deterministic_one_is_what_diffusers_gives():
    (ours, stock), other = pair(LATENTS[0]), pair(LATENTS[0], deterministic=True)[1]
    torch.testing.assert_close(ours.kl(other), stock.kl(other), equal_nan=True)


@pytest.mark.parametrize("shape", LATENTS)
@pytest.mark.parametrize("first", ["sample", "kl"])
def test_gradients_of_a_sample_with_its_kl(shape, first):
    ours, stock = pair(shape)
    if first == "kl":
        ours.kl()
    z, kl = ours.sample(torch.Generator().manual_seed(4)), ours.kl()
    eps = ((z - ours.mean) / ours.std).detach()
    expected = stock.mean + stock.std * eps
    torch.testing.assert_close(z, expected)
    on_z, on_kl = torch.randn(z.shape), torch.randn(kl.shape)
    torch.autograd.backward((z, kl), (on_z, on_kl))
    torch.autograd.backward((expected, stock.kl()), (on_z, on_kl))
    torch.testing.assert_close(ours.parameters.grad, stock.parameters.grad, rtol=1e-4, atol=1e-3)


def test_a_kl_asked_for_without_gradient_does_not_stand_for_one_with():
    ours, _ = pair(LATENTS[0])
    with torch.no_grad():
        ours.sample()
        assert not ours.kl().requires_grad
    assert ours.kl().requires_grad


def test_generators_and_lists_of_them():
    ours, _ = pair(LATENTS[0])
    generators = lambda: [torch.Generator().manual_seed(i) for i in range(3)]
    z = ours.sample(generators())
    assert torch.equal(ours.sample(generators()), z) and not torch.equal(ours.sample(), z)
    for b in range(3):
        alone = DiagonalGaussianDistribution(ours.parameters[b : b + 1])
        assert torch.equal(alone.sample(generators()[b]), z[b : b + 1])
        assert torch.equal(alone.sample([generators()[b]]), z[b : b + 1])
    assert torch.equal(ours.sample(generators()[0]), ours.sample(generators()[0]))
    assert torch.equal(ours.sample(onepass.rng.Generator(5)), ours.sample(seed=5))
    eps = (z - ours.mean) / ours.std
    assert abs(eps.mean()) < 0.5 and 0.5 < eps.std() < 1.5
    torch.manual_seed(3)
    first = ours.sample()
    torch.manual_seed(3)
    assert torch.equal(ours.sample(), first)


def test_deterministic_sample_is_the_mean():
    ours, stock = pair(LATENTS[0], deterministic=True)
    assert torch.equal(ours.sample(), stock.sample())


def tiny_vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, layers_per_block=1, sample_size=16,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    ).eval()


@pytest.mark.parametrize("slicing", [False, True])
def test_an_accelerated_vae_and_back(slicing):
    vae, stock = tiny_vae(), tiny_vae()
    report = accelerate(vae)
    assert report.swapped == ("encode",) and not report.kept and "diffusers" in report.before
    if slicing:
        vae.enable_slicing(), stock.enable_slicing()
    x = torch.randn(3, 3, 16, 16)
    ours, theirs = vae.encode(x).latent_dist, stock.encode(x).latent_dist
    assert type(ours) is DiagonalGaussianDistribution and type(theirs) is Stock
    assert torch.equal(ours.parameters, theirs.parameters)
    torch.testing.assert_close(ours.kl(), theirs.kl())
    assert type(vae.encode(x, return_dict=False)[0]) is DiagonalGaussianDistribution
    assert torch.equal(vae(x).sample, stock(x).sample)
    g = lambda: torch.Generator().manual_seed(1)
    seen = vae(x, sample_posterior=True, generator=g()).sample
    assert torch.equal(vae(x, sample_posterior=True, generator=g()).sample, seen)
    accelerate(vae)                                             # twice does no harm
    restore(vae)
    restore(vae)
    assert type(vae.encode(x).latent_dist) is Stock


def test_a_model_that_is_no_autoencoder_kl_is_reported_and_kept():
    model = torch.nn.Linear(2, 2)
    report = accelerate(model)
    assert not report.swapped and "Linear has its own" in report.kept[0]
    restore(model)


def test_randn_tensor():
    shape = (3, 4, 5)
    generators = lambda: [torch.Generator().manual_seed(i) for i in range(3)]
    whole = randn_tensor(shape, generator=generators(), device="cpu", dtype=torch.bfloat16)
    assert whole.shape == shape and whole.dtype == torch.bfloat16
    for b in range(3):
        assert torch.equal(randn_tensor((1, 4, 5), [generators()[b]], dtype=torch.bfloat16), whole[b : b + 1])
    seeds = torch.tensor([7, 8, 9])
    assert torch.equal(randn_tensor(shape, seed=seeds)[1], randn_tensor((1, 4, 5), seed=8)[0])
    assert torch.equal(randn_tensor(shape, seed=seeds), onepass.rng.normal(shape, seed=seeds))
    with pytest.raises(ValueError, match="layout="):
        randn_tensor(shape, layout=torch.sparse_coo)
    with pytest.raises(ValueError, match="a list of 2, expected one for each of 3 rows"):
        randn_tensor(shape, generators()[:2])


def test_a_pipelines_copy_of_the_vae_works_alone():
    vae = tiny_vae()
    accelerate(vae)
    twin = copy.deepcopy(vae)
    assert type(twin.encode(torch.randn(1, 3, 16, 16)).latent_dist) is DiagonalGaussianDistribution
