"""onepass: fused kernels for generative models, the same numbers on every backend."""
from importlib.metadata import PackageNotFoundError as _NotFound
from importlib.metadata import version as _version

from . import rng
from .attention import attention, attention_with_kvcache, merge_attention
from .registry import FallbackWarning, use_backend
from .reparam import reparameterize, reparameterize_kl

try:
    __version__ = _version("onepass")
except _NotFound:       # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "FallbackWarning",
    "__version__",
    "attention",
    "attention_with_kvcache",
    "merge_attention",
    "reparameterize",
    "reparameterize_kl",
    "rng",
    "use_backend",
]
