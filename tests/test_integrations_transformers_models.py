"""attn_implementation="onepass" in many more model classes with random weights: outputs and greedy tokens of eager."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5", reason="the extra [transformers] is not installed")

from test_integrations_transformers import one_thread, prompts  # noqa: E402, F401

from onepass.integrations.transformers import OnePassCache, accelerate, restore  # noqa: E402

ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
HIDDEN = {"vocab_size": 97, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128}
SIZES = {**HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2, "initializer_range": 0.3, **ENDS}
GROUPED = {**SIZES, "num_key_value_heads": 2}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
MULTI = {"d_model": 64, "vocab_size": 97, "decoder_start_token_id": 1, **ENDS}
DECODERS = {
    "Cohere2": {**GROUPED, "sliding_window": 7},
    "DeepseekV3": {  # values narrower than keys
        **SIZES, "n_routed_experts": 4, "num_experts_per_tok": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "n_group": 1,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 32, "topk_group": 1,
        "first_k_dense_replace": 2, "num_key_value_heads": 4,
    },
    "GPTNeoX": SIZES,
    "Llama4": {**GROUPED, **EXPERTS, "head_dim": 16, "attention_chunk_size": 8, "intermediate_size_mlp": 96},
    "Mixtral": {**GROUPED, **EXPERTS, "sliding_window": 7},
    "OPT": {
        **HIDDEN, **ENDS, "ffn_dim": 96, "num_hidden_layers": 2, "word_embed_proj_dim": 64, "dropout": 0,
        "init_std": 0.3,
    },
    "Olmo": GROUPED,
    "Phi3": {**GROUPED, "sliding_window": 7},
    "Qwen2": {**GROUPED, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "Qwen3Moe": {**GROUPED, "head_dim": 16, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32},
    "SmolLM3": GROUPED,
}  # fmt: skip
ENCODERS = {
    "DistilBertModel": {"vocab_size": 97, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4},
    "ModernBertModel": {**SIZES, "num_hidden_layers": 3, "local_attention": 6, "global_attn_every_n_layers": 3},
    "RobertaModel": SIZES,
}
SEQ2SEQ = {
    "Bart": {
        **MULTI, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "dropout": 0, "forced_eos_token_id": None, "init_std": 0.3,
    },
    "T5": {**MULTI, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "dropout_rate": 0},   # a bias by distance
}  # fmt: skip


def build(class_name: str, config: dict):
    config_name = class_name.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration").removesuffix("Model")
    config_name += "TextConfig" if config_name == "Llama4" else "Config"
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(getattr(transformers, config_name)(**config)).eval()
    model.set_attn_implementation("eager")
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name):
    model = build(f"{name}ForCausalLM", DECODERS[name])
    ids, padding = prompts()
    inputs = {"input_ids": ids, "attention_mask": padding, "max_new_tokens": 12, "do_sample": False}
    truth, tokens = model(ids, attention_mask=padding).logits, model.generate(**inputs)
    assert tokens[:, 20:].unique().numel() > 5
    assert len(accelerate(model).swapped) == 2
    kept = padding.bool()
    torch.testing.assert_close(model(ids, attention_mask=padding).logits[kept], truth[kept], rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(**inputs), tokens)
    assert torch.equal(model.generate(**inputs, past_key_values=OnePassCache(config=model.config)), tokens)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name, side):
    model = build(name, ENCODERS[name])
    ids, padding = prompts(side)
    truth = model(ids, attention_mask=padding).last_hidden_state
    accelerate(model)
    out, kept = model(ids, attention_mask=padding).last_hidden_state, padding.bool()
    torch.testing.assert_close(out[kept], truth[kept], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoders_with_decoders(name):
    model = build(f"{name}ForConditionalGeneration", SEQ2SEQ[name])
    ids, padding = prompts("right")
    inputs = {"input_ids": ids, "attention_mask": padding}
    truth = model(**inputs, decoder_input_ids=ids[:, :9]).logits
    tokens = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    assert len(accelerate(model).swapped) == 6
    torch.testing.assert_close(model(**inputs, decoder_input_ids=ids[:, :9]).logits, truth, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(**inputs, max_new_tokens=10, do_sample=False), tokens)
    if name == "T5":
        with torch.enable_grad(), pytest.raises(ValueError, match=r"^position_bias requires a gradient"):
            model(**inputs, decoder_input_ids=ids[:, :9])


@torch.no_grad()
def test_pictures_and_texts():
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 97, "max_position_embeddings": 32, "eos_token_id": 2},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
    )
    model = transformers.CLIPModel(config).eval()
    model.set_attn_implementation("eager")
    ids, padding = prompts("right")
    inputs = {"input_ids": ids, "attention_mask": padding, "pixel_values": torch.randn(3, 3, 32, 32)}
    truth = model(**inputs).logits_per_image
    assert len(accelerate(model).swapped) == 4
    torch.testing.assert_close(model(**inputs).logits_per_image, truth, rtol=1e-4, atol=1e-4)
    restore(model)
    assert model.config.text_config._attn_implementation == "eager"


def test_the_example_compares_six_ways(capsys):
    example = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "transformers_decode.py"))
    medians = example["main"](["--layers", "1", "--hidden", "32", "--prompt", "12", "--steps", "3", "--heads", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert len(medians) == 6 and len(lines) == 7
    assert all(float(line.rsplit(" ", 1)[1]) < 1e-5 for line in lines[1:])
