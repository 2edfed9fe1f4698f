"""Reinforcement learning with verifiable rewards for language models, in JAX.

Importing the package imports no jax: reward workers stay light. The names
below are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from jax_rlvr import filters as filters
  from jax_rlvr.loaded import load_policy as load_policy
  from jax_rlvr.policy_gradient import as_loss as as_loss
  from jax_rlvr.policy_gradient import token_gradients as token_gradients
  from jax_rlvr.records import Tokens as Tokens
  from jax_rlvr.records import TokenStats as TokenStats

_HOMES = {
  'TokenStats': 'records',
  'Tokens': 'records',
  'as_loss': 'policy_gradient',
  'load_policy': 'loaded',
  'token_gradients': 'policy_gradient',
}

__all__ = [
  'TokenStats',
  'Tokens',
  'as_loss',
  'filters',
  'load_policy',
  'token_gradients',
]


def __getattr__(name: str) -> Any:
  if name == 'filters':
    return importlib.import_module('jax_rlvr.filters')
  if name in _HOMES:
    home = importlib.import_module(f'jax_rlvr.{_HOMES[name]}')
    return getattr(home, name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
