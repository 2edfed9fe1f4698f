r"""The loop: prompts → rollouts → rewards → advantages → update.

  python -m jax_rlvr.train --config configs/quickstart.py \
    --workdir runs/quickstart

Run it again to go on from the last checkpoint. Exit codes: 0 done; 2 bad
configuration or input; 75 stopped by a signal and saved, run again.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import pathlib
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import rich.table
from rich.console import Console

from jax_rlvr import (
  checkpoint,
  config,
  evaluate,
  metrics,
  packing,
  policy,
  prng,
  rollout,
  sft,
)
from jax_rlvr import mesh as layouts
from jax_rlvr.checkpoint import Checkpoints
from jax_rlvr.config import Config, ConfigError, WarmUp
from jax_rlvr.prng import Stream
from jax_rlvr.records import Prompt, Rollout, TokenStats, TrainState
from jax_rlvr.scoring import Scorers
from jax_rlvr.update import make_update


class Setup(NamedTuple):
  """All that a run needs beside its state.

  Attributes:
    config: its knobs.
    actor: completes prompts.
    prompts: trained on, of all tasks.
    pretrained: host weights to start from, or None.
    workdir: the run directory.
    console: where to show progress.
  """

  config: Config
  actor: rollout.Actor
  prompts: list[Prompt]
  pretrained: Any
  workdir: pathlib.Path
  console: Console


def train(
  setup: Setup, state: TrainState, scorers: Scorers, checkpoints: Checkpoints
) -> TrainState:
  """Runs the steps that the state has not seen, or until a signal."""
  c, actor, workdir = setup.config, setup.actor, setup.workdir
  update = make_update(
    actor.policy,
    c.filters,
    c.optimizer,
    inner_steps=c.inner_steps,
    row_tokens=c.row_tokens,
    rows=_rows(c, layouts.row_shards(actor.mesh)),
    microbatch_rows=c.microbatch_tokens // c.row_tokens,
    temperature=c.temperature,
    remat=c.remat,
    place=functools.partial(layouts.place_rows, actor.mesh),
  )
  stream = (
    grain.MapDataset.source(setup.prompts).seed(c.seed).shuffle().repeat()
  )
  first = int(state.step)
  begun = bool(checkpoints.steps())
  rows = metrics.Rows(workdir / 'metrics.jsonl', keep_to=first)
  scores = metrics.Rows(workdir / 'eval.jsonl', keep_to=first if begun else -1)
  stop = _Stop()
  if not begun:
    _evaluate(setup, state, scorers, scores)
    checkpoints.save(state)
  with metrics.progress(setup.console) as progress:
    bar = progress.add_task('train', total=c.steps, completed=first, note='')
    for step in range(first, c.steps):
      key = prng.key(c.seed, Stream.STEP, step)
      rollouts, state, measured = rollout.collect(
        state, stream, actor, scorers, c
      )
      advantages = c.advantage(*rollout.outcomes(rollouts, c.group_size))
      tokens = rollout.tokens(rollouts, advantages, c.sequence_tokens)
      started = time.perf_counter()
      state, inner = update(state, tokens, key)
      measured |= metrics.reduce(jax.device_get(inner))
      measured['time/update_s'] = time.perf_counter() - started
      state = state._replace(step=np.int32(step + 1))

      rows.write({'step': step + 1} | measured)
      _write_rollouts(workdir, step + 1, rollouts)
      progress.update(bar, advance=1, note=_note(measured))
      if (step + 1) % max(1, c.steps // 10) == 0:
        progress.console.print(f'step {step + 1:>5}  {_note(measured)}')
      last = step + 1 == c.steps
      if last or (step + 1) % c.eval_every == 0:
        _evaluate(setup, state, scorers, scores)
      if last or stop.asked or (step + 1) % c.checkpoint_every == 0:
        checkpoints.save(state)
      if stop.asked:
        break
  checkpoints.wait()
  return state


def _rows(c: Config, shards: int) -> int:
  """Packed rows of an inner batch at the most, in whole shards."""
  needed = packing.rows_needed(
    c.prompts_per_step // c.inner_steps,
    c.group_size,
    c.max_prompt_tokens,
    c.max_completion_tokens,
    c.row_tokens,
  )
  return math.ceil(needed / shards) * shards


def prepare(spec: str, workdir: pathlib.Path, console: Console) -> Setup:
  """Meets every error that can be met before anything compiles.

  Raises:
    ConfigError, ValueError, OSError, ImportError: one line that names the
      thing and the remedy.
  """
  recipe = config.load(spec)
  c = recipe.config
  pretrained = None
  if isinstance(c.policy, policy.PolicyConfig):
    shape, tokenizer = c.policy, c.tokenizer
    if tokenizer is None:
      raise ConfigError(
        'tokenizer=None with a policy of random weights; give a tokenizer'
      )
  else:
    shape, pretrained, tokenizer = policy.load(c.policy)
  if c.sequence_tokens > shape.max_tokens:
    raise ConfigError(
      f'max_prompt_tokens + max_completion_tokens = {c.sequence_tokens}, '
      f'but the policy was made for {shape.max_tokens}; lower one of them'
    )
  for task in c.eval_tasks or c.tasks:
    _checked(task, 'test', tokenizer, None)
  prompts = [
    prompt
    for task in c.tasks
    for prompt in _checked(task, 'train', tokenizer, c.max_prompt_tokens)
  ]
  actor = rollout.Actor(
    policy=shape,
    tokenizer=tokenizer,
    mesh=layouts.make(slices=c.slices, fsdp=c.fsdp, tensor=c.tensor),
    slots=c.slots,
  )
  checkpoint.write_manifest(workdir, recipe, shape, tokenizer)
  return Setup(c, actor, prompts, pretrained, workdir, console)


def _checked(task, split, tokenizer, limit) -> Sequence[Prompt]:
  """The prompts of a split: some, none of them longer than the limit."""
  prompts = task.prompts(split)
  if not len(prompts):
    raise ConfigError(
      f'task {task.name!r} has no {split} prompts; check its arguments'
    )
  for prompt in prompts if limit else ():
    length = len(tokenizer.render(prompt.messages))
    if length > limit:
      raise ConfigError(
        f'prompt {prompt.id!r} of task {task.name!r} has {length} tokens, more '
        f'than max_prompt_tokens={limit}; raise it'
      )
  return prompts


def start(setup: Setup, checkpoints: Checkpoints) -> TrainState:
  """The state to go on from: the last checkpoint, or the warm-up's end."""
  c, actor = setup.config, setup.actor
  params = setup.pretrained
  if params is None:
    params = policy.init(actor.policy, prng.key(c.seed, Stream.INIT, 0))
  params = layouts.place(actor.mesh, params, layouts.TRAINING)
  if c.warm_up and not checkpoints.steps():
    params = _warm_up(setup, c.warm_up, params)
  # State of filters is batch-level: any [B, T] will do.
  stats: Any = TokenStats(*jnp.zeros((2, 1, 1), jnp.float32))
  state = TrainState(
    step=np.int32(0),
    cursor=np.int32(0),
    params=params,
    optimizer=jax.jit(c.optimizer.init)(params),
    filters=c.filters.init(stats),
  )
  if checkpoints.steps():
    state = checkpoints.restore(checkpoint.abstract_like(state))
    setup.console.print(f'going on from the checkpoint of step {state.step}')
  return state


def _warm_up(setup: Setup, settings: WarmUp, params: Any) -> Any:
  c, actor = setup.config, setup.actor
  with (
    Checkpoints(setup.workdir / 'warm_up', keep=1) as checkpoints,
    metrics.progress(setup.console) as progress,
  ):
    bar = progress.add_task('warm-up', total=settings.steps, note='')
    for state, nats in sft.warm_up(
      settings,
      actor.policy,
      params,
      sft.traces(c.tasks, c.seed),
      actor.tokenizer,
      c.sequence_tokens,
      lambda rows: layouts.place_rows(actor.mesh, rows),
      checkpoints,
    ):
      params, done = state.params, int(state.step)
      if done % 50 == 0 or done == settings.steps:
        note = f'{float(nats):.3f} nats a token'
        progress.update(bar, completed=done, note=note)
  return params


def _evaluate(setup, state, scorers, scores) -> None:
  c = setup.config
  started = time.perf_counter()
  measured, rollouts = evaluate.run(
    setup.actor,
    state.params,
    c.eval_tasks or c.tasks,
    scorers,
    key=prng.key(c.seed, Stream.EVALUATE, int(state.step)),
    prompts=c.eval_prompts,
    samples=c.eval_samples,
    temperature=c.eval_temperature,
    max_completion_tokens=c.max_completion_tokens,
  )
  measured['time/eval_s'] = time.perf_counter() - started
  scores.write({'step': int(state.step)} | measured)
  setup.console.print(f'held out, after {int(state.step)} steps:')
  setup.console.print(evaluate.table(measured))
  for r in rollouts[:: max(1, len(rollouts) // 3)][:3]:
    question = r.prompt.messages[-1]['content']
    setup.console.print(
      f'  reward {r.reward}: {question!r} → {r.completion.text!r}',
      markup=False, highlight=False,
    )  # fmt: skip


def _note(measured) -> str:
  return (
    f'reward {measured["reward/mean"]:.3f}  '
    f'entropy {measured["entropy/token_mean"]:.3f}  '
    f'{measured["rollout/tokens_per_s"]:.0f} tokens/s'
  )


def _write_rollouts(
  workdir: pathlib.Path, step: int, rollouts: Sequence[Rollout]
) -> None:
  """A sample of a step's completions, one JSON object a line."""
  folder = workdir / 'rollouts'
  folder.mkdir(exist_ok=True)
  with (folder / f'{step:06d}.jsonl').open('w') as file:
    for r in rollouts[:: max(1, len(rollouts) // 16)]:
      row = {
        'task': r.prompt.task,
        'prompt': r.prompt.id,
        'completion': r.completion.text,
        'truncated': r.completion.truncated,
        'reward': r.reward,
        'entropy': float(r.entropy.mean()),
      }
      file.write(json.dumps(row) + '\n')


class _Stop:
  """Turns SIGTERM and Ctrl-C into a request to save and leave."""

  def __init__(self):
    self.asked = False
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._ask)

  def _ask(self, number, frame):
    del number, frame
    self.asked = True


def _resolved(setup: Setup) -> rich.table.Table:
  """What the run comes to, in the vocabulary of the config."""
  c, shape = setup.config, setup.actor.policy
  count = sum(x.size for x in jax.tree.leaves(policy.abstract_params(shape)))
  table = rich.table.Table('setting', 'value', title='resolved')
  for name, value in {
    'parameters': f'{count:,}',
    'tasks': ', '.join(task.name for task in c.tasks),
    'train prompts': f'{len(setup.prompts):,}',
    'steps': c.steps,
    'prompts per step': c.prompts_per_step,
    'group size': c.group_size,
    'inner steps per rollout batch': c.inner_steps,
    'microbatch tokens': c.microbatch_tokens,
    'max prompt tokens': c.max_prompt_tokens,
    'max completion tokens': c.max_completion_tokens,
    'temperature': c.temperature,
    'seed': c.seed,
    'devices': f'{jax.device_count()} × {jax.devices()[0].device_kind}',
  }.items():
    table.add_row(name, str(value))
  return table


def _refused(error: Exception) -> int:
  print(f'error: {error}', file=sys.stderr)
  return 2


def main(argv: Sequence[str] | None = None) -> int:
  """The command; returns its exit code."""
  parser = argparse.ArgumentParser(
    prog='python -m jax_rlvr.train',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--config', required=True, help='recipe.py[:key=value,…]')
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  arguments = parser.parse_args(argv)
  console = Console()
  workdir = arguments.workdir
  try:
    setup = prepare(arguments.config, workdir, console)
    c = setup.config
    scorers = Scorers(c.tasks_scored, c.scorers, c.reward_deadline_s)
  except (ValueError, OSError, ImportError) as error:
    return _refused(error)
  console.print(_resolved(setup))
  try:
    with (
      scorers,
      Checkpoints(workdir / 'checkpoints', c.keep_checkpoints) as checkpoints,
    ):
      state = train(setup, start(setup, checkpoints), scorers, checkpoints)
  except ConfigError as error:
    return _refused(error)
  if int(state.step) < c.steps:
    console.print(f'stopped and saved at step {state.step}; run again to go on')
    return 75
  console.print(
    f'next: python -m jax_rlvr.evaluate --workdir {workdir} --samples 8'
  )
  return 0


if __name__ == '__main__':
  sys.exit(main())
