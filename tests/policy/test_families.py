"""The shapes of published models."""

import jax
import pytest

from jax_rlvr import mesh as layouts
from jax_rlvr import policy

# Numbers of parameters that the hub tells of the weights themselves; of the
# language model for Gemma 3 from 4B on, where the embedding's 262,208 rows
# are kept (Keras Hub counts 262,144: 3,880,099,328 for 4B).
PARAMETERS = {
  'smollm2-135m': 134_515_008,
  'smollm2-360m': 361_821_120,
  'smollm2-1.7b': 1_711_376_384,
  'llama-3.2-1b': 1_235_814_400,
  'llama-3.2-3b': 3_212_749_824,
  'llama-3.1-8b': 8_030_261_248,
  'mistral-7b-v0.3': 7_248_023_552,
  'qwen2.5-0.5b': 494_032_768,
  'qwen2.5-1.5b': 1_543_714_304,
  'qwen2.5-3b': 3_085_938_688,
  'qwen2.5-7b': 7_615_616_512,
  'qwen2.5-14b': 14_770_033_664,
  'qwen2.5-32b': 32_763_876_352,
  'qwen3-0.6b': 596_049_920,
  'qwen3-1.7b': 1_720_574_976,
  'qwen3-4b': 4_022_468_096,
  'qwen3-8b': 8_190_735_360,
  'qwen3-14b': 14_768_307_200,
  'qwen3-32b': 32_762_123_264,
  'gemma-2-2b': 2_614_341_888,
  'gemma-2-9b': 9_241_705_984,
  'gemma-2-27b': 27_227_128_320,
  'gemma-3-270m': 268_098_176,
  'gemma-3-1b': 999_885_952,
  'gemma-3-4b': 3_880_263_168,
  'gemma-3-12b': 11_766_034_176,
  'gemma-3-27b': 27_009_346_304,
}


def test_every_shape_is_counted():
  assert set(policy.SHAPES) == set(PARAMETERS)


@pytest.mark.parametrize('name', PARAMETERS)
def test_parameters_are_as_many_as_published(name):
  abstract = policy.abstract_params(policy.SHAPES[name])
  assert sum(x.size for x in jax.tree.leaves(abstract)) == PARAMETERS[name]


@pytest.mark.parametrize('table', [layouts.TRAINING, layouts.SAMPLING])
def test_every_parameter_has_a_place_on_the_mesh(table):
  mesh = layouts.make(fsdp=4, tensor=2)
  for shape in policy.SHAPES.values():
    abstract = policy.abstract_params(shape)
    found = layouts.shardings(mesh, abstract, table)
    for name, sharding in found['blocks'].items():
      # Biases are cut by heads, as the maps that they follow.
      if name in ('query_bias', 'key_bias', 'value_bias'):
        assert sharding.spec == jax.P(None, 'tensor')
