"""Plans of denoising: what each step of a sampler does, as a table of coefficients built once on the host."""
from .multistep import dpmpp_2m
from .plan import DenoisePlan, Row
from .sigma import euler, euler_ancestral, flow_match_euler
from .variance import ddim, ddpm, lcm

__all__ = [
    "DenoisePlan", "Row", "ddim", "ddpm", "dpmpp_2m", "euler", "euler_ancestral", "flow_match_euler", "lcm",
]
