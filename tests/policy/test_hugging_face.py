"""config.json → PolicyConfig, from files as the hub has them, and back."""

import pathlib

import pytest

from jax_rlvr import policy
from jax_rlvr.policy.hugging_face import read_config, write_config

FILE = pathlib.Path('somewhere/config.json')

LLAMA = {
  'architectures': ['LlamaForCausalLM'],
  'attention_bias': False,
  'attention_dropout': 0.0,
  'bos_token_id': 128000,
  'eos_token_id': [128001, 128008, 128009],
  'hidden_act': 'silu',
  'hidden_size': 4096,
  'initializer_range': 0.02,
  'intermediate_size': 14336,
  'max_position_embeddings': 131072,
  'mlp_bias': False,
  'model_type': 'llama',
  'num_attention_heads': 32,
  'num_hidden_layers': 32,
  'num_key_value_heads': 8,
  'pretraining_tp': 1,
  'rms_norm_eps': 1e-05,
  'rope_scaling': {
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
    'rope_type': 'llama3',
  },
  'rope_theta': 500000.0,
  'tie_word_embeddings': False,
  'torch_dtype': 'bfloat16',
  'transformers_version': '4.42.3',
  'use_cache': True,
  'vocab_size': 128256,
}
SMOLLM2 = {
  'architectures': ['LlamaForCausalLM'],
  'attention_bias': False,
  'attention_dropout': 0.0,
  'bos_token_id': 1,
  'eos_token_id': 2,
  'hidden_act': 'silu',
  'hidden_size': 576,
  'initializer_range': 0.041666666666666664,
  'intermediate_size': 1536,
  'is_llama_config': True,
  'max_position_embeddings': 8192,
  'mlp_bias': False,
  'model_type': 'llama',
  'num_attention_heads': 9,
  'num_hidden_layers': 30,
  'num_key_value_heads': 3,
  'pad_token_id': 2,
  'pretraining_tp': 1,
  'rms_norm_eps': 1e-05,
  'rope_interleaved': False,
  'rope_scaling': None,
  'rope_theta': 100000,
  'tie_word_embeddings': True,
  'torch_dtype': 'bfloat16',
  'transformers.js_config': {'kv_cache_dtype': {'fp16': 'float16'}},
  'transformers_version': '4.42.3',
  'use_cache': True,
  'vocab_size': 49152,
}
MISTRAL = {
  'architectures': ['MistralForCausalLM'],
  'attention_dropout': 0.0,
  'bos_token_id': 1,
  'eos_token_id': 2,
  'hidden_act': 'silu',
  'hidden_size': 4096,
  'initializer_range': 0.02,
  'intermediate_size': 14336,
  'max_position_embeddings': 32768,
  'model_type': 'mistral',
  'num_attention_heads': 32,
  'num_hidden_layers': 32,
  'num_key_value_heads': 8,
  'rms_norm_eps': 1e-05,
  'rope_theta': 1000000.0,
  'sliding_window': None,
  'tie_word_embeddings': False,
  'torch_dtype': 'bfloat16',
  'transformers_version': '4.42.0.dev0',
  'use_cache': True,
  'vocab_size': 32768,
}
QWEN25 = {
  'architectures': ['Qwen2ForCausalLM'],
  'attention_dropout': 0.0,
  'bos_token_id': 151643,
  'eos_token_id': 151645,
  'hidden_act': 'silu',
  'hidden_size': 3584,
  'initializer_range': 0.02,
  'intermediate_size': 18944,
  'max_position_embeddings': 32768,
  'max_window_layers': 28,
  'model_type': 'qwen2',
  'num_attention_heads': 28,
  'num_hidden_layers': 28,
  'num_key_value_heads': 4,
  'rms_norm_eps': 1e-06,
  'rope_theta': 1000000.0,
  'sliding_window': 131072,
  'tie_word_embeddings': False,
  'torch_dtype': 'bfloat16',
  'transformers_version': '4.43.1',
  'use_cache': True,
  'use_mrope': False,
  'use_sliding_window': False,
  'vocab_size': 152064,
}
QWEN3 = {
  'architectures': ['Qwen3ForCausalLM'],
  'attention_bias': False,
  'attention_dropout': 0.0,
  'bos_token_id': 151643,
  'eos_token_id': 151645,
  'head_dim': 128,
  'hidden_act': 'silu',
  'hidden_size': 5120,
  'initializer_range': 0.02,
  'intermediate_size': 25600,
  'max_position_embeddings': 40960,
  'max_window_layers': 64,
  'model_type': 'qwen3',
  'num_attention_heads': 64,
  'num_hidden_layers': 64,
  'num_key_value_heads': 8,
  'rms_norm_eps': 1e-06,
  'rope_scaling': None,
  'rope_theta': 1000000,
  'sliding_window': None,
  'tie_word_embeddings': False,
  'torch_dtype': 'bfloat16',
  'transformers_version': '4.51.0',
  'use_cache': True,
  'use_sliding_window': False,
  'vocab_size': 151936,
}
GEMMA2 = {
  'architectures': ['Gemma2ForCausalLM'],
  'attention_bias': False,
  'attention_dropout': 0.0,
  'attn_logit_softcapping': 50.0,
  'bos_token_id': 2,
  'cache_implementation': 'hybrid',
  'eos_token_id': 1,
  'final_logit_softcapping': 30.0,
  'head_dim': 128,
  'hidden_act': 'gelu_pytorch_tanh',
  'hidden_activation': 'gelu_pytorch_tanh',
  'hidden_size': 4608,
  'initializer_range': 0.02,
  'intermediate_size': 36864,
  'max_position_embeddings': 8192,
  'model_type': 'gemma2',
  'num_attention_heads': 32,
  'num_hidden_layers': 46,
  'num_key_value_heads': 16,
  'pad_token_id': 0,
  'query_pre_attn_scalar': 144,
  'rms_norm_eps': 1e-06,
  'rope_theta': 10000.0,
  'sliding_window': 4096,
  'torch_dtype': 'bfloat16',
  'transformers_version': '4.42.0.dev0',
  'use_cache': True,
  'vocab_size': 256000,
}
GEMMA3 = {
  'architectures': ['Gemma3ForCausalLM'],
  'attention_bias': False,
  'attention_dropout': 0.0,
  'attn_logit_softcapping': None,
  'bos_token_id': 2,
  'cache_implementation': 'hybrid',
  'eos_token_id': [1, 106],
  'final_logit_softcapping': None,
  'head_dim': 256,
  'hidden_activation': 'gelu_pytorch_tanh',
  'hidden_size': 1152,
  'initializer_range': 0.02,
  'intermediate_size': 6912,
  'max_position_embeddings': 32768,
  'model_type': 'gemma3_text',
  'num_attention_heads': 4,
  'num_hidden_layers': 26,
  'num_key_value_heads': 1,
  'pad_token_id': 0,
  'query_pre_attn_scalar': 256,
  'rms_norm_eps': 1e-06,
  'rope_local_base_freq': 10000,
  'rope_scaling': None,
  'rope_theta': 1000000,
  'sliding_window': 512,
  'sliding_window_pattern': 6,
  'torch_dtype': 'bfloat16',
  'transformers_version': '4.50.0.dev0',
  'use_cache': True,
  'vocab_size': 262144,
}
# With images; nearly all of it left to the defaults.
GEMMA3_27B = {
  'architectures': ['Gemma3ForConditionalGeneration'],
  'boi_token_index': 255999,
  'eoi_token_index': 256000,
  'eos_token_id': [1, 106],
  'image_token_index': 262144,
  'initializer_range': 0.02,
  'mm_tokens_per_image': 256,
  'model_type': 'gemma3',
  'text_config': {
    'head_dim': 128,
    'hidden_size': 5376,
    'intermediate_size': 21504,
    'model_type': 'gemma3_text',
    'num_attention_heads': 32,
    'num_hidden_layers': 62,
    'num_key_value_heads': 16,
    'query_pre_attn_scalar': 168,
    'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'},
    'sliding_window': 1024,
  },
  'torch_dtype': 'bfloat16',
  'transformers_version': '4.50.0.dev0',
  'vision_config': {'hidden_size': 1152, 'model_type': 'siglip_vision_model'},
}


@pytest.mark.parametrize(
  'content, name',
  [
    (LLAMA, 'llama-3.1-8b'),
    (SMOLLM2, 'smollm2-135m'),
    (MISTRAL, 'mistral-7b-v0.3'),
    (QWEN25, 'qwen2.5-7b'),
    (QWEN3, 'qwen3-32b'),
    (GEMMA2, 'gemma-2-27b'),
    (GEMMA3, 'gemma-3-1b'),
    (GEMMA3_27B, 'gemma-3-27b'),
  ],
  ids=lambda x: x if isinstance(x, str) else '',
)
def test_files_of_the_hub_give_the_published_shapes(content, name):
  assert read_config(FILE, content) == policy.SHAPES[name]


@pytest.mark.parametrize('name', policy.SHAPES)
def test_written_config_is_read_back(name):
  shape = policy.SHAPES[name]
  assert read_config(FILE, write_config(shape)) == shape


def without(content, *names):
  return {k: v for k, v in content.items() if k not in names}


def test_form_of_transformers_5_says_the_same():
  rope = LLAMA['rope_scaling'] | {'rope_theta': 500000.0}
  new = without(LLAMA, 'rope_scaling', 'rope_theta', 'torch_dtype')
  new |= {'rope_parameters': rope, 'dtype': 'bfloat16'}
  assert read_config(FILE, new) == policy.SHAPES['llama-3.1-8b']
  kinds = (['sliding_attention'] * 5 + ['full_attention']) * 5
  new = without(
    GEMMA3, 'rope_scaling', 'rope_theta', 'rope_local_base_freq',
    'sliding_window_pattern',
  ) | {
    '_sliding_window_pattern': 6,
    'layer_types': kinds[:26],
    'rope_parameters': {
      'full_attention': {'rope_theta': 1000000, 'rope_type': 'default'},
      'sliding_attention': {'rope_theta': 10000, 'rope_type': 'default'},
    },
    'use_bidirectional_attention': False,
  }  # fmt: skip
  assert read_config(FILE, new) == policy.SHAPES['gemma-3-1b']


def test_what_a_file_leaves_out_is_the_default_of_its_family():
  # Llama 2's first files: as many key heads as query heads, no RoPE at all.
  old = without(
    LLAMA, 'num_key_value_heads', 'rope_scaling', 'rope_theta', 'head_dim',
    'attention_bias', 'mlp_bias',
  )  # fmt: skip
  config = read_config(FILE, old)
  assert (config.kv_heads, config.rope_theta, config.head_size) == (
    32,
    1e4,
    128,
  )
  # Gemma 2's files do not say that the embedding is the head.
  assert read_config(FILE, GEMMA2).tied_embeddings
  assert not read_config(
    FILE, without(LLAMA, 'tie_word_embeddings')
  ).tied_embeddings


def test_windows_follow_each_family():
  every = read_config(FILE, MISTRAL | {'sliding_window': 4096})
  assert (every.window, every.is_local) == (4096, (True,) * 32)
  late = read_config(
    FILE, QWEN25 | {'use_sliding_window': True, 'max_window_layers': 26}
  )
  assert late.window == 131072
  assert late.is_local == (False,) * 26 + (True,) * 2
  none = read_config(FILE, QWEN25 | {'max_window_layers': 26})
  assert none.window is None


@pytest.mark.parametrize(
  'content, changes, words',
  [
    (LLAMA, {'attention_bias': True}, 'attention_bias = True'),
    (QWEN3, {'attention_bias': True}, 'attention_bias = True'),
    (LLAMA, {'mlp_bias': True}, 'mlp_bias = True'),
    (LLAMA, {'hidden_act': 'gelu'}, "hidden_act = 'gelu'.*silu"),
    (GEMMA3, {'hidden_activation': 'relu'}, "hidden_activation = 'relu'"),
    (LLAMA, {'partial_rotary_factor': 0.5}, 'partial_rotary_factor = 0.5'),
    (LLAMA, {'rope_interleaved': True}, 'rope_interleaved = True'),
    (
      QWEN25,
      {'rope_scaling': {'type': 'yarn', 'factor': 4.0}},
      "rope_scaling.rope_type = 'yarn'.*remove rope_scaling",
    ),
    (
      LLAMA,
      {'rope_scaling': None, 'rope_parameters': {'rope_type': 'dynamic'}},
      "rope_parameters.rope_type = 'dynamic'",
    ),
    (
      LLAMA,
      {'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}},
      'rope_scaling.low_freq_factor = None.*give a number',
    ),
    (
      LLAMA,
      {'rope_scaling': {'rope_type': 'linear', 'factor': 8.0, 'mscale': 1}},
      'rope_scaling.mscale = 1',
    ),
    (
      LLAMA,
      {'rope_parameters': {'rope_type': 'default'}},
      'rope_scaling = .*keep either',
    ),
    (
      GEMMA3,
      {
        'rope_parameters': {
          'full_attention': {},
          'sliding_attention': {'rope_type': 'linear', 'factor': 2.0},
        }
      },
      'rope_parameters.sliding_attention = ',
    ),
    (GEMMA3, {'attn_logit_softcapping': 50.0}, 'attn_logit_softcapping = 50.0'),
    (
      GEMMA3,
      {'use_bidirectional_attention': True},
      'use_bidirectional_attention = True',
    ),
    (LLAMA, {'sliding_window': 4096}, 'sliding_window = 4096'),
    (
      QWEN3,
      {'layer_types': ['chunked_attention'] * 64},
      'layer_types = .*name',
    ),
    (GEMMA2, {'layer_types': ['full_attention']}, 'layer_types = .*name each'),
    (
      QWEN3,
      {'layer_types': ['sliding_attention'] * 64},
      'layer_types = .*give sliding_window',
    ),
    (
      LLAMA,
      {'quantization_config': {'quant_method': 'fp8'}},
      'quantization_config = .*before it was quantized',
    ),
    (
      GEMMA3_27B,
      {'quantization_config': {'quant_method': 'awq'}},
      'quantization_config = ',
    ),
    (LLAMA, {'residual_multiplier': 0.22}, 'residual_multiplier = 0.22'),
    (LLAMA, {'hidden_size': '4096'}, "hidden_size = '4096'.*whole number"),
    (LLAMA, {'model_type': 'qwen3_moe'}, "model_type = 'qwen3_moe'.*llama"),
    (
      LLAMA,
      {'architectures': ['LlamaForSequenceClassification']},
      'architectures = .*LlamaForCausalLM',
    ),
    (LLAMA, {'num_key_value_heads': 7}, '32 query heads do not divide'),
  ],
)
def test_what_is_not_computed_is_refused_by_name(content, changes, words):
  with pytest.raises(ValueError, match=words) as caught:
    read_config(FILE, content | changes)
  assert str(caught.value).startswith(f'{FILE}: ')
  assert str(caught.value).count(str(FILE)) == 1
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('name', ['hidden_size', 'model_type', 'vocab_size'])
def test_missing_field_is_named(name):
  with pytest.raises(ValueError, match=f'config.json has no {name}'):
    read_config(FILE, without(LLAMA, name))


def test_unknown_fields_that_are_null_pass():
  assert read_config(FILE, LLAMA | {'whatever': None}) == read_config(
    FILE, LLAMA
  )


def test_policy_that_no_family_computes_is_refused():
  odd = policy.PolicyConfig(
    vocab_size=16,
    layers=2,
    width=8,
    heads=2,
    kv_heads=1,
    head_size=4,
    feed_forward=8,
    qk_norm=True,
    qkv_bias=True,
  )
  with pytest.raises(ValueError, match='no family of transformers computes'):
    write_config(odd)
