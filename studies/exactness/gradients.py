r"""How far selection in microbatches takes the gradient from the batch's own.

  python -m studies.exactness.gradients --on quickstart \
    --policies runs/policy/0 runs/policy/1 runs/policy/2

One inner batch of the policy's own completions for each policy given. Gradients
are those after one plain update on it, so that ratios are not 1. Writes
`results/gradients_<on>.json`.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib

import jax
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import jax_rlvr
from jax_rlvr import config
from jax_rlvr.advantages import group_norm
from jax_rlvr.filters import token_mean
from jax_rlvr.packing import padded
from jax_rlvr.policy_gradient import watched_gradients
from jax_rlvr.records import Tokens
from jax_rlvr.token_stats import token_stats
from studies import asking
from studies.exactness.recipe import chain

HERE = pathlib.Path(__file__).parent
METHODS = 'clip_cov', 'kl_cov', 'forking_tokens'
MICROBATCHES = 1, 4, 16


@functools.partial(jax.jit, static_argnums=0)
def stats_of(shape, params, rows):
  return token_stats(shape, params, rows)


@functools.partial(jax.jit, static_argnums=0)
def pulled_back(shape, params, rows, token_gradients):
  """dL/dparams of dL/dstats."""
  _, pull = jax.vjp(lambda p: token_stats(shape, p, rows), params)
  return pull(token_gradients)[0]


def inner_batch(policy, c, seed):
  """The policy's completions of random prompts, as an update sees them."""
  task, count = c.tasks[0], c.prompts_per_step // c.inner_steps
  everything = task.prompts('train')
  asked = np.random.default_rng(seed).choice(len(everything), count, False)
  prompts = [everything[i] for i in asked]
  ids, made, rewards = asking.ask(
    policy, task, prompts, c.group_size, c.max_completion_tokens, seed=seed
  )
  lengths = np.array([[len(m.ids) for m in group] for group in made])
  advantage = group_norm(rewards, lengths > 0, lengths)
  texts = asking.texts(ids, made)
  old = np.zeros(texts.ids.shape, np.float32)
  old[texts.mask] = np.concatenate(
    [m.logprobs for group in made for m in group]
  )
  each = np.where(texts.mask, advantage.reshape(-1, 1), 0).astype(np.float32)
  return padded(texts.ids, texts.mask), Tokens(texts.mask, each, old)


def compare(policy, c, lr, seed) -> dict:
  """By method and microbatches: how far off the gradient is, and its tokens.

  `chosen` tokens with a gradient, the share of the batch's that are `shared`,
  and of the gradients `cosine` and `distance`, relative to the batch's norm.
  'another draw' is the batch's own Clip-Cov under another key: what chance
  alone does.
  """
  rows, tokens = inner_batch(policy, c, seed)
  shape, params = policy.config, policy.params
  stats = stats_of(shape, params, rows)
  plain, _ = jax_rlvr.token_gradients(optax.chain(token_mean()), stats, tokens)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(lr))
  step, _ = optimizer.update(
    pulled_back(shape, params, rows, plain), optimizer.init(params), params
  )
  params = optax.apply_updates(params, step)
  stats = stats_of(shape, params, rows)

  def gradients(filters, key):
    grads, _, ((came, left),) = watched_gradients(
      filters, stats, tokens, key=jax.random.key(key)
    )
    vector, _ = ravel_pytree(pulled_back(shape, params, rows, grads))
    return np.asarray(vector, float), np.asarray(came), np.asarray(left)

  found = {'tokens': int(tokens.mask.sum())}
  batch = len(tokens.mask)
  for method in METHODS:

    def chosen(came, left, method=method):
      return left != 0 if method == 'forking_tokens' else left != came

    whole, *seen = gradients(chain(method, 0, batch), 0)
    ours = chosen(*seen)
    found[method] = {'batch': {'chosen': int(ours.sum())}}
    variants = {str(k): (chain(method, k, batch), 0) for k in MICROBATCHES}
    if method == 'clip_cov':
      variants['another draw'] = chain(method, 0, batch), 1
    for name, (filters, key) in variants.items():
      part, *seen = gradients(filters, key)
      theirs = chosen(*seen)
      norms = np.linalg.norm(whole) * np.linalg.norm(part)
      distance = np.linalg.norm(part - whole) / np.linalg.norm(whole)
      found[method][name] = {
        'chosen': int(theirs.sum()),
        'shared': float((ours & theirs).sum() / ours.sum()),
        'cosine': float(whole @ part / norms),
        'distance': float(distance),
      }
  return found


def main() -> None:
  parser = argparse.ArgumentParser(
    prog='python -m studies.exactness.gradients',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--on', default='quickstart')
  parser.add_argument('--policies', nargs='+', required=True)
  arguments = parser.parse_args()
  c = config.load(f'studies/setting.py:on={arguments.on}').config
  lr = {'quickstart': 5e-4, 'smollm2': 2e-5}[arguments.on]
  found = []
  for seed, path in enumerate(arguments.policies):
    found.append(compare(jax_rlvr.load_policy(path), c, lr, seed))
    file = HERE / 'results' / f'gradients_{arguments.on}.json'
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + '\n')
    print(json.dumps(found[-1], indent=1))


if __name__ == '__main__':
  main()
