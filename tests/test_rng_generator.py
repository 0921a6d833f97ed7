"""rng.Generator: pairs that never repeat, state that comes back, children of its own."""
import concurrent.futures
import pickle

import pytest
import torch

import onepass
from onepass import rng
from onepass.reference import rng as reference


def test_pairs_are_a_seed_and_the_next_stream():
    generator = rng.Generator(7, stream=3)
    assert [generator.next() for _ in range(3)] == [(7, 3), (7, 4), (7, 5)]
    first = rng.normal((5,), generator=generator)
    assert torch.equal(first, rng.normal((5,), seed=7, stream=6))
    assert torch.equal(rng.uniform((5,), generator=generator, stream=10), rng.uniform((5,), seed=7, stream=17))
    assert repr(generator) == "Generator(seed=7, stream=8)"


def test_every_function_takes_one():
    generator = rng.Generator(7)
    for name in (*reference.DISTRIBUTIONS, "bits"):
        stream = generator._stream
        drawn = getattr(rng, name)((4, 3), generator=generator)
        assert torch.equal(drawn, getattr(rng, name)((4, 3), seed=7, stream=stream))
    x = torch.zeros(4, 6)
    for call in (lambda **k: onepass.reparameterize(x, x, **k), lambda **k: onepass.reparameterize_kl(x, **k)[0],
                 lambda **k: onepass.reparameterize_log_weights(x, samples=2, **k)[0],
                 lambda **k: onepass.gumbel_softmax(x, **k)):
        seed, stream = 7, generator._stream
        assert torch.equal(call(generator=generator), call(seed=seed, stream=stream))
    assert generator._stream == 11


def test_threads_share_it():
    generator = rng.Generator(1)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        pairs = list(pool.map(lambda _: generator.next(), range(4000)))
        drawn = list(pool.map(lambda _: rng.normal((8,), generator=generator), range(200)))
        children = [c.seed for some in pool.map(lambda _: generator.spawn(5), range(40)) for c in some]
    assert sorted(stream for _, stream in pairs) == list(range(4000))
    assert len({tuple(x.tolist()) for x in drawn}) == 200 and len(set(children)) == 200
    expected = {tuple(rng.normal((8,), seed=1, stream=4000 + i).tolist()) for i in range(200)}
    assert {tuple(x.tolist()) for x in drawn} == expected


@pytest.mark.parametrize("seed", [5, -3, 2**64 - 1, torch.tensor([4, -5, 6])])
def test_state_comes_back(seed, tmp_path):
    generator = rng.Generator(seed, 9)
    generator.next(), generator.spawn(2)
    torch.save(generator.state_dict(), tmp_path / "state.pt")
    rows = (3, 4)
    expected = rng.normal(rows, generator=generator), rng.normal(rows, generator=generator.fork())
    again = rng.Generator(0)
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    other = pickle.loads(pickle.dumps(again))
    for one in (again, other):
        got = rng.normal(rows, generator=one), rng.normal(rows, generator=one.fork())
        assert all(map(torch.equal, got, expected))


def test_children_are_the_parents_alone_and_new_each_time():
    parent = rng.Generator(3)
    children = [*parent.spawn(3), parent.fork()]
    assert len({child.seed for child in children}) == 4 and all(0 <= child.seed < 2**64 for child in children)
    twin = rng.Generator(3)
    assert [child.seed for child in twin.spawn(4)] == [child.seed for child in children]
    assert rng.Generator(4).fork().seed not in {child.seed for child in children}
    assert parent.next() == (3, 0)                          # a parent's own pairs do not know its children
    grandchildren = [child.fork().seed for child in children]
    assert len({*grandchildren, *(child.seed for child in children)}) == 8
    word = reference.words(1, 4, torch.tensor(3), torch.tensor(-(1 << 56)), torch.tensor(0))[0]      # stream 0xFF << 56
    assert children[0].seed == word[0].item() | word[1].item() << 32
    x = torch.stack([rng.normal((50_000,), generator=one) for one in (parent, *children)])
    assert (torch.corrcoef(x) - torch.eye(5)).abs().max() < 5 / 50_000**0.5


def test_a_seed_for_each_row():
    seeds = torch.tensor([5, 6, 7])
    generator = rng.Generator(seeds)
    first = rng.normal((3, 10), generator=generator)
    for b in range(3):
        assert torch.equal(first[b], rng.normal((10,), seed=5 + b))
    assert torch.equal(rng.normal((3, 10), generator=generator), rng.normal((3, 10), seed=seeds, stream=1))
    children = generator.fork().seed
    assert children.shape == (3,) and children[1].item() % 2**64 == rng.Generator(6).fork().seed


def test_lists_of_generators_are_one_for_each_row():
    def own():
        return [rng.Generator(5, 2), torch.Generator().manual_seed(1), rng.Generator(2**64 - 1)]

    whole = rng.normal((3, 10), generator=own())
    for b in range(3):
        assert torch.equal(rng.normal((1, 10), generator=[own()[b]])[0], whole[b])
        assert torch.equal(rng.normal((1, 10), generator=own()[b])[0], whole[b])
    assert torch.equal(whole[0], rng.normal((10,), seed=5, stream=2))


def test_torchs_generator_gives_the_seed():
    own = lambda: torch.Generator().manual_seed(3)
    assert torch.equal(rng.normal((9,), generator=own()), rng.normal((9,), generator=own()))
    generator = own()
    assert not torch.equal(rng.normal((9,), generator=generator), rng.normal((9,), generator=generator))


def test_seedless_follows_torchs_default_generator():
    torch.manual_seed(8)
    first = rng.Generator()
    torch.manual_seed(8)
    assert rng.Generator().seed == first.seed != rng.Generator().seed


def test_inside_compile_it_is_refused():
    torch._dynamo.reset()
    generator = rng.Generator(1)
    with pytest.raises(Exception, match="would draw the same pair always"):
        torch.compile(lambda: rng.normal((3,), generator=generator), fullgraph=True, backend="eager")()


@pytest.mark.parametrize(("make", "error", "text"), [
    (lambda: rng.Generator("a"), TypeError, "seed is str, expected an int"),
    (lambda: rng.Generator(True), TypeError, "seed is bool"),
    (lambda: rng.Generator(torch.zeros(3)), TypeError, "seed is torch.float32"),
    (lambda: rng.Generator(1, 2**56), ValueError, "expected 0 <= stream < 2"),
    (lambda: rng.Generator(1, 1.0), TypeError, "stream is float"),
    (lambda: rng.Generator(1).spawn(-1), ValueError, "count=-1: expected an int >= 0"),
    (lambda: rng.Generator(1).load_state_dict({"seed": 1}), ValueError, "expected seed, stream and children"),
    (lambda: [g := rng.Generator(1, 2**56 - 1), g.next(), g.next()], ValueError, "has handed out all"),
    (lambda: rng.normal((3,), generator=rng.Generator(torch.arange(2))), ValueError, r"seed has shape \(2,\)"),
    (lambda: rng.normal((2,), generator=[rng.Generator(torch.arange(2))] * 2), ValueError, "expected one seed each"),
    (lambda: rng.normal((2,), seed=1, generator=rng.Generator(1)), ValueError, "seed and generator are both given"),
])
def test_bad_input(make, error, text):
    with pytest.raises(error, match=text):
        make()
