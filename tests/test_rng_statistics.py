"""Statistics of the random numbers, with fixed seeds; a good generator exceeds a bound with a chance below 1e-5."""
import math

import pytest
import torch

from onepass import rng
from onepass.reference.rng import DISTRIBUTIONS

N = 1 << 20
SIGMAS = 5.0


def draws(name, n=N, **key):
    return getattr(rng, name)((n,), **{"seed": 42, **key}, dtype=torch.float32).double()


def chi_square_bound(cells):
    """Wilson and Hilferty's quantile of chi-square with cells - 1 degrees of freedom."""
    k = cells - 1
    return k * (1 - 2 / (9 * k) + SIGMAS * math.sqrt(2 / (9 * k))) ** 3


def assert_even(counts, name):
    expected = counts.sum() / counts.numel()
    assert ((counts - expected) ** 2 / expected).sum() < chi_square_bound(counts.numel()), name


MOMENTS = {         # mean, variance, skewness, excess kurtosis
    "uniform": (0.5, 1 / 12, 0, -1.2), "normal": (0, 1, 0, 0), "exponential": (1, 1, 2, 6), "laplace": (0, 2, 0, 3),
    "gumbel": (0.5772156649015329, math.pi**2 / 6, 1.1395470994046487, 2.4), "logistic": (0, math.pi**2 / 3, 0, 1.2),
}
QUANTILE = {
    "uniform": lambda p: p, "normal": torch.special.ndtri, "exponential": lambda p: -torch.log1p(-p),
    "gumbel": lambda p: -(-p.log()).log(), "logistic": torch.logit,
    "laplace": lambda p: torch.where(p < 0.5, (2 * p).log(), -(2 * (1 - p)).log()),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_moments(name):
    mean, variance, skewness, kurtosis = MOMENTS[name]
    x = draws(name)
    centred = (x - mean) / math.sqrt(variance)
    assert abs(centred.mean()) < SIGMAS / math.sqrt(N)
    for power, expected in ((2, 1.0), (3, skewness), (4, kurtosis + 3)):
        terms = centred**power
        assert abs(terms.mean() - expected) < SIGMAS * terms.std() / math.sqrt(N), power


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_chi_square_of_cells_of_equal_probability(name):
    edges = QUANTILE[name](torch.arange(1, 1024, dtype=torch.float64) / 1024)
    assert_even(torch.bincount(torch.bucketize(draws(name), edges), minlength=1024).double(), name)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_tails(name):
    """As many numbers beyond far quantiles, on either side, as there ought to be."""
    x = draws(name, 1 << 23)
    for p in (1e-3, 1e-4, 1e-5):
        low, high = QUANTILE[name](torch.tensor([p, 1 - p], dtype=torch.float64))
        for count in ((x < low).sum(), (x > high).sum()):
            assert abs(count - p * len(x)) < SIGMAS * math.sqrt(p * len(x)) + 1, (name, p)
    assert x.isfinite().all()


def test_normals_stay_below_their_bound_and_reach_far():
    z = draws("normal", 1 << 23).abs()
    assert 5 < z.max() < 6.77


def test_kolmogorov_and_smirnov_on_many_seeds():
    """The distances themselves follow Kolmogorov's law: neither too large nor all small."""
    n = 4096
    z = rng.normal((200, n), seed=torch.arange(200), dtype=torch.float32).double().sort(-1).values
    steps = torch.arange(1, n + 1) / n
    cdf = torch.special.ndtr(z)
    distance = torch.maximum((steps - cdf).amax(-1), (cdf - steps + 1 / n).amax(-1)) * math.sqrt(n)
    assert distance.max() < 2.5 and distance.min() > 0.3
    assert 0.82 < distance.mean() < 0.92                        # Kolmogorov's mean: sqrt(pi / 2) ln 2 = 0.8687


def test_bits_and_bytes_are_even():
    words = rng.bits((N,), seed=7).long() & 0xFFFFFFFF
    for bit in range(32):
        ones = (words >> bit & 1).sum().item()
        assert abs(ones - N / 2) < SIGMAS * math.sqrt(N) / 2, bit
    for shift in (0, 8, 16, 24):
        assert_even(torch.bincount(words >> shift & 255, minlength=256).double(), shift)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 64])
def test_serial_pairs_fill_the_square(lag):
    u = draws("uniform")
    cells = (u[:-lag] * 64).long() * 64 + (u[lag:] * 64).long()
    assert_even(torch.bincount(cells, minlength=4096).double(), lag)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 63, 64])
def test_serial_correlation_of_normals_and_their_squares(lag):
    z = draws("normal")
    for x in (z, z * z - 1):
        assert abs((x[:-lag] * x[lag:]).mean() / x.var()) < SIGMAS / math.sqrt(N - lag)


NEIGHBOURS = {
    "streams": [{"stream": i} for i in range(16)],
    "op tags": [{"stream": i << 56} for i in range(16)],
    "seeds": [{"seed": i} for i in range(16)],
    "seeds a bit apart": [{"seed": 1 << i} for i in range(0, 64, 4)],
    "offsets": [{"offset": i << 32} for i in range(16)],
}


@pytest.mark.parametrize("kind", NEIGHBOURS)
def test_neighbouring_keys_are_independent(kind):
    n = 1 << 16
    keys = NEIGHBOURS[kind]
    z = torch.stack([draws("normal", n, **key) for key in keys])
    for x in (z, z * z - 1):
        away = torch.corrcoef(x) - torch.eye(len(keys))
        assert away.abs().max() < (SIGMAS + 0.5) / math.sqrt(n)
    words = torch.stack([rng.bits((n,), **{"seed": 42, **key}) for key in keys])
    for i in range(1, len(keys)):
        differing = sum(((words[0] ^ words[i]) >> bit & 1).sum().item() for bit in range(32))
        assert abs(differing - 16 * n) < SIGMAS * math.sqrt(8 * n)
