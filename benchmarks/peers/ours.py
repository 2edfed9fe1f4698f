"""This project's sampler, and two yardsticks of its own.

`static` is what it replaces: whole batches that wait for their longest row.
`bare_*` are a decoding step's weight products with nothing around them.
"""

from __future__ import annotations

import functools
import os

os.environ['JAX_PLATFORMS'] = 'cpu'

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from peers.batches import batches  # noqa: E402

from jax_rlvr import mesh as layouts  # noqa: E402
from jax_rlvr import policy, sampling  # noqa: E402
from jax_rlvr.policy import attention, decoder, decoding  # noqa: E402

NO_END = (-1,)


# THE ONE PLACE that knows the sampler.
def ours(params, config, prompts, samples, lengths, slots):
  """Completes each prompt `samples` times; returns what each made, in tokens.

  Args:
    params: of the policy.
    config: of the policy.
    prompts: [P, Tp], all of one length.
    samples: a prompt.
    lengths: tokens of completion i, which is of prompt i // samples.
    slots: sequences decoded at one time.
  """
  engine = sampling.Engine(
    policy=config,
    mesh=layouts.make(),
    slots=slots,
    prompt_tokens=prompts.shape[1],
    completion_tokens=max(lengths),
  )
  limits = np.reshape(lengths, (len(prompts), samples))
  keys = jax.random.split(jax.random.key(0), limits.shape)
  groups = map(
    sampling.Group, prompts, np.asarray(jax.random.key_data(keys)), limits
  )
  made = np.zeros_like(limits)
  for progress in engine.complete(
    engine.unstacked(params), list(groups), temperature=1.0, end_ids=NO_END
  ):
    for completed in progress.finished:
      made[completed.group, completed.sample] = len(completed.ids)
  return made.ravel().tolist()


def static(params, config, prompts, samples, lengths, slots):
  """Batch after batch, each until its longest row has ended."""
  made = []
  for rows, new in batches(prompts, samples, lengths, slots):
    keys = jax.random.split(jax.random.key(0), len(rows))
    limit = max(lengths)
    drawn = _static_batch(config, params, rows, keys, new, limit=limit)
    made += np.sum(np.asarray(drawn.ids) >= 0, axis=1).tolist()
  return made


@functools.partial(jax.jit, static_argnames=('config', 'limit'))
def _static_batch(config, params, prompts, keys, steps, *, limit):
  """Reads every row's prompt, then draws `steps` tokens a row, at most `limit`.

  Room in the cache is for `limit`. Ids of tokens not drawn are -1.
  """
  rows, start = prompts.shape
  layout = attention.plain(rows, start)
  attend = attention.XLA.attend(config, layout)

  def keeping(query, key, value, local):
    return attend(query, key, value, local)[0], (key, value)

  rotate = decoder.rotary(config, layout.positions)
  x = decoder.embed(config, params, prompts)
  x, kept = decoder.scan_blocks(
    config, params['blocks'], x, rotate, keeping, remat='none'
  )
  room = [(0, 0), (0, limit), (0, 0), (0, 0)]
  cache = [
    tuple(jnp.pad(part[i], room) for part in kept) for i in range(config.layers)
  ]
  # Inside a loop XLA would copy every slice of a stacked weight.
  layers = policy.unstack(params)['blocks']

  def draw(x, step):
    hidden = decoder.rms_norm(config, x, params['norm'])
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    return sampling.draw(step_keys, policy.logits(config, params, hidden), 1.0)

  def put(all_drawn, drawn, step):
    return jax.tree.map(lambda x, new: x.at[:, step].set(new), all_drawn, drawn)

  def body(step, carry):
    cache, last, all_drawn = carry
    at = start + step - 1
    rotate = decoder.rotary(config, jnp.full(rows, at))
    x = decoder.embed(config, params, last)
    new_cache = []
    for weights, own in zip(layers, cache, strict=True):
      attend = functools.partial(_attend, config, own, at)
      x, own = decoder.block_from(config, weights)(x, rotate, attend, False)
      new_cache.append(own)
    drawn = draw(x, step)
    return new_cache, drawn.ids, put(all_drawn, drawn, step)

  first = draw(x[:, -1], 0)
  blank = jax.tree.map(lambda x: jnp.full((rows, limit), -1, x.dtype), first)
  carry = cache, first.ids, put(blank, first, 0)
  return jax.lax.fori_loop(1, steps, body, carry)[2]


def _attend(config, own, at, query, key, value, local):
  """One query a row over its own sequence up to `at`."""
  del local
  keys, values = (
    jax.lax.dynamic_update_slice_in_dim(cached, new[:, None], at, axis=1)
    for cached, new in zip(own, (key, value), strict=True)
  )
  rows, heads, size = query.shape
  query = query.reshape(rows, config.kv_heads, -1, size)
  scores = jnp.einsum('bkrh,btkh->bkrt', query, keys) * size**-0.5
  seen = jnp.arange(keys.shape[1]) <= at
  weights = jax.nn.softmax(jnp.where(seen, scores, attention.UNSEEN), axis=-1)
  mixed = jnp.einsum('bkrt,btkh->bkrh', weights, values)
  return mixed.reshape(rows, heads, size), (keys, values)


def bare(params, config, prompts, samples, lengths, slots, *, form):
  """As many steps as it takes to decode, on `slots` rows; makes no tokens.

  Args:
    form: 'scanned' over layers; 'unrolled'; or 'turned': unrolled over weights
      laid out as the sampler's.
  """
  del prompts, samples
  x = jax.random.normal(jax.random.key(0), (slots, config.width))
  steps = max(lengths) - 1  # the first token comes of the prompt
  np.asarray(_products(config, params[form], x, steps, form=form))
  return []


@functools.partial(jax.jit, static_argnames=('config', 'form'))
def _products(config, params, x, steps, *, form):
  """All weight products of each step.

  What joins them is cheap, and keeps them all and the numbers in bounds.
  """

  def product(x, weight, features):
    if form == 'turned':
      return decoding.turned(x, weight, (features,))
    # Flat: an einsum over two axes would have the weights transposed.
    return x @ weight.reshape(x.shape[-1], features)

  def layer(x, w):
    size = config.head_size
    query = product(x, w['query'], config.heads * size)
    key = product(x, w['key'], config.kv_heads * size)
    value = product(x, w['value'], config.kv_heads * size)
    mixed = query + jnp.tile(key * value, config.heads // config.kv_heads)
    x = _bounded(x + product(mixed, w['output'], config.width))
    gate = product(x, w['gate'], config.feed_forward)
    up = product(x, w['up'], config.feed_forward)
    return _bounded(x + product(gate * up, w['down'], config.width)), None

  def step(_, x):
    if form == 'scanned':
      x, _ = jax.lax.scan(layer, x, params['blocks'])
    else:
      for weights in params['blocks']:
        x, _ = layer(x, weights)
    # Else the compiler would compute only the logits that are used.
    scores = jax.lax.optimization_barrier(policy.logits(config, params, x))
    return _bounded(x + scores[:, : config.width])

  return jax.lax.fori_loop(0, steps, step, x)


def _bounded(x):
  return jnp.clip(x, -2.0, 2.0)


def build(shape: dict) -> tuple[dict, dict]:
  """Versions, and what can be asked for by name."""
  config = policy.PolicyConfig(**shape)
  params = policy.init(config, jax.random.key(0))
  runs = {
    'ours': ours,
    'static': static,
  }
  runs = {
    name: functools.partial(run, params, config) for name, run in runs.items()
  }
  forms = {
    'scanned': params,
    'unrolled': jax.jit(policy.unstack)(params),
    'turned': jax.jit(functools.partial(policy.unstack, turn=True))(params),
  }
  for form in forms:
    runs[f'bare_{form}'] = functools.partial(bare, forms, config, form=form)
  return {'jax': jax.__version__}, runs
