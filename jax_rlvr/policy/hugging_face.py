"""config.json of a Hugging Face folder ↔ the shape of a policy.

Both forms are read: the hub's (`rope_theta`, `rope_scaling`,
`sliding_window_pattern`), in which we write, and that of transformers 5
(`rope_parameters`, `layer_types`). A field that this decoder does not compute
is refused by name.
"""

from __future__ import annotations

import pathlib
import reprlib
from collections.abc import Mapping
from typing import Any, NoReturn

from jax_rlvr.policy.architectures import (
  ACTIVATIONS,
  COMMON,
  COUNTS,
  FAMILIES,
  INERT,
  ONLY,
  ROPE_FIELDS,
  SAME,
  Family,
)
from jax_rlvr.policy.config import PolicyConfig, RopeScaling


class _Fields(dict):
  """Of a config.json; errors name the file."""

  def __init__(self, file: pathlib.Path, fields: Mapping[str, Any]):
    super().__init__(fields)
    self.file = file

  def __missing__(self, name: str):
    raise ValueError(
      f'{self.file} has no {name}; take the file that came with the weights'
    )

  def refuse(
    self, name: str, value: Any, remedy: str = 'use another model'
  ) -> NoReturn:
    raise ValueError(
      f'{self.file}: {name} = {reprlib.repr(value)} is not supported; {remedy}'
    )


def read_config(file: pathlib.Path, content: Mapping[str, Any]) -> PolicyConfig:
  """The shape that a config.json describes; a multimodal Gemma 3's text model.

  Args:
    file: named in errors.
    content: of the file.

  Raises:
    ValueError: one line that names file, field, value and remedy.
  """
  given = _Fields(file, content)
  if given.get('model_type') == 'gemma3':
    outer = ('tie_word_embeddings', 'quantization_config')
    outer = {name: given[name] for name in outer if name in given}
    given = _Fields(file, given['text_config'] | outer)
    if cap := given.get('final_logit_softcapping'):
      # transformers, too, computes none where there are images.
      given.refuse('final_logit_softcapping', cap)
  kind = given['model_type']
  if kind not in FAMILIES:
    given.refuse('model_type', kind, f'use one of {", ".join(FAMILIES)}')
  family = FAMILIES[kind]
  architectures = given.get('architectures')
  if architectures not in (None, [family.architecture]):
    given.refuse('architectures', architectures, f'use {family.architecture}')
  defaults = {**COMMON, **family.fields}
  _check_known(given, defaults)
  fields = _Fields(file, defaults | given)
  derived = [n for n in ('num_key_value_heads', 'head_dim') if not fields[n]]
  for name in COUNTS:
    if name not in derived and (
      type(fields[name]) is not int or fields[name] < 1
    ):
      fields.refuse(name, fields[name], 'give a whole number above 0')
  heads = fields['num_attention_heads']
  if 'num_key_value_heads' in derived:
    fields['num_key_value_heads'] = heads
  if 'head_dim' in derived:
    fields['head_dim'] = fields['hidden_size'] // heads
  shape: dict[str, Any] = {
    **{here: fields[there] for there, here in SAME.items() if there in fields},
    **family.fixed,
    **_rope(fields),
    **_windows(fields, family),
    'activation': _activation(fields),
    'query_scale': _query_scale(fields),
  }
  try:
    return PolicyConfig(**shape)
  except ValueError as error:
    raise ValueError(f'{file}: {error}') from None


def _check_known(fields: _Fields, read: Mapping[str, Any]) -> None:
  for name, value in fields.items():
    if value is None or name in read or name in COUNTS or name in INERT:
      continue
    if name in ONLY:
      if value != ONLY[name]:
        fields.refuse(name, value)
    elif name == 'quantization_config':
      fields.refuse(name, value, 'use the model before it was quantized')
    elif not name.startswith('_'):
      fields.refuse(
        name, value, 'it is unknown: remove it if no logit depends on it'
      )


def _activation(fields: _Fields) -> Any:
  names = ('hidden_activation', 'hidden_act')
  name = next(n for n in names if fields.get(n) is not None)
  if fields[name] not in ACTIVATIONS:
    fields.refuse(name, fields[name], f'only {", ".join(ACTIVATIONS)} are')
  return ACTIVATIONS[fields[name]]


def _query_scale(fields: _Fields) -> float | None:
  scalar = fields.get('query_pre_attn_scalar', fields['head_dim'])
  return None if scalar == fields['head_dim'] else scalar**-0.5


def _windows(fields: _Fields, family: Family) -> dict[str, Any]:
  """Which layers have a window, and how wide it is."""
  layers = range(fields['num_hidden_layers'])
  window = fields.get('sliding_window')
  if not fields.get('use_sliding_window', True):
    window = None
  kinds = fields.get('layer_types')
  if kinds is not None:
    words = {'full_attention': False, 'sliding_attention': True}
    if len(kinds) != len(layers) or set(kinds) - set(words):
      fields.refuse(
        'layer_types', kinds, f'name each layer {" or ".join(words)}'
      )
    local = tuple(words[kind] for kind in kinds)
    if any(local) and window is None:
      fields.refuse('layer_types', kinds, 'give sliding_window, in tokens')
  elif 'max_window_layers' in fields:
    local = tuple(i >= fields['max_window_layers'] for i in layers)
  elif full_every := fields.get('sliding_window_pattern') or family.full_every:
    local = tuple((i + 1) % full_every != 0 for i in layers)
  else:
    local = tuple(True for _ in layers)
  if window is None or not any(local):
    return {}
  return {'window': window, 'local': () if all(local) else local}


def _rope(fields: _Fields) -> dict[str, Any]:
  """What the policy is told of its rotary frequencies."""
  old, new = fields['rope_scaling'], fields['rope_parameters']
  if old and new:
    fields.refuse('rope_scaling', old, 'keep either it or rope_parameters')
  name = 'rope_scaling' if old else 'rope_parameters'
  given, near, local = old or new or {}, {}, None
  if 'rope_local_base_freq' in fields:
    if 'full_attention' in given:
      near = given.get('sliding_attention', near)
      given = given['full_attention']
    local = near.get('rope_theta', fields['rope_local_base_freq'])
    if _scaling(fields, f'{name}.sliding_attention', near):
      fields.refuse(f'{name}.sliding_attention', near)
    local = _number(fields, 'rope_local_base_freq', local)
  theta = given.get('rope_theta', fields['rope_theta'])
  return {
    'rope_theta': _number(fields, 'rope_theta', theta),
    'rope_scaling': _scaling(fields, name, given),
    'local_rope_theta': local,
  }


def _number(fields: _Fields, name: str, value: Any) -> float:
  if not isinstance(value, int | float):
    fields.refuse(name, value, 'give a number')
  return float(value)


def _scaling(
  fields: _Fields, name: str, given: Mapping[str, Any]
) -> RopeScaling | None:
  kind = given.get('rope_type') or given.get('type') or 'default'
  if kind not in ('default', 'linear', 'llama3'):
    remedy = f'remove {name} and keep to the length before stretching'
    fields.refuse(f'{name}.rope_type', kind, remedy)
  known = {'rope_type', 'type', 'rope_theta', *ROPE_FIELDS}
  for key, value in given.items():
    if key not in known and (key, value) != ('partial_rotary_factor', 1.0):
      fields.refuse(f'{name}.{key}', value)
  if kind == 'default':
    return None
  wanted = ['factor'] if kind == 'linear' else list(ROPE_FIELDS)
  numbers: dict[str, Any] = {
    ROPE_FIELDS[key]: _number(fields, f'{name}.{key}', given.get(key))
    for key in wanted
  }
  if 'original_max_tokens' in numbers:
    numbers['original_max_tokens'] = int(numbers['original_max_tokens'])
  return RopeScaling(kind=kind, **numbers)


def write_config(config: PolicyConfig) -> dict[str, Any]:
  """The config.json of a policy: of the first family that computes the same.

  Raises:
    ValueError: none does.
  """
  activation = {here: there for there, here in ACTIVATIONS.items()}
  scaling = config.rope_scaling
  everything = {
    **{there: getattr(config, here) for there, here in SAME.items()},
    **dict.fromkeys(
      ('hidden_act', 'hidden_activation'), activation[config.activation]
    ),
    'rope_theta': config.rope_theta,
    'rope_local_base_freq': config.local_rope_theta,
    'rope_scaling': scaling
    and {
      'rope_type': scaling.kind,
      **{there: getattr(scaling, here) for there, here in ROPE_FIELDS.items()},
    },
    'sliding_window': config.window,
    'use_sliding_window': any(config.is_local),
    # Older releases go by it.
    'max_window_layers': [*config.is_local, True].index(True),
    'layer_types': [
      'sliding_attention' if local else 'full_attention'
      for local in config.is_local
    ],
    'query_pre_attn_scalar': round(
      (config.query_scale or config.head_size**-0.5) ** -2
    ),
  }
  if scaling and scaling.kind == 'linear':
    everything['rope_scaling'] = {
      'rope_type': 'linear',
      'factor': scaling.factor,
    }
  for kind, family in FAMILIES.items():
    names = {**COUNTS, **COMMON, **family.fields}
    content = {
      'architectures': [family.architecture],
      'model_type': kind,
      **{name: x for name, x in everything.items() if name in names},
    }
    try:
      if read_config(pathlib.Path('config.json'), content) == config:
        return content
    except ValueError:
      continue
  raise ValueError(
    'no family of transformers computes what this policy does; those known '
    f'are {", ".join(FAMILIES)}'
  )
