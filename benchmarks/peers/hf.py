"""Hugging Face `generate` on the CPU."""

from __future__ import annotations

import os

# Threads that wait spin at first. By default so long that a neighbour's load
# multiplies CPU seconds by four; so briefly, no slowdown was seen without one.
os.environ.setdefault('GOMP_SPINCOUNT', '6000')

import torch  # noqa: E402
import transformers  # noqa: E402
from peers.batches import batches  # noqa: E402


def build(shape: dict) -> tuple[dict, dict]:
  """Versions, and what can be asked for by name."""
  torch.set_num_threads(2)
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=shape['vocab_size'],
      hidden_size=shape['width'],
      intermediate_size=shape['feed_forward'],
      num_hidden_layers=shape['layers'],
      num_attention_heads=shape['heads'],
      num_key_value_heads=shape['kv_heads'],
      head_dim=shape['head_size'],
      max_position_embeddings=8192,
      tie_word_embeddings=True,
      bos_token_id=None,
      eos_token_id=None,
      pad_token_id=0,
      attn_implementation='sdpa',
      dtype='float32',
    )
  ).eval()

  @torch.inference_mode()
  def generate(prompts, samples, lengths, slots):
    made = []
    for rows, new in batches(prompts, samples, lengths, slots):
      ids = torch.from_numpy(rows)
      out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=True,
        temperature=1.0,
        # Neither sorts the vocabulary.
        top_k=0,
        top_p=1.0,
        # Its cache grows; a static one took longer when both were tried.
        use_cache=True,
      )
      made += [out.shape[1] - ids.shape[1]] * len(rows)
    return made

  versions = {
    'torch': torch.__version__,
    'transformers': transformers.__version__,
  }
  return versions, {'hf': generate}
