"""Each family against transformers, on small random checkpoints.

transformers writes the checkpoints. Windows are shorter than the sequences,
soft caps bend, and norms, biases and weights are random, so that each of them
matters. Not on every machine: needs the extra `parity`.
"""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_rlvr import mesh as layouts
from jax_rlvr import policy, sampling
from jax_rlvr.policy import hugging_face, stored
from jax_rlvr.policy.architectures import tensor_names

for package in ('torch', 'transformers'):
  pytest.importorskip(package, reason=f'parity needs {package}')

import torch  # noqa: E402
import transformers  # noqa: E402

# Eight devices share few cores already.
torch.set_num_threads(1)
# Libraries of others may warn of what they like.
pytestmark = pytest.mark.filterwarnings('default')

SHAPE = dict(
  vocab_size=96,
  hidden_size=48,
  intermediate_size=40,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=128,
  bos_token_id=None,
  eos_token_id=None,
  pad_token_id=0,
)
GEMMA = SHAPE | dict(head_dim=16, query_pre_attn_scalar=20, sliding_window=5)
FAMILIES = {
  'llama-2': ('Llama', SHAPE | dict(num_key_value_heads=4)),
  'llama-linear': (
    'Llama',
    SHAPE | dict(rope_parameters=dict(
      rope_type='linear', rope_theta=5000.0, factor=3.0
    )),
  ),
  'llama-3': (
    'Llama',
    SHAPE | dict(rope_parameters=dict(
      rope_type='llama3', rope_theta=1000.0, factor=8.0, low_freq_factor=1.0,
      high_freq_factor=4.0, original_max_position_embeddings=32,
    )),
  ),
  'smollm2': (
    'Llama', SHAPE | dict(num_attention_heads=3, num_key_value_heads=1,
    tie_word_embeddings=True),
  ),
  'mistral': ('Mistral', SHAPE | dict(head_dim=16, sliding_window=5)),
  'mistral-full': ('Mistral', SHAPE | dict(sliding_window=None)),
  'qwen2': ('Qwen2', SHAPE | dict(tie_word_embeddings=True)),
  'qwen2-window': (
    'Qwen2',
    SHAPE | dict(
      use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
  ),
  'qwen3': ('Qwen3', SHAPE | dict(head_dim=16)),
  'gemma-2': (
    'Gemma2',
    GEMMA | dict(attn_logit_softcapping=2.0, final_logit_softcapping=20.0),
  ),
  'gemma-3': (
    'Gemma3Text',
    GEMMA | dict(
      num_hidden_layers=4,
      final_logit_softcapping=20.0,
      sliding_window_pattern=3,
      rope_parameters=dict(
        full_attention=dict(
          rope_type='linear', factor=4.0, rope_theta=30_000.0
        ),
        sliding_attention=dict(rope_type='default', rope_theta=300.0),
      ),
    ),
  ),
  'gemma-3-image': ('Gemma3', GEMMA),
}  # fmt: skip
LENGTHS = (26, 9, 17)
IDS = np.random.default_rng(0).integers(1, 96, (3, 26))
VALID = np.arange(26) < np.array(LENGTHS)[:, None]


@pytest.fixture(scope='module', params=FAMILIES)
def folder(request, tmp_path_factory):
  """A checkpoint of the family, as transformers 5 writes it."""
  name, fields = FAMILIES[request.param]
  torch.manual_seed(0)
  if name == 'Gemma3':
    vision = dict(
      hidden_size=16, intermediate_size=16, num_hidden_layers=1,
      num_attention_heads=2, image_size=28, patch_size=14,
    )  # fmt: skip
    config = transformers.Gemma3Config(
      text_config=fields, vision_config=vision, mm_tokens_per_image=4
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
  else:
    config = getattr(transformers, f'{name}Config')(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config)
  with torch.no_grad():
    for parameter in model.parameters():
      scale = 0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
      parameter += scale * torch.randn_like(parameter)
  path = tmp_path_factory.mktemp(request.param)
  model.save_pretrained(path)
  return path


def to_hub_form(content):
  """A config.json of transformers 5 as the hub has them."""
  content = dict(content)
  content['torch_dtype'] = content.pop('dtype', 'float32')
  rope = content.pop('rope_parameters')
  if 'full_attention' in rope:
    content['rope_local_base_freq'] = rope['sliding_attention']['rope_theta']
    rope = rope['full_attention']
  content['rope_theta'] = rope.pop('rope_theta')
  content['rope_scaling'] = None if rope == {'rope_type': 'default'} else rope
  kinds = content.pop('layer_types', None)
  if content['model_type'] == 'gemma3_text':
    full = [i for i, kind in enumerate(kinds) if kind == 'full_attention']
    content['sliding_window_pattern'] = full[0] + 1 if full else 6
    del content['_sliding_window_pattern']
  return content


@pytest.fixture(scope='module')
def hub_folder(folder, tmp_path_factory):
  path = tmp_path_factory.mktemp('hub') / 'model'
  shutil.copytree(folder, path)
  content = json.loads((path / 'config.json').read_text())
  if 'text_config' in content:
    content['text_config'] = to_hub_form(content['text_config'])
  else:
    content = to_hub_form(content)
  (path / 'config.json').write_text(json.dumps(content))
  return path


def read(path):
  """Shape and weights, on one device."""
  pretrained = policy.load(path)
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = policy.abstract_params(pretrained.config)
  shardings = jax.tree.map(lambda _: one, abstract)
  return pretrained.config, pretrained.read(shardings)


def their_model(path, dtype=torch.float32):
  kind = transformers.AutoModelForCausalLM
  if 'text_config' in json.loads((path / 'config.json').read_text()):
    kind = transformers.Gemma3ForConditionalGeneration
  return kind.from_pretrained(path, dtype=dtype, attn_implementation='eager')


@pytest.fixture(scope='module')
def ours(folder):
  return read(folder)


@pytest.fixture(scope='module')
def theirs(folder):
  return their_model(folder)


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, ids):
  return policy.logits(config, params, policy.forward(config, params, ids))


def our_logits(config, params):
  return np.asarray(forward(config, params, jnp.asarray(IDS)))[VALID]


def their_logits(model):
  with torch.no_grad():
    out = model(torch.tensor(IDS), attention_mask=torch.tensor(VALID).long())
  return out.logits.float().numpy()[VALID]


def test_logits_equal_those_of_transformers(ours, theirs):
  actual, expected = our_logits(*ours), their_logits(theirs)
  assert expected.std() > 0.5
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=5e-5)


def test_each_feature_moves_the_logits(ours):
  # Else the comparisons would not see it.
  config, params = ours
  logits = our_logits(config, params)
  plain = dict(
    activation='silu', rope_scaling=None, local_rope_theta=None, local=(),
    window=None, query_scale=None, attention_softcap=None, logit_softcap=None,
    unit_offset=False, scale_embeddings=False,
  )  # fmt: skip
  for field, value in plain.items():
    if getattr(config, field) != value:
      change = {field: value}
      if field == 'window':
        change['local'] = ()
      other = our_logits(dataclasses.replace(config, **change), params)
      assert np.abs(other - logits).max() > 0.05, field


def test_the_form_of_the_hub_says_the_same(ours, hub_folder):
  assert policy.load(hub_folder).config == ours[0]
  expected = their_logits(their_model(hub_folder))
  np.testing.assert_allclose(our_logits(*ours), expected, rtol=1e-4, atol=5e-5)


def test_greedy_continuations_equal_those_of_transformers(ours, theirs):
  config, params = ours
  engine = sampling.Engine(
    policy=config,
    mesh=layouts.make(),
    slots=8,
    prompt_tokens=max(LENGTHS),
    completion_tokens=32,
  )
  keys = np.zeros((1, 2), np.uint32)
  limit = np.array([32])
  prompts = [row[:length] for row, length in zip(IDS, LENGTHS, strict=True)]
  groups = [sampling.Group(ids, keys, limit) for ids in prompts]
  for progress in engine.complete(
    engine.unstacked(params), groups, temperature=0, end_ids=()
  ):
    for c in progress.finished:
      prompt = torch.tensor(prompts[c.group][None])
      expected = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=32,
        do_sample=False,
        eos_token_id=None,
      )[0, len(prompts[c.group]) :]
      assert c.ids == expected.tolist()
  assert progress.done == 3


def test_gradients_equal_those_of_transformers(ours, theirs):
  config, params = ours
  # Of one token's log-probability each, weighed at random.
  weights = np.random.default_rng(1).normal(size=IDS.shape) * VALID
  weights = weights[:, 1:].astype(np.float32)

  @jax.jit
  @jax.grad
  def gradient(params):
    hidden = policy.forward(config, params, jnp.asarray(IDS))
    logprobs = jax.nn.log_softmax(policy.logits(config, params, hidden)[:, :-1])
    picked = jnp.take_along_axis(logprobs, jnp.asarray(IDS)[:, 1:, None], -1)
    return (picked[..., 0] * weights).sum()

  theirs.zero_grad()
  ids = torch.tensor(IDS)
  logits = theirs(ids, attention_mask=torch.tensor(VALID).long()).logits
  picked = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
  (picked[..., 0] * torch.tensor(weights)).sum().backward()
  expected = {
    name.replace('model.language_model.', 'model.'): parameter.grad.numpy()
    for name, parameter in theirs.named_parameters()
    if parameter.grad is not None
  }
  grads = jax.device_get(gradient(params))
  wanted = stored.tensors(config, tensor_names(config))
  assert {tensor.name for tensor in wanted} == set(expected)
  for tensor in wanted:
    grad = grads if tensor.layer is None else grads['blocks']
    grad = grad[tensor.leaf]
    grad = grad if tensor.layer is None else grad[tensor.layer]
    actual, their = stored.to_file(tensor.leaf, grad), expected[tensor.name]
    assert np.abs(their).max() > 1e-3, tensor.name
    scale = np.abs(their).max()
    # Entries that cancel to nearly nothing are as exact as the others.
    np.testing.assert_allclose(
      actual, their, rtol=1e-3, atol=2e-5 * scale, err_msg=tensor.name
    )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_exported_folder_has_our_logits_in_transformers(ours, dtype, tmp_path):
  config, params = ours
  policy.save(tmp_path, config, params, dtype=dtype)
  kept = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params)
  np.testing.assert_allclose(
    our_logits(config, kept),
    their_logits(their_model(tmp_path)),
    rtol=1e-4,
    atol=5e-5,
  )


@pytest.mark.parametrize('name', policy.SHAPES)
def test_published_shapes_have_as_many_parameters_there(name, tmp_path):
  shape = policy.SHAPES[name]
  content = hugging_face.write_config(shape)
  (tmp_path / 'config.json').write_text(json.dumps(content))
  config = transformers.AutoConfig.from_pretrained(tmp_path)
  with torch.device('meta'):
    model = transformers.AutoModelForCausalLM.from_config(config)
  expected = sum(parameter.numel() for parameter in model.parameters())
  ours = jax.tree.leaves(policy.abstract_params(shape))
  assert sum(x.size for x in ours) == expected
