"""attn_implementation="onepass" in real model classes with random weights: logits, tokens, gradients, masks, verbs."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5", reason="the extra [transformers] is not installed")

from onepass.integrations.transformers import (  # noqa: E402
    OnePassCache,
    accelerate,
    attention_forward,
    attention_mask,
    register,
    restore,
)

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None, "initializer_range": 0.3,
}  # fmt: skip
_MIXED = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
DECODERS = {
    "Llama": {},
    "Mistral": {"sliding_window": 7},
    "Gemma2": {
        "tie_word_embeddings": False, "sliding_window": 7, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16,
    },
    "Gemma3": {**_MIXED, "tie_word_embeddings": False},
    "Qwen3": {},
    "GptOss": {**_MIXED, "num_local_experts": 2, "num_experts_per_tok": 1},
}  # fmt: skip


@functools.cache
def decoder(name: str, layers: int = 2):
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sizes = SIZES | DECODERS[name] | {"num_hidden_layers": layers}
        model = getattr(transformers, f"{name}ForCausalLM")(config(**sizes)).eval()
    if name == "GptOss":
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks)
    return model


@functools.cache
def encoder():
    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim", "initializer_range")}
    config = transformers.BertConfig(**sizes, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    return transformers.BertForMaskedLM(config).eval()


def prompts(side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and padding of three rows of 20, 15 and 9 tokens."""
    ids = torch.randint(2, 97, (3, 20), generator=torch.Generator().manual_seed(1))
    padding = torch.ones_like(ids)
    for row, n in ((1, 5), (2, 11)):
        padding[row, slice(n) if side == "left" else slice(20 - n, None)] = 0
    return ids * padding, padding


@pytest.fixture(autouse=True)
def one_thread():
    """Threads of models this small only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def eager_again():
    yield
    for model in (*(decoder(name) for name in DECODERS if decoder.cache_info().currsize), encoder()):
        model.set_attn_implementation("eager")


def run(model, implementation: str, **inputs):
    register()
    model.set_attn_implementation(implementation)
    return model(**inputs)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_logits_are_those_of_eager(name, side):
    model = decoder(name)
    ids, padding = prompts(side)
    inputs = {"input_ids": ids, "attention_mask": padding if side != "none" else None, "use_cache": False}
    for grad in (False, True):      # with gradients the mask is applied, without them left padding is skipped
        with torch.set_grad_enabled(grad):
            truth, logits = (run(model, i, **inputs).logits.detach() for i in ("eager", "onepass"))
        kept = padding.bool() if side != "none" else torch.ones_like(padding).bool()
        torch.testing.assert_close(logits[kept], truth[kept], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        shifted = run(model, "onepass", **inputs | {"input_ids": (ids + 1) % 97}).logits
    assert (shifted - truth).abs().max() > 0.1      # the tolerance tells outputs apart


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens_are_those_of_eager(name):
    model = decoder(name)
    ids, padding = prompts()
    inputs = {"input_ids": ids, "attention_mask": padding, "max_new_tokens": 16, "do_sample": False}
    model.set_attn_implementation("eager")
    truth = model.generate(**inputs)
    assert truth[:, 20:].unique().numel() > 5
    report = accelerate(model)
    assert len(report.swapped) == 2 and not report.kept and report.before == "eager"
    assert torch.equal(model.generate(**inputs), truth)
    assert torch.equal(model.generate(**inputs, past_key_values=OnePassCache(config=model.config)), truth)
    assert torch.equal(model.generate(**inputs, cache_implementation="static"), truth)
    alone = model.generate(ids[1:2, 5:], max_new_tokens=16, do_sample=False)
    assert torch.equal(alone[0, 15:], truth[1, 20:])
    restore(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", DECODERS)
def test_gradients_are_those_of_eager(name):
    model = decoder(name)
    ids, padding = prompts("right")
    grads = []
    for implementation in ("eager", "onepass"):
        model.zero_grad()
        run(model, implementation, input_ids=ids, attention_mask=padding, labels=ids.where(padding.bool(), -100),
            use_cache=False).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert set(grads[0]) == set(grads[1]) and (name != "GptOss" or any("sinks" in n for n in grads[1]))
    for n, truth in grads[0].items():
        torch.testing.assert_close(grads[1][n], truth, rtol=1e-3, atol=1e-4 * float(truth.abs().max() + 1), msg=n)


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_encoder_attends_both_ways(side):
    model = encoder()
    ids, padding = prompts(side)
    with torch.no_grad():
        truth, logits = (
            run(model, i, input_ids=ids, attention_mask=padding).logits[padding.bool()] for i in ("eager", "onepass")
        )
    torch.testing.assert_close(logits, truth, rtol=1e-4, atol=1e-4)


def test_half_precision_is_as_close_as_eager():
    model = decoder("Llama")
    ids, padding = prompts()
    kept = padding.bool()
    with torch.no_grad():
        truth = run(model, "eager", input_ids=ids, attention_mask=padding).logits[kept]
        half = transformers.LlamaForCausalLM(model.config).eval()
        half.load_state_dict(model.state_dict())
        half.bfloat16()
        same, ours = (
            run(half, i, input_ids=ids, attention_mask=padding).logits[kept].float() for i in ("eager", "onepass")
        )
    assert (ours - truth).norm() <= 1.2 * (same - truth).norm()


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "GptOss"])
@pytest.mark.parametrize("grad", [False, True])
def test_autocast(name, grad):
    model = decoder(name)
    ids, padding = prompts()
    with torch.set_grad_enabled(grad):
        truth = run(model, "eager", input_ids=ids, attention_mask=padding, use_cache=False).logits.detach()
        with torch.autocast("cpu", torch.bfloat16):
            same, ours = (
                run(model, i, input_ids=ids, attention_mask=padding, use_cache=False).logits.detach()
                for i in ("eager", "onepass")
            )
    kept = padding.bool()
    assert ours.dtype == same.dtype
    assert (ours.float() - truth)[kept].norm() <= 1.5 * (same.float() - truth)[kept].norm()


def test_unusual_masks_are_whole_tables():
    model = decoder("Llama")
    ids, _ = prompts()
    tree = torch.randint(0, 2, (3, 1, 20, 20), generator=torch.Generator().manual_seed(2)).bool() | torch.eye(20).bool()
    additive = torch.zeros(3, 1, 20, 20).masked_fill(~tree, torch.finfo(torch.float32).min)
    packed = torch.cat([torch.arange(12), torch.arange(8)]).expand(3, -1)       # two texts in a row
    with torch.no_grad():
        for ours, theirs in (
            ({"attention_mask": tree}, {"attention_mask": additive}),
            ({"attention_mask": additive}, {"attention_mask": additive}),
            ({"position_ids": packed, "use_cache": False}, {"position_ids": packed, "use_cache": False}),
        ):
            truth = run(model, "eager", input_ids=ids, **theirs).logits
            torch.testing.assert_close(run(model, "onepass", input_ids=ids, **ours).logits, truth, rtol=1e-4, atol=1e-4)


def test_the_mask_says_only_what_the_rule_does_not():
    causal, config = {"batch_size": 3, "q_length": 20, "kv_length": 20}, decoder("Mistral").config
    left, right = (prompts(side)[1].bool() for side in ("left", "right"))
    assert attention_mask(**causal) is None
    assert attention_mask(**causal, attention_mask=torch.ones(3, 20).bool()) is None
    assert attention_mask(**causal, local_size=7, config=config) is None
    padded = attention_mask(**causal, attention_mask=left)
    assert torch.equal(padded, left) and padded.leftpad.tolist() == [0, 5, 11] and padded.leftpad.dtype == torch.int32
    assert not hasattr(attention_mask(**causal, attention_mask=right), "leftpad")
    window = attention_mask(3, 1, 7, 19, 13, attention_mask=left, local_size=7, config=config)
    assert window is None       # all padding lies before the window
    for change in ({"allow_is_causal_skip": False}, {"kv_length": 30}, {"local_size": 5, "config": config},
                   {"q_offset": torch.tensor(0)}):  # fmt: skip
        assert attention_mask(**causal | change, device="cpu").shape == (3, 1, 20, 30 if "kv_length" in change else 20)


@pytest.mark.parametrize("queries", [1, 4])
def test_a_padded_row_has_the_bits_of_the_row_alone(queries):
    q, k, v = (torch.randn(3, h, n, 16, generator=torch.Generator().manual_seed(h + n))
               for h, n in ((4, queries), (2, 20), (2, 20)))  # fmt: skip
    padding, module = prompts()[1].bool(), torch.nn.Module()
    mask = attention_mask(3, queries, 20, 20 - queries, attention_mask=padding)
    for options in ({}, {"sliding_window": 6}, {"softcap": 2.0, "s_aux": torch.randn(4)}):
        out = attention_forward(module, q, k, v, mask, **options)[0]
        for row, n in enumerate((0, 5, 11)):
            one = (q[row : row + 1], k[row : row + 1, :, n:], v[row : row + 1, :, n:])
            assert torch.equal(attention_forward(module, *one, None, **options)[0][0], out[row])


def test_a_biased_mask_adds_up():
    q, k, v = (torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 2, 3))
    bias, module = torch.randn(1, 4, 6, 6), torch.nn.Module()
    module.is_causal = True
    tril = torch.ones(6, 6).tril().bool()
    whole = bias.masked_fill(~tril, -torch.inf)
    truth = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=whole.expand(2, -1, -1, -1))
    for mask in (None, tril[None, None], torch.zeros(6, 6).masked_fill(~tril, -torch.inf)[None, None]):
        out, weights = attention_forward(module, q, k, v, mask, position_bias=bias)
        torch.testing.assert_close(out.transpose(1, 2), truth, rtol=1e-5, atol=1e-5)
        assert weights is None


def test_what_is_not_taken_is_refused_by_name():
    x, module = torch.zeros(1, 2, 3, 4), torch.nn.Module()
    for name, value in (("dropout", 0.1), ("output_attentions", True), ("cache", object())):
        with pytest.raises(ValueError, match=rf"^{name}\b"):
            attention_forward(module, x, x, x, None, **{name: value})


def test_verbs_and_construction():
    register()
    config = transformers.LlamaConfig(**SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="onepass")
    assert model.config._attn_implementation == "onepass"
    other = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES), attn_implementation="sdpa")
    restore(other)
    assert other.config._attn_implementation == "sdpa"
    assert accelerate(other).before == "sdpa" and accelerate(other).before == "sdpa"
    restore(other)
    assert other.config._attn_implementation == "sdpa"
