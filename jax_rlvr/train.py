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
import pathlib
import signal
import sys
import time
from collections.abc import Sequence

import grain
import jax
import numpy as np
from rich.console import Console

from jax_rlvr import evaluate, metrics, prng, rollout
from jax_rlvr.actor import Interrupted
from jax_rlvr.checkpoint import Checkpoints
from jax_rlvr.config import ConfigError
from jax_rlvr.prng import Stream
from jax_rlvr.records import Rollout, TrainState
from jax_rlvr.sampling import Progress
from jax_rlvr.scoring import Scorers
from jax_rlvr.setup import Setup, prepare, resolved, start, update_of


def train(
  setup: Setup, state: TrainState, scorers: Scorers, checkpoints: Checkpoints
) -> TrainState:
  """Runs the steps that the state has not seen.

  Raises:
    Interrupted: by a signal; the state is saved.
  """
  c, actor, workdir = setup.config, setup.actor, setup.workdir
  update = update_of(setup)
  stream = (
    grain.MapDataset.source(setup.prompts).seed(c.seed).shuffle().repeat()
  )
  first = int(state.step)
  begun = bool(checkpoints.steps())
  rows = metrics.Rows(workdir / 'metrics.jsonl', keep_to=first)
  scores = metrics.Rows(workdir / 'eval.jsonl', keep_to=first if begun else -1)
  if not begun:
    checkpoints.save(state)
  with metrics.progress(setup.console) as bars, _Stop() as stop:
    bar = bars.add_task('train', total=c.steps, completed=first, note='')
    watch = functools.partial(_watch, bars, bars.add_task('', note=''), stop)
    try:
      for step in range(first, c.steps + 1):
        due = step in (0, c.steps) or step % c.eval_every == 0
        if due and step not in scores.steps:
          _evaluate(setup, state, scorers, scores, watch)
        if step == c.steps:
          break
        key = prng.key(c.seed, Stream.STEP, step)
        rollouts, state, measured = rollout.collect(
          state, stream, actor, scorers, c, watch
        )
        outcomes = rollout.outcomes(rollouts, c.group_size)
        advantages = c.advantage(*outcomes) if rollouts else np.zeros(0)
        tokens = rollout.tokens(
          rollouts,
          advantages,
          c.sequence_tokens,
          rows=c.prompts_per_step * c.group_size,
          step=step if c.oversample > 1 else None,
        )
        started = time.perf_counter()
        state, inner = update(state, tokens, key)
        measured |= metrics.reduce(jax.device_get(inner))
        measured['time/update_s'] = time.perf_counter() - started
        state = state._replace(step=np.int32(step + 1))

        rows.write({'step': step + 1} | measured)
        _write_rollouts(workdir, step + 1, rollouts)
        bars.update(bar, advance=1, note=_note(measured))
        if (step + 1) % max(1, c.steps // 10) == 0:
          bars.console.print(f'step {step + 1:>5}  {_note(measured)}')
        if step + 1 == c.steps or (step + 1) % c.checkpoint_every == 0:
          checkpoints.save(state)
    except Interrupted:
      checkpoints.wait()
      if int(state.step) not in checkpoints.steps():
        checkpoints.save(state)
      raise Interrupted(f'step {int(state.step)}') from None
    finally:
      checkpoints.wait()
  return state


def _watch(bars, bar, stop: _Stop, progress: Progress) -> None:
  """Between two segments of sampling: shows where it is, or ends it."""
  if stop.asked:
    raise Interrupted
  bars.update(
    bar,
    description='rollout',
    total=progress.total,
    completed=progress.done,
    note=progress.note,
  )


def _evaluate(setup, state, scorers, scores, watch) -> None:
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
    max_prompt_tokens=c.max_prompt_tokens,
    transform=c.eval_transform,
    stop=c.stop,
    on_progress=watch,
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

  def __enter__(self) -> _Stop:
    self.asked = False
    self._before = {
      number: signal.signal(number, self._ask)
      for number in (signal.SIGTERM, signal.SIGINT)
    }
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _ask(self, number, frame):
    del number, frame
    self.asked = True


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
  console.print(resolved(setup))
  try:
    with (
      scorers,
      Checkpoints(workdir / 'checkpoints', c.keep_checkpoints) as checkpoints,
    ):
      train(setup, start(setup, checkpoints), scorers, checkpoints)
  except ConfigError as error:
    return _refused(error)
  except Interrupted as stopped:
    console.print(f'stopped and saved at {stopped}; run again to go on')
    return 75
  console.print(
    f'next: python -m jax_rlvr.evaluate --workdir {workdir} --samples 8',
    soft_wrap=True,
  )
  return 0


if __name__ == '__main__':
  sys.exit(main())
