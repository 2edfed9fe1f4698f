"""SmolLM2 as transformers reads it: weights, token ids and logits.

Not on every machine: needs the extras `parity` and `smollm2`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_rlvr import policy, records
from jax_rlvr.policy import gguf

# transformers reads GGUF files by way of accelerate.
for package in ('torch', 'transformers', 'accelerate', 'gguf'):
  pytest.importorskip(package, reason=f'parity needs {package}')

import torch  # noqa: E402
import transformers  # noqa: E402

# Libraries of others may warn of what they like.
pytestmark = pytest.mark.filterwarnings('default')

PROMPTS = [
  records.user(text)
  for text in (
    'What is 12 + 7?',
    'The capital of France is',
    'Write a haiku about rain, please.',
    'If Tom has 3 apples and buys 48 more,  how many\nhas he?',
    'Sort: pear, fig, kiwi. Then say "done" – naïve café 日本.',
  )
]

# Leaf → its module in a layer of transformers.
NAMES = {
  'attention_norm': 'input_layernorm',
  'query': 'self_attn.q_proj',
  'key': 'self_attn.k_proj',
  'value': 'self_attn.v_proj',
  'output': 'self_attn.o_proj',
  'feed_forward_norm': 'post_attention_layernorm',
  'gate': 'mlp.gate_proj',
  'up': 'mlp.up_proj',
  'down': 'mlp.down_proj',
}


@pytest.fixture(scope='module')
def path():
  try:
    return gguf.smollm2_path()
  except FileNotFoundError as error:
    pytest.skip(str(error))


@pytest.fixture(scope='module')
def ours(path):
  pretrained = gguf.load(path)
  abstract = policy.abstract_params(pretrained.config)
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  params = pretrained.read(jax.tree.map(lambda _: one, abstract))
  return pretrained.config, params, pretrained.tokenizer


@pytest.fixture(scope='module')
def theirs(path):
  return transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  )


def test_weights_equal_those_of_transformers(ours, theirs):
  config, params, _ = ours
  tensors = {n: t.numpy() for n, t in theirs.state_dict().items()}
  assert set(tensors) == {
    'model.embed_tokens.weight',
    'model.norm.weight',
    'lm_head.weight',
    *(
      f'model.layers.{layer}.{name}.weight'
      for layer in range(config.layers)
      for name in NAMES.values()
    ),
  }
  np.testing.assert_array_equal(
    params['embed'], tensors['model.embed_tokens.weight']
  )
  np.testing.assert_array_equal(params['norm'], tensors['model.norm.weight'])
  for leaf, name in NAMES.items():
    for layer, weight in enumerate(params['blocks'][leaf]):
      tensor = tensors[f'model.layers.{layer}.{name}.weight']
      # Theirs are [out, in], with heads folded into either.
      np.testing.assert_array_equal(
        weight.reshape(tensor.T.shape), tensor.T, err_msg=f'{layer} {leaf}'
      )


def test_prompts_have_the_ids_of_transformers(path, ours, tmp_path):
  _, _, tokenizer = ours
  tokenizer.save(tmp_path)
  # The one that transformers derives from GGUF does not split digits, which
  # shows where several spaces come before one: not in these prompts.
  derived = transformers.AutoTokenizer.from_pretrained(
    path.parent, gguf_file=path.name
  )
  saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
  spaces = records.user('7  +   15\n\n 8 é')
  for theirs, prompts in ((derived, PROMPTS), (saved, [*PROMPTS, spaces])):
    for messages in prompts:
      ids = theirs.apply_chat_template(
        list(messages), add_generation_prompt=True, return_dict=False
      )
      assert tokenizer.render(messages) == ids
      text = theirs.decode(ids, skip_special_tokens=True)
      assert tokenizer.decode(ids) == text


def test_logits_equal_those_of_transformers(ours, theirs):
  config, params, tokenizer = ours
  prompts = [tokenizer.render(messages) for messages in PROMPTS]
  # Padding behind a row changes nothing before it.
  ids = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
  for row, prompt in zip(ids, prompts, strict=True):
    row[: len(prompt)] = prompt

  @jax.jit
  def logits(params, ids):
    return policy.logits(config, params, policy.forward(config, params, ids))

  batch = np.asarray(logits(params, jnp.asarray(ids)))
  for actual, prompt in zip(batch, prompts, strict=True):
    with torch.no_grad():
      expected = theirs(torch.tensor([prompt])).logits[0].numpy()
    actual = actual[: len(prompt)]
    # Logits have a deviation of 8 and reach 39; measured: 1.2e-4 apart.
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(actual.argmax(-1), expected.argmax(-1))
