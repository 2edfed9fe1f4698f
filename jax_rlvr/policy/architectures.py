"""Architectures of transformers, as data: what their config.json says.

A family is a row: what its files leave out, and what they need not say. What
no table here knows is refused, for it may change what is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jax_rlvr.policy.config import PolicyConfig


class Family(NamedTuple):
  """One architecture of transformers.

  Attributes:
    architecture: its class.
    fixed: fields of PolicyConfig that config.json does not tell.
    fields: of config.json, beyond those that all families have or with other
      values, and what it means to leave them out.
    full_every: where config.json does not list the layers with a window, each
      layer of this number sees everything.
  """

  architecture: str
  fixed: Mapping[str, Any] = {}
  fields: Mapping[str, Any] = {}
  full_every: int | None = None


COMMON = {
  'num_key_value_heads': None,
  'head_dim': None,
  'hidden_act': 'silu',
  'rms_norm_eps': 1e-6,
  'tie_word_embeddings': False,
  'rope_theta': 10_000.0,
  'rope_scaling': None,
  'rope_parameters': None,
}
_QWEN_WINDOWS = {
  'use_sliding_window': False,
  'sliding_window': 4096,
  'max_window_layers': 28,
  'layer_types': None,
}
_GEMMA = {'post_norms': True, 'unit_offset': True, 'scale_embeddings': True}
_GEMMA_FIELDS = {
  'hidden_activation': 'gelu_pytorch_tanh',
  'hidden_act': None,
  'head_dim': 256,
  'tie_word_embeddings': True,
  'query_pre_attn_scalar': 256,
  'sliding_window': 4096,
  'layer_types': None,
}

# By `model_type`. Defaults are those of transformers' configuration classes.
FAMILIES = {
  'llama': Family('LlamaForCausalLM'),
  'mistral': Family('MistralForCausalLM', fields={'sliding_window': 4096}),
  'qwen2': Family('Qwen2ForCausalLM', {'qkv_bias': True}, _QWEN_WINDOWS),
  'qwen3': Family(
    'Qwen3ForCausalLM', {'qk_norm': True}, _QWEN_WINDOWS | {'head_dim': 128}
  ),
  'gemma2': Family(
    'Gemma2ForCausalLM',
    _GEMMA,
    _GEMMA_FIELDS
    | {'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0},
    full_every=2,
  ),
  'gemma3_text': Family(
    'Gemma3ForCausalLM',
    _GEMMA | {'qk_norm': True},
    _GEMMA_FIELDS
    | {
      'vocab_size': 262_208,
      'num_attention_heads': 8,
      'num_key_value_heads': 4,
      'max_position_embeddings': 131_072,
      'rope_theta': 1_000_000.0,
      'rope_local_base_freq': 10_000.0,
      'sliding_window_pattern': None,
      # transformers computes no cap of Gemma 3's attention scores.
      'final_logit_softcapping': None,
    },
    full_every=6,
  ),
}

# Fields that mean the same there and here; the first are counts.
COUNTS = {
  'vocab_size': 'vocab_size',
  'num_hidden_layers': 'layers',
  'hidden_size': 'width',
  'num_attention_heads': 'heads',
  'num_key_value_heads': 'kv_heads',
  'head_dim': 'head_size',
  'intermediate_size': 'feed_forward',
  'max_position_embeddings': 'max_tokens',
}
SAME = COUNTS | {
  'rms_norm_eps': 'norm_eps',
  'tie_word_embeddings': 'tied_embeddings',
  'attn_logit_softcapping': 'attention_softcap',
  'final_logit_softcapping': 'logit_softcap',
}
ACTIVATIONS = {'silu': 'silu', 'gelu_pytorch_tanh': 'gelu'}

# Computed for this one value only.
ONLY = {
  'attention_bias': False,
  'mlp_bias': False,
  'partial_rotary_factor': 1.0,
  'rope_interleaved': False,
  'use_bidirectional_attention': False,
  'use_mrope': False,
  'use_qk_norm': False,
  'is_encoder_decoder': False,
  'add_cross_attention': False,
  'tie_encoder_decoder': False,
}
# What they say changes no logit: names, types, how to generate, how others
# train. Names with a leading underscore do not, either.
INERT = frozenset(
  'architectures model_type name_or_path transformers_version '
  'torch_dtype dtype use_cache cache_implementation initializer_range '
  'attention_dropout pretraining_tp is_llama_config is_decoder '
  'bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id '
  'decoder_start_token_id tokenizer_class prefix pruned_heads torchscript '
  'use_bfloat16 tf_legacy_loss cross_attention_hidden_size '
  'chunk_size_feed_forward gradient_checkpointing return_dict '
  'output_attentions output_hidden_states finetuning_task problem_type '
  'task_specific_params id2label label2id max_length min_length do_sample '
  'early_stopping num_beams num_beam_groups diversity_penalty temperature '
  'top_k top_p typical_p repetition_penalty length_penalty '
  'no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids '
  'num_return_sequences output_scores return_dict_in_generate '
  'forced_bos_token_id forced_eos_token_id remove_invalid_values '
  'exponential_decay_length_penalty suppress_tokens begin_suppress_tokens '
  'transformers.js_config unsloth_version unsloth_fixed'.split()
)
ROPE_FIELDS = {
  'factor': 'factor',
  'low_freq_factor': 'low_frequency_factor',
  'high_freq_factor': 'high_frequency_factor',
  'original_max_position_embeddings': 'original_max_tokens',
}


def tensor_names(config: PolicyConfig) -> dict[str, str]:
  """Leaf of the parameters → its name in files."""
  before_mlp = 'post_attention_layernorm'
  if config.post_norms:
    before_mlp = 'pre_feedforward_layernorm'
  names = {
    'attention_norm': 'input_layernorm.weight',
    'attention_post_norm': 'post_attention_layernorm.weight',
    'feed_forward_norm': f'{before_mlp}.weight',
    'feed_forward_post_norm': 'post_feedforward_layernorm.weight',
    'query_norm': 'self_attn.q_norm.weight',
    'key_norm': 'self_attn.k_norm.weight',
    'query': 'self_attn.q_proj.weight',
    'key': 'self_attn.k_proj.weight',
    'value': 'self_attn.v_proj.weight',
    'query_bias': 'self_attn.q_proj.bias',
    'key_bias': 'self_attn.k_proj.bias',
    'value_bias': 'self_attn.v_proj.bias',
    'output': 'self_attn.o_proj.weight',
    'gate': 'mlp.gate_proj.weight',
    'up': 'mlp.up_proj.weight',
    'down': 'mlp.down_proj.weight',
  }
  return {
    'embed': 'model.embed_tokens.weight',
    'norm': 'model.norm.weight',
    'head': 'lm_head.weight',
    **{leaf: f'model.layers.{{}}.{name}' for leaf, name in names.items()},
  }
