"""The functions of flash-attn 2.8 with their own signatures: `import onepass.integrations.flash_attn as flash_attn`.

The interface is that of github.com/Dao-AILab/flash-attention, flash_attn/flash_attn_interface.py. What differs: the LSE
of a query without keys is -inf (flash-attn 2 gives +inf), pages have any size, rotary_dim is any even number, and
`num_splits` and `deterministic` change nothing, since a result never depends on how the work was split.
"""
from . import bert_padding, flash_attn_interface, layers
from .flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from .layers.rotary import apply_rotary_emb

__all__ = [
    "apply_rotary_emb",
    "bert_padding",
    "flash_attn_func",
    "flash_attn_interface",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "layers",
]
