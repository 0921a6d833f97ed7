"""onepass: fused kernels for generative models, the same numbers on every backend."""
from importlib.metadata import PackageNotFoundError as _NotFound
from importlib.metadata import version as _version

from . import plans, rng
from .attention import attention, attention_with_kvcache, merge_attention
from .attention_varlen import attention_varlen
from .denoise import denoise_step
from .gumbel import gumbel_softmax
from .interpolate import lerp, slerp
from .plans import DenoisePlan
from .registry import FallbackWarning, use_backend
from .reparam import reparameterize, reparameterize_kl, reparameterize_log_weights
from .volrend import Rendering, composite

try:
    __version__ = _version("onepass")
except _NotFound:       # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "DenoisePlan",
    "FallbackWarning",
    "Rendering",
    "__version__",
    "attention",
    "attention_varlen",
    "attention_with_kvcache",
    "composite",
    "denoise_step",
    "gumbel_softmax",
    "lerp",
    "merge_attention",
    "plans",
    "reparameterize",
    "reparameterize_kl",
    "reparameterize_log_weights",
    "rng",
    "slerp",
    "use_backend",
]
