"""onepass inside Hugging Face transformers: attention for every model class, and a cache that appends in place.

`register()` once, then `from_pretrained(..., attn_implementation="onepass")`; or `accelerate(model)` for a model that
is already there. `OnePassCache(config=model.config)` goes to `generate(past_key_values=...)` or to the model.
"""
from .attention import Report, accelerate, attention_forward, register, restore
from .cache import OnePassCache
from .mask import attention_mask

__all__ = [
    "OnePassCache",
    "Report",
    "accelerate",
    "attention_forward",
    "attention_mask",
    "register",
    "restore",
]
