"""examples/compare_vae.py: training with onepass learns what training with plain PyTorch does, in less memory."""
import importlib.util
import pathlib

import pytest
import torch

from helpers import needs_native

pytest.importorskip("sklearn", reason="the extra [demo] is not installed")

PATH = pathlib.Path(__file__).parents[1] / "examples" / "compare_vae.py"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("compare_vae", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)


@needs_native
def test_loss_curves_agree_and_a_wrong_side_would_show(example):
    images, _ = example.digits.load()
    example.BATCH = 32
    seeds, count = range(4), 60
    wrong = lambda: lambda parameters: (lambda z, kl: (z, 0.9 * kl))(*example.fused()(parameters))
    example.SIDES["wrong"] = wrong
    curves = {side: [example.curve(images, side, seed, count) for seed in seeds] for side in example.SIDES}
    assert all(run[-1] < 0.75 * run[0] for runs in curves.values() for run in runs)
    apart = example.distances(curves)
    assert len(apart) == 3 and max(map(abs, apart)) < 3
    # The sides of a seed share weights and images: their paired losses tell a KL that is 10% too small.
    def paired(side):
        gaps = torch.tensor([a[-1] - b[-1] for a, b in zip(curves[side], curves["stock"], strict=True)])
        return (gaps.mean() / (gaps.std() / len(gaps) ** 0.5)).abs()

    assert paired("onepass") < 4 < paired("wrong")


@needs_native
def test_a_step_holds_less_memory(example):
    images, _ = example.digits.load()
    assert example.peak_bytes(images, "onepass") <= 0.6 * example.peak_bytes(images, "stock")
