"""The attention function of transformers' AttentionInterface, and the verbs that put it into models."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import attention, attention_with_kvcache
from ...attention import autocast
from .mask import attention_mask as mask_function

NAME = "onepass"


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,                              # [B, H, Sq, D]
    key: Tensor,                                # [B, Hkv, Sk, D]
    value: Tensor,                              # [B, Hkv, Sk, Dv]
    attention_mask: Tensor | None,              # None, [B, Sk] bool or [B, 1 or H, Sq, Sk] bool or additive
    dropout: float = 0.0,                       # above 0 is refused
    scaling: float | None = None,
    sliding_window: int | None = None,          # keys that a causal query sees, its own included
    softcap: float | None = None,
    is_causal: bool | None = None,              # None: what the module says
    s_aux: Tensor | None = None,                # [H]: sinks
    position_bias: Tensor | None = None,        # additive, [1 or B, H, Sq, Sk]
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:                       # [B, Sq, H, Dv]
    """`onepass.attention` of one layer; gradients flow to query, key, value and s_aux.

    A mask with four dims is the whole pattern. Without one, or with a padding mask [B, Sk], the causal rule and the
    window of the layer hold; left padding is then skipped, not masked, where no gradient is wanted.
    """
    if dropout > 0:
        raise ValueError(f"dropout={dropout}: onepass has no attention dropout, set that of the config to 0")
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions=True: onepass never forms the weights, use attn_implementation='eager'")
    if cache is not None:
        raise ValueError(f"cache is a {type(cache).__name__}: onepass does not serve continuous batching")
    if position_bias is not None and _gradient(position_bias):
        raise ValueError("position_bias requires a gradient, which onepass does not give: train it with 'eager'")
    q, k, v = autocast(*(x.transpose(1, 2) for x in (query, key, value)))   # else rotary may leave v in another dtype
    options: dict[str, Any] = {"softcap": softcap or 0.0, "scale": scaling, "sinks": s_aux}
    whole = attention_mask is not None and attention_mask.dim() == 4
    if not whole and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        options["causal"] = True
        if sliding_window is not None:
            options["window"] = (sliding_window - 1, 0)
    leftpad = getattr(attention_mask, "leftpad", None)
    if leftpad is not None and position_bias is None and not _gradient(q, k, v, s_aux):
        out = attention_with_kvcache(q, k, v, cache_seqlens=k.shape[1], cache_leftpad=leftpad, **options)
    else:
        out = attention(q, k, v, mask=_mask(attention_mask, position_bias, k.shape[1]), **options)
    assert isinstance(out, Tensor)
    return out, None


def _gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _mask(mask: Tensor | None, bias: Tensor | None, keys: int) -> Tensor | None:
    if mask is not None:
        mask = mask[:, None, None, :] if mask.dim() == 2 else mask[..., :keys]
    if bias is None:
        return mask
    bias = bias[..., :keys]
    if mask is None:
        return bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else mask + bias


def register(name: str = NAME) -> None:
    """Makes attn_implementation=`name` known to transformers, with the masks that go with it. Again does no harm."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, mask_function)


@dataclass(frozen=True)
class Report:
    """What `accelerate` swapped, by module name."""

    swapped: tuple[str, ...]
    kept: tuple[str, ...]       # attention modules of submodels that refuse another implementation
    before: str                 # the implementation that was there


def accelerate(model: Any) -> Report:
    """Sets the model's attention to onepass, in place; `restore` undoes it."""
    register()
    before = getattr(model, "_onepass_before", None) or model.config._attn_implementation
    model.set_attn_implementation(NAME)
    model._onepass_before = before
    layers = {
        name: layer.config._attn_implementation == NAME
        for name, layer in model.named_modules()
        if hasattr(layer, "is_causal") and hasattr(layer, "config")
    }
    swapped = tuple(name for name, mine in layers.items() if mine)
    return Report(swapped, tuple(name for name, mine in layers.items() if not mine), before)


def restore(model: Any) -> None:
    """Gives a model that `accelerate` changed its attention back; another model stays as it is."""
    before = getattr(model, "_onepass_before", None)
    if before is not None:
        model.set_attn_implementation(before)
        del model._onepass_before
