"""The policy: its shape, its forward pass, and weights from elsewhere."""

from jax_rlvr.policy.attention import Layout as Layout
from jax_rlvr.policy.config import PolicyConfig as PolicyConfig
from jax_rlvr.policy.config import RopeScaling as RopeScaling
from jax_rlvr.policy.decoder import Params as Params
from jax_rlvr.policy.decoder import Remat as Remat
from jax_rlvr.policy.decoder import abstract_params as abstract_params
from jax_rlvr.policy.decoder import cast as cast
from jax_rlvr.policy.decoder import forward as forward
from jax_rlvr.policy.decoder import init as init
from jax_rlvr.policy.decoder import logits as logits
from jax_rlvr.policy.decoding import Cache as Cache
from jax_rlvr.policy.decoding import Prompts as Prompts
from jax_rlvr.policy.decoding import Rings as Rings
from jax_rlvr.policy.decoding import decode as decode
from jax_rlvr.policy.decoding import prefill as prefill
from jax_rlvr.policy.decoding import unstack as unstack
from jax_rlvr.policy.families import SHAPES as SHAPES
from jax_rlvr.policy.gguf import smollm2_path as smollm2_path
from jax_rlvr.policy.pages import suited as suited
from jax_rlvr.policy.stored import Pretrained as Pretrained
from jax_rlvr.policy.weights import load as load
from jax_rlvr.policy.weights import save as save
