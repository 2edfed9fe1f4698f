"""Folders of safetensors: written here by hand, read, and written again."""

import dataclasses
import json
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_rlvr import mesh as layouts
from jax_rlvr import policy
from jax_rlvr.policy import stored

# L, D, F, N, K, H, V of the tiny model.
LAYERS, WIDTH, FORWARD, HEADS, KV_HEADS, SIZE, VOCAB = 2, 8, 12, 4, 2, 6, 16
CONFIG = {
  'architectures': ['Qwen2ForCausalLM'],
  'model_type': 'qwen2',
  'vocab_size': VOCAB,
  'num_hidden_layers': LAYERS,
  'hidden_size': WIDTH,
  'num_attention_heads': HEADS,
  'num_key_value_heads': KV_HEADS,
  'head_dim': SIZE,
  'intermediate_size': FORWARD,
  'max_position_embeddings': 32,
  'tie_word_embeddings': False,
}
TINY = policy.PolicyConfig(
  vocab_size=VOCAB,
  layers=LAYERS,
  width=WIDTH,
  heads=HEADS,
  kv_heads=KV_HEADS,
  head_size=SIZE,
  feed_forward=FORWARD,
)
QWEN2 = dataclasses.replace(TINY, qkv_bias=True, tied_embeddings=False)


def tiny_tensors():
  """Distinct numbers everywhere, exact in bfloat16."""
  shapes = {
    'model.embed_tokens.weight': (VOCAB, WIDTH),
    'model.norm.weight': (WIDTH,),
    'lm_head.weight': (VOCAB, WIDTH),
  }
  for layer in range(LAYERS):
    for name, shape in {
      'input_layernorm.weight': (WIDTH,),
      'post_attention_layernorm.weight': (WIDTH,),
      'self_attn.q_proj.weight': (HEADS * SIZE, WIDTH),
      'self_attn.k_proj.weight': (KV_HEADS * SIZE, WIDTH),
      'self_attn.v_proj.weight': (KV_HEADS * SIZE, WIDTH),
      'self_attn.q_proj.bias': (HEADS * SIZE,),
      'self_attn.k_proj.bias': (KV_HEADS * SIZE,),
      'self_attn.v_proj.bias': (KV_HEADS * SIZE,),
      'self_attn.o_proj.weight': (WIDTH, HEADS * SIZE),
      'mlp.gate_proj.weight': (FORWARD, WIDTH),
      'mlp.up_proj.weight': (FORWARD, WIDTH),
      'mlp.down_proj.weight': (WIDTH, FORWARD),
    }.items():
      shapes[f'model.layers.{layer}.{name}'] = shape
  draw = np.random.default_rng(0)
  return {
    name: draw.normal(size=shape).astype(ml_dtypes.bfloat16).astype('f')
    for name, shape in shapes.items()
  }


def write(folder, tensors, config=CONFIG, dtype='f'):
  folder.mkdir(exist_ok=True)
  tensors = {name: x.astype(dtype) for name, x in tensors.items()}
  save_file(tensors, folder / 'model.safetensors')
  (folder / 'config.json').write_text(json.dumps(config))
  return folder


def write_sharded(folder, tensors, files=3):
  """The tensors dealt out to files, with an index."""
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(CONFIG))
  names = [f'model-{i + 1:05}-of-{files:05}.safetensors' for i in range(files)]
  weight_map = {t: names[i % files] for i, t in enumerate(tensors)}
  for name in names:
    part = {t: x for t, x in tensors.items() if weight_map[t] == name}
    save_file(part, folder / name)
  index = {'metadata': {}, 'weight_map': weight_map}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  return folder


def read(folder, mesh=None, table=layouts.TRAINING):
  pretrained = policy.load(folder)
  abstract = policy.abstract_params(pretrained.config)
  mesh = mesh or layouts.make()
  return pretrained.read(layouts.shardings(mesh, abstract, table))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return write(tmp_path_factory.mktemp('tiny'), tiny_tensors())


@pytest.fixture(scope='module')
def params(folder):
  return jax.device_get(read(folder))


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_params_have_the_tree_of_the_policy(folder, params):
  expected = policy.abstract_params(policy.load(folder).config)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
    lambda x: (x.shape, x.dtype), expected
  )


def test_linear_maps_are_transposed_and_heads_unfolded(params):
  tensors = tiny_tensors()
  there, here = (lambda n: tensors[f'model.layers.1.{n}']), params['blocks']
  x = np.random.default_rng(1).random(WIDTH).astype(np.float32)
  embed, head = 'model.embed_tokens.weight', 'lm_head.weight'
  np.testing.assert_array_equal(params['embed'], tensors[embed])
  np.testing.assert_array_equal(params['head'], tensors[head].T)
  norm = there('post_attention_layernorm.weight')
  np.testing.assert_array_equal(here['feed_forward_norm'][1], norm)
  bias = there('self_attn.k_proj.bias')
  np.testing.assert_array_equal(here['key_bias'][1].ravel(), bias)
  up, down = there('mlp.up_proj.weight'), there('mlp.down_proj.weight')
  np.testing.assert_allclose(x @ here['up'][1], up @ x, rtol=1e-5)
  np.testing.assert_array_equal(here['down'][1], down.T)
  query = np.einsum('d,dnh->nh', x, here['query'][1])
  np.testing.assert_allclose(
    query.ravel(), there('self_attn.q_proj.weight') @ x, rtol=1e-5
  )
  heads = np.random.default_rng(2).random((HEADS, SIZE)).astype(np.float32)
  np.testing.assert_allclose(
    np.einsum('nh,nhd->d', heads, here['output'][1]),
    there('self_attn.o_proj.weight') @ heads.ravel(),
    rtol=1e-5,
  )


@pytest.mark.parametrize('table', [layouts.TRAINING, layouts.SAMPLING])
@pytest.mark.parametrize('axes', [dict(fsdp=4, tensor=2), dict(tensor=4)])
def test_weights_are_cut_by_the_table(folder, params, axes, table):
  mesh = layouts.make(**axes)
  placed = read(folder, mesh, table)
  wanted = layouts.shardings(mesh, params, table)
  assert jax.tree.map(lambda x: x.sharding, placed) == wanted
  equal(jax.device_get(placed), params)


def test_any_axis_can_be_cut(folder, params):
  # Inside of heads, and layers.
  mesh = layouts.make(fsdp=4, tensor=2)
  spec = {
    'query': jax.P('tensor', None, None, None),
    'key': jax.P(None, None, None, 'tensor'),
    'output': jax.P(None, 'fsdp', 'tensor', None),
    'query_bias': jax.P(None, None, 'tensor'),
    'down': jax.P('tensor', None, 'fsdp'),
  }
  shardings = layouts.shardings(mesh, params, layouts.TRAINING)
  for leaf, axes in spec.items():
    shardings['blocks'][leaf] = jax.NamedSharding(mesh, axes)
  placed = policy.load(folder).read(shardings)
  assert jax.tree.map(lambda x: x.sharding, placed) == shardings
  equal(jax.device_get(placed), params)


def test_each_number_is_read_once_and_in_small_blocks(params, monkeypatch):
  tensors, seen, largest = tiny_tensors(), {}, 0
  # 64 bytes: two rows of eight numbers.
  monkeypatch.setattr(stored, 'BLOCK', 64)

  def fetch(name, index):
    nonlocal largest
    count = seen.setdefault(name, np.zeros(tensors[name].shape, int))
    count[index] += 1
    largest = max(largest, tensors[name][index].nbytes)
    return tensors[name][index]

  mesh = layouts.make(fsdp=4, tensor=2)
  names = policy.architectures.tensor_names(QWEN2)
  shardings = layouts.shardings(mesh, params, layouts.TRAINING)
  placed = stored.stream(QWEN2, names, shardings, fetch)
  equal(jax.device_get(placed), params)
  assert set(seen) == set(tensors)
  # Replicas of a part share one reading.
  assert all((count == 1).all() for count in seen.values())
  # One head, [6, 2] of [24, 8], is 48 bytes.
  assert largest <= 64


def test_a_host_reads_its_own_shards_only(params, monkeypatch):
  tensors, read_by_host = tiny_tensors(), []
  mesh = layouts.make(fsdp=4, tensor=2)
  names = policy.architectures.tensor_names(QWEN2)
  shardings = layouts.shardings(mesh, params, layouts.TRAINING)

  class Host:
    """A sharding of which this process has a few devices."""

    def __init__(self, sharding, devices):
      self.sharding, self.devices = sharding, devices

    def addressable_devices_indices_map(self, shape):
      every = self.sharding.addressable_devices_indices_map(shape)
      return {device: every[device] for device in self.devices}

  def fetch(name, index):
    read_by_host[-1][name][index] += 1
    return tensors[name][index]

  monkeypatch.setattr(
    jax, 'make_array_from_single_device_arrays', lambda *arguments: arguments
  )
  for devices in mesh.devices[0]:  # Four hosts of two devices.
    read_by_host.append({n: np.zeros(x.shape, int) for n, x in tensors.items()})
    hosted = jax.tree.map(lambda s, own=devices: Host(s, own), shardings)
    stored.stream(QWEN2, names, hosted, fetch)
  for name in tensors:
    counts = [host[name] for host in read_by_host]
    if tensors[name].ndim == 2:  # A quarter of the width each.
      np.testing.assert_array_equal(sum(counts), 1)
      assert [count.sum() for count in counts] == [counts[0].size // 4] * 4
    else:  # Norms and biases are whole on every host.
      np.testing.assert_array_equal(counts, 1)


@pytest.mark.parametrize('dtype', [ml_dtypes.bfloat16, np.float16])
def test_half_precision_becomes_float32(tmp_path, params, dtype):
  tensors = tiny_tensors()
  placed = read(write(tmp_path, tensors, dtype=dtype))
  assert {x.dtype for x in jax.tree.leaves(placed)} == {jnp.dtype('float32')}
  rounded = jax.tree.map(lambda x: x.astype(dtype).astype('f'), params)
  equal(jax.device_get(placed), rounded)


def test_sharded_folder_says_the_same(tmp_path, params):
  equal(jax.device_get(read(write_sharded(tmp_path, tiny_tensors()))), params)


def test_a_second_copy_of_a_tied_embedding_is_left_alone(tmp_path, params):
  config = CONFIG | {'tie_word_embeddings': True}
  placed = jax.device_get(read(write(tmp_path, tiny_tensors(), config)))
  equal(placed, {k: v for k, v in params.items() if k != 'head'})


def test_buffers_of_old_releases_are_left_alone(tmp_path, params):
  extra = {'model.layers.0.self_attn.rotary_emb.inv_freq': np.ones(3, 'f')}
  equal(jax.device_get(read(write(tmp_path, tiny_tensors() | extra))), params)


@pytest.mark.parametrize('prefix', ['language_model.', 'model.language_model.'])
def test_language_model_of_an_image_model_is_found(tmp_path, params, prefix):
  def renamed(name):
    if prefix == 'language_model.':
      return prefix + name
    return name.replace('model.', prefix)

  tensors = {renamed(name): x for name, x in tiny_tensors().items()}
  for name in ('vision_tower.head.probe', 'model.multi_modal_projector.x'):
    tensors[name] = np.ones((2, 3), 'f')
  equal(jax.device_get(read(write(tmp_path, tensors))), params)


def broken(folder, change):
  """The folder with one thing changed in its tensors."""
  tensors = tiny_tensors()
  change(tensors)
  return write(folder, tensors)


@pytest.mark.parametrize(
  'change, words',
  [
    (lambda t: t.pop('model.norm.weight'), 'has no model.norm.weight'),
    (lambda t: t.pop('lm_head.weight'), 'has no lm_head.weight'),
    (
      lambda t: t.update({'model.layers.2.mlp.up_proj.weight': np.ones(3)}),
      'model.safetensors has model.layers.2.mlp.up_proj.weight, which',
    ),
    (
      lambda t: t.update({'model.norm.weight': np.ones(WIDTH + 1)}),
      r'model.safetensors: model.norm.weight is \(9,\) where .* \(8,\)',
    ),
    (
      lambda t: t.update(
        {'model.layers.0.self_attn.q_proj.weight': np.ones((WIDTH, 24))}
      ),
      r'q_proj.weight is \(8, 24\) where .* \(24, 8\)',
    ),
  ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, words):
  with pytest.raises(ValueError, match=words) as caught:
    policy.load(broken(tmp_path, change))
  assert str(tmp_path) in str(caught.value) and '; ' in str(caught.value)
  assert '\n' not in str(caught.value)


def test_quantized_tensors_are_refused(tmp_path):
  write(tmp_path, tiny_tensors(), dtype=np.int8)
  with pytest.raises(ValueError, match=r'weight is of I8 numbers.*quantized'):
    policy.load(tmp_path)


def test_cut_off_file_is_refused_by_tensor(tmp_path):
  whole = write(tmp_path, tiny_tensors()) / 'model.safetensors'
  content = whole.read_bytes()
  for length in range(0, len(content), 301):
    whole.write_bytes(content[:length])
    words = r'model\.safetensors is not whole: .* download it again'
    with pytest.raises(ValueError, match=words) as caught:
      policy.load(tmp_path)
    assert '\n' not in str(caught.value)
  # Tensors lie in the order of their names, but for larger types first.
  whole.write_bytes(content[:-4])
  with pytest.raises(ValueError, match='model.norm.weight is cut off'):
    policy.load(tmp_path)


def test_file_that_breaks_after_it_was_checked_is_refused(tmp_path):
  file = write(tmp_path, tiny_tensors()) / 'model.safetensors'
  pretrained = policy.load(tmp_path)
  abstract = policy.abstract_params(pretrained.config)
  shardings = layouts.shardings(layouts.make(), abstract, layouts.TRAINING)
  file.write_bytes(file.read_bytes()[:-4])
  with pytest.raises(ValueError, match='is not whole'):
    pretrained.read(shardings)


def test_missing_files_are_named(tmp_path):
  folder = write_sharded(tmp_path / 'sharded', tiny_tensors())
  (folder / 'model-00002-of-00003.safetensors').unlink()
  words = 'no .*model-00002-of-00003.safetensors, which should hold model'
  with pytest.raises(FileNotFoundError, match=words):
    policy.load(folder)
  (folder / 'model.safetensors.index.json').unlink()
  with pytest.raises(FileNotFoundError, match='no model.safetensors in'):
    policy.load(folder)
  (folder / 'config.json').write_text('{')
  with pytest.raises(ValueError, match='config.json is not JSON'):
    policy.load(folder)
  (folder / 'config.json').unlink()
  with pytest.raises(FileNotFoundError, match='config.json; give a whole'):
    policy.load(folder)
  with pytest.raises(FileNotFoundError, match='no model file .*nowhere'):
    policy.load(tmp_path / 'nowhere')
  (tmp_path / 'weights.bin').touch()
  with pytest.raises(ValueError, match='weights.bin is neither'):
    policy.load(tmp_path / 'weights.bin')


def test_folder_without_a_tokenizer_loads(folder):
  assert policy.load(folder).tokenizer is None


def test_hub_is_asked_for_configs_first(folder, monkeypatch, tmp_path):
  asked = []

  def snapshot_download(name, allow_patterns):
    asked.append((name, allow_patterns))
    return str(folder)

  hub = types.SimpleNamespace(snapshot_download=snapshot_download)
  monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)
  monkeypatch.chdir(tmp_path)
  assert policy.load('some-one/model-1.5b').config.layers == LAYERS
  assert asked == [
    ('some-one/model-1.5b', ['*.json', '*.jinja', '*.model']),
    ('some-one/model-1.5b', ['model*.safetensors']),
  ]


def test_hub_that_cannot_be_asked_is_one_line(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(ImportError, match='pip install huggingface_hub, or give'):
    policy.load('some/model')

  def snapshot_download(name, allow_patterns):
    raise ConnectionError('no route\nto host')

  hub = types.SimpleNamespace(snapshot_download=snapshot_download)
  monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)
  words = r'no folder some/model here.*\(no route\).* give the path of a folder'
  with pytest.raises(FileNotFoundError, match=words) as caught:
    policy.load('some/model')
  assert '\n' not in str(caught.value)


FAMILIES = {
  'llama': dict(tied_embeddings=False),
  'llama-stretched': dict(
    rope_scaling=policy.RopeScaling(kind='llama3', factor=8.0)
  ),
  'mistral': dict(window=4),
  'qwen2': dict(qkv_bias=True),
  'qwen3': dict(qk_norm=True, window=4, local=(True, False)),
  'gemma2': dict(
    activation='gelu',
    post_norms=True,
    unit_offset=True,
    scale_embeddings=True,
    attention_softcap=50.0,
    query_scale=24**-0.5,
    window=4,
    local=(True, False),
  ),
  'gemma3_text': dict(
    activation='gelu',
    post_norms=True,
    unit_offset=True,
    scale_embeddings=True,
    qk_norm=True,
    local_rope_theta=100.0,
    rope_scaling=policy.RopeScaling(kind='linear', factor=8.0),
    window=4,
    local=(False, True),
  ),
}


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('family', FAMILIES)
def test_saved_folder_is_read_back_exactly(tmp_path, family, dtype):
  config = dataclasses.replace(TINY, **FAMILIES[family])
  draw = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: draw.normal(size=x.shape).astype('f'),
    policy.abstract_params(config),
  )
  policy.save(tmp_path / 'a', config, params, dtype=dtype, end_ids=(2, 3))
  content = json.loads((tmp_path / 'a' / 'config.json').read_text())
  assert content['model_type'] == family.removesuffix('-stretched')
  assert policy.load(tmp_path / 'a').config == config
  again = read(tmp_path / 'a')
  equal(
    jax.device_get(again),
    jax.tree.map(lambda x: x.astype(dtype).astype('f'), params),
  )
  policy.save(tmp_path / 'b', config, again, dtype=dtype, end_ids=(2, 3))
  for name in ('config.json', 'generation_config.json', 'model.safetensors'):
    assert (tmp_path / 'a' / name).read_bytes() == (
      tmp_path / 'b' / name
    ).read_bytes()


def test_saved_folder_is_cut_into_files(tmp_path, folder, params):
  config = policy.load(folder).config
  policy.save(tmp_path, config, params, dtype='float32', file_bytes=1500)
  index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
  files = sorted(tmp_path.glob('*.safetensors'))
  assert len(files) > 3
  assert files[0].name == f'model-00001-of-{len(files):05}.safetensors'
  for file in files:
    held = load_file(file)
    assert sum(x.nbytes for x in held.values()) <= 1500
    assert all(index['weight_map'][name] == file.name for name in held)
  assert set(index['weight_map']) == set(tiny_tensors())
  total = sum(x.nbytes for x in tiny_tensors().values())
  assert index['metadata']['total_size'] == total
  equal(jax.device_get(read(tmp_path)), params)


# What loading takes beside the arrays themselves, in the largest tensor. The
# kernel's ru_maxrss would be that of the process which starts this one.
MEASURE = """
import re, sys, jax
from jax_rlvr import mesh as layouts, policy
pretrained = policy.load(sys.argv[1])
abstract = policy.abstract_params(pretrained.config)
shardings = layouts.shardings(layouts.make(), abstract, layouts.TRAINING)
jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))

def in_bytes(name):
  with open('/proc/self/status') as file:
    return 1024 * int(re.search(name + r':\\s+(\\d+) kB', file.read())[1])

before = in_bytes('VmRSS')
params = jax.block_until_ready(pretrained.read(shardings))
peak = in_bytes('VmHWM')
arrays = sum(x.nbytes for x in jax.tree.leaves(params))
print((peak - before - arrays) / params['embed'].nbytes)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_loading_takes_little_memory_beside_the_arrays(tmp_path):
  # 236 MiB, of which the embedding is 128.
  config = dataclasses.replace(
    TINY, vocab_size=65_536, width=512, heads=8, head_size=64,
    feed_forward=4096, layers=4,
  )  # fmt: skip
  params = jax.tree.map(
    lambda x: np.ones(x.shape, 'f'), policy.abstract_params(config)
  )
  policy.save(tmp_path, config, params, dtype='float32')
  del params
  out = subprocess.run(
    [sys.executable, '-c', MEASURE, tmp_path],
    env={'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': ':'.join(sys.path)},
    capture_output=True,
    text=True,
    check=True,
  )
  shutil.rmtree(tmp_path)
  # Seen: 0.6, most of it the compiler's.
  assert float(out.stdout) < 1.0
