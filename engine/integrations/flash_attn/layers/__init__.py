"""As flash_attn.layers."""
from . import rotary

__all__ = ["rotary"]
