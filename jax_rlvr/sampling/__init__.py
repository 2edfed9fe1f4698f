"""The sampler: completions with the trainer's own numbers."""

from jax_rlvr.sampling.draw import draw as draw
from jax_rlvr.sampling.draw import inverse_cdf as inverse_cdf
from jax_rlvr.sampling.loop import Sampled as Sampled
from jax_rlvr.sampling.loop import sample as sample
