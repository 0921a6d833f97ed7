"""onepass.integrations.distributions against torch.distributions."""
import pytest
import torch
from torch import distributions
from torch.distributions import kl_divergence

from onepass import rng
from onepass.integrations.distributions import Independent, Normal


def pair(shape=(3, 4), **options):
    g = torch.Generator().manual_seed(0)
    loc, scale = torch.randn(shape, generator=g), torch.rand(shape, generator=g) + 0.1
    return Normal(loc, scale, **options), distributions.Normal(loc, scale, **options)


def test_all_but_the_noise_is_torchs():
    ours, stock = pair()
    assert isinstance(ours, distributions.Normal)
    x = torch.randn(2, 3, 4)
    for name in ("log_prob", "cdf"):
        assert torch.equal(getattr(ours, name)(x), getattr(stock, name)(x))
    assert torch.equal(ours.icdf(x.sigmoid()), stock.icdf(x.sigmoid()))
    for name in ("mean", "mode", "stddev", "variance", "batch_shape", "event_shape"):
        a, b = getattr(ours, name), getattr(stock, name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert torch.equal(ours.entropy(), stock.entropy())
    assert type(ours.expand((5, 3, 4))) is Normal and ours.expand((5, 3, 4)).rsample((2,)).shape == (2, 5, 3, 4)
    for bad in ({"scale": -1.0}, {"loc": float("nan")}):
        for kind in (Normal, distributions.Normal):
            with pytest.raises(ValueError, match="Expected parameter"):
                kind(**{"loc": 0.0, "scale": 1.0, **bad}, validate_args=True)
    with pytest.raises(ValueError, match="within the support"):
        Normal(0.0, 1.0, validate_args=True).log_prob(torch.tensor(float("nan")))
    assert Normal(0.0, 1.0).sample().shape == ()


@pytest.mark.parametrize("key", [{"seed": 5, "stream": 2}, {"generator": rng.Generator(5, 2)}])
def test_samples_are_the_keys_own(key):
    ours, stock = pair()
    z = ours.rsample((6,), **key)
    eps = rng.normal((6, 3, 4), seed=5, stream=2)
    assert torch.equal(z, torch.addcmul(stock.loc, eps, stock.scale))
    assert torch.equal(ours.sample((6,), seed=5, stream=2), z)


def test_a_seed_for_each_row_gives_what_it_gives_alone():
    ours, _ = pair()
    seeds = torch.tensor([3, 1, 2])
    z = ours.sample(seed=seeds)
    for b in range(3):
        assert torch.equal(Normal(ours.loc[b : b + 1], ours.scale[b : b + 1]).sample(seed=int(seeds[b]))[0], z[b])
    generators = lambda: [torch.Generator().manual_seed(i) for i in range(3)]
    assert torch.equal(ours.sample(generator=generators()), ours.sample(generator=generators()))


def test_seedless_samples_follow_torchs_generator_and_have_no_graph():
    loc = torch.zeros(1000, requires_grad=True)
    torch.manual_seed(1)
    first = Normal(loc, 1.0).sample()
    torch.manual_seed(1)
    assert torch.equal(Normal(loc, 1.0).sample(), first) and not first.requires_grad
    assert abs(first.mean()) < 0.2 and 0.9 < first.std() < 1.1


@pytest.mark.parametrize("shapes", [((3, 4), (3, 4)), ((4,), (3, 1)), ((), (3, 4))])
def test_rsample_gradients_replay_the_noise_and_keep_nothing(shapes):
    loc, scale = (torch.rand(shape, dtype=torch.float64).add(0.5).requires_grad_() for shape in shapes)
    assert torch.autograd.gradcheck(lambda m, s: Normal(m, s).rsample((2,), seed=3), (loc, scale))
    assert torch.autograd.gradgradcheck(lambda m, s: Normal(m, s).rsample((2,), seed=3).sin(), (loc, scale))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        Normal(loc, scale).rsample((2,), seed=3)
    assert not saved


def test_kl_divergences_are_torchs():
    ours, stock = pair()
    others = Normal(stock.loc + 1, stock.scale * 2), distributions.Normal(stock.loc + 1, stock.scale * 2)
    want = kl_divergence(stock, others[1])
    for p, q in ((ours, others[0]), (ours, others[1]), (stock, others[0])):
        assert torch.equal(kl_divergence(p, q), want)
    together = kl_divergence(Independent(ours, 1), Independent(others[0], 1))
    assert torch.equal(together, want.sum(-1))
    laplace = distributions.Laplace(0.0, 1.0)
    assert torch.equal(kl_divergence(ours, laplace), kl_divergence(stock, laplace))


def test_independent():
    ours, stock = pair()
    both = Independent(ours, 1), distributions.Independent(stock, 1)
    x = torch.randn(2, 3, 4)
    assert torch.equal(both[0].log_prob(x), both[1].log_prob(x)) and torch.equal(both[0].entropy(), both[1].entropy())
    assert both[0].event_shape == (4,) and both[0].batch_shape == (3,)
    z = both[0].rsample((5,), seed=3)
    assert torch.equal(z, ours.rsample((5,), seed=3)) and torch.equal(both[0].sample((5,), seed=3), z)
    assert type(both[0].expand((6, 3)).base_dist) is Normal


def test_bad_input():
    ours, _ = pair()
    with pytest.raises(ValueError, match="seed and generator are both given"):
        ours.sample(seed=1, generator=rng.Generator(1))
    with pytest.raises(ValueError, match=r"seed has shape \(2,\), expected \(\) or \(3,\)"):
        ours.sample(seed=torch.arange(2))
