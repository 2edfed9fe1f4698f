# %% [markdown]
# # A policy in research code
#
# Run it as a script, `python examples/load_policy.py`, or read the notebook
# that is made from it, `load_policy.ipynb`. It takes seconds on a laptop.
#
# `jax_rlvr.load_policy(path)` takes a run's work directory (and a step), a
# Hugging Face folder, or a GGUF file. So that there is something to load, here
# is a folder of random weights, as `python -m jax_rlvr.export` writes it, too.

# %%
import pathlib
import tempfile

import jax
import numpy as np

import jax_rlvr
from jax_rlvr import policy
from jax_rlvr.tokenizer import train_characters

folder = pathlib.Path(tempfile.mkdtemp())
tokenizer = train_characters('0123456789+=')
shape = policy.PolicyConfig(
  vocab_size=tokenizer.vocab_size,
  layers=2,
  width=32,
  heads=4,
  kv_heads=2,
  head_size=8,
  feed_forward=64,
)
weights = policy.init(shape, jax.random.key(0))
policy.save(folder, shape, weights, end_ids=tokenizer.end_ids)
tokenizer.save(folder)
print(*sorted(file.name for file in folder.iterdir()), sep='\n')

# %% [markdown]
# ## Load
#
# The architecture comes from `config.json`; what it asks for and this package
# does not compute is refused by name. Weights go straight to the devices.
# `params` is a nested dict of float32 arrays.

# %%
loaded = jax_rlvr.load_policy(folder)
count = sum(x.size for x in jax.tree.leaves(loaded.params))
print(f'{count:,} parameters in {loaded.config.layers} layers')

# %% [markdown]
# ## Logits
#
# Sequences are padded at the end, and `lengths` says where each one ends.
# Logits at t are those of the token after t.

# %%
texts = ['12+34=46', '7+5=12']
ids = [loaded.tokenizer.encode(text) for text in texts]
lengths = np.array([len(row) for row in ids])
tokens = np.zeros((len(ids), lengths.max()), np.int32)
for row, of_text in zip(tokens, ids, strict=True):
  row[: len(of_text)] = of_text

logits = loaded.logits(tokens, lengths)
print(logits.shape, logits.dtype)

# %% [markdown]
# ## Token stats
#
# Log-probability and entropy in nats, of the token AT each place, and without
# an array of [B, T, V]: this is the function that training runs.

# %%
stats = loaded.token_stats(tokens, lengths)
for row, length in enumerate(lengths):
  for t in range(1, length):
    token = loaded.tokenizer.decode([int(tokens[row, t])])
    logprob, entropy = stats.logprob[row, t], stats.entropy[row, t]
    print(f'{token!r:5} logprob {logprob:6.2f}  entropy {entropy:5.2f}')
  print()

# %% [markdown]
# The same numbers from the logits, for comparison.

# %%
logprobs = jax.nn.log_softmax(logits[0, :-1])
picked = logprobs[np.arange(len(logprobs)), tokens[0, 1:]]
print(f'largest difference {np.abs(picked - stats.logprob[0, 1:]).max():.0e}')

# %% [markdown]
# ## Completions
#
# Each prompt is read once and completed `samples` times. A completion has its
# text, and ids with the sampler's own log-probabilities and entropies, which
# are the trainer's. It depends on the seed, the number of its prompt and its
# own, not on what is completed beside it. `stream=` hears of texts as they
# grow, `progress=True` shows a bar.

# %%
made = loaded.generate(['12+34=', '7+5='], samples=3, max_new_tokens=6)
for prompt, completions in zip(['12+34=', '7+5='], made, strict=True):
  for c in completions:
    print(
      f'{prompt}{c.text:8} {len(c.ids)} tokens, {c.entropies.mean():.2f} nats'
    )

# %% [markdown]
# Transforms change the distribution that is drawn from. `logprobs` stay those
# of the full softmax, which training goes by; `sampled_logprobs` are of what
# was drawn from.

# %%
from jax_rlvr.sampling import chain, min_p, top_k  # noqa: E402

((c,),) = loaded.generate(
  ['12+34='], max_new_tokens=6, transform=chain(top_k(3), min_p(0.1))
)
for mine, full in zip(c.sampled_logprobs, c.logprobs, strict=True):
  print(f'drawn at {mine:5.2f}, full softmax {full:5.2f}')
