"""The sampler: completions with the trainer's own numbers."""

from jax_rlvr.sampling.draw import Drawn as Drawn
from jax_rlvr.sampling.draw import draw as draw
from jax_rlvr.sampling.draw import inverse_cdf as inverse_cdf
from jax_rlvr.sampling.engine import Engine as Engine
from jax_rlvr.sampling.requests import Completed as Completed
from jax_rlvr.sampling.requests import Group as Group
from jax_rlvr.sampling.requests import Progress as Progress
from jax_rlvr.sampling.requests import never as never
from jax_rlvr.sampling.stop import stops as stops
from jax_rlvr.sampling.stop import written as written
from jax_rlvr.sampling.transforms import Transform as Transform
from jax_rlvr.sampling.transforms import chain as chain
from jax_rlvr.sampling.transforms import (
  entropy_temperature as entropy_temperature,
)
from jax_rlvr.sampling.transforms import min_p as min_p
from jax_rlvr.sampling.transforms import (
  repetition_penalty as repetition_penalty,
)
from jax_rlvr.sampling.transforms import temperature as temperature
from jax_rlvr.sampling.transforms import top_k as top_k
from jax_rlvr.sampling.transforms import top_p as top_p
