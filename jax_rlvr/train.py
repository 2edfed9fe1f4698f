r"""The loop: prompts → rollouts → rewards → advantages → update.

  python -m jax_rlvr.train --config configs/quickstart.py \
    --workdir runs/quickstart

Run it again to go on from the last checkpoint. Exit codes: 0 done; 2 bad
configuration or input; 75 stopped by a signal and saved, run again.
"""

from __future__ import annotations

import argparse
import functools
import signal
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
from rich.console import Console

from jax_rlvr import (
  evaluate,
  hosts,
  metrics,
  prng,
  rollout,
  samples,
  storage,
)
from jax_rlvr.actor import Interrupted
from jax_rlvr.analysis import covariance, entropy_law
from jax_rlvr.checkpoint import Checkpoints
from jax_rlvr.config import ConfigError
from jax_rlvr.policy import PolicyConfig
from jax_rlvr.policy_gradient import tracked_names
from jax_rlvr.prng import Stream
from jax_rlvr.records import Rollout, TrainState
from jax_rlvr.sampling import Progress
from jax_rlvr.scoring import Scorers
from jax_rlvr.setup import (
  Setup,
  first_prompt,
  memory,
  prepare,
  record,
  reset_reference,
  resolved,
  start,
  update_of,
)


def train(
  setup: Setup,
  workdir: storage.Path,
  state: TrainState,
  scorers: Scorers,
  checkpoints: Checkpoints,
) -> TrainState:
  """Runs the steps that the state has not seen.

  Raises:
    Interrupted: by a signal; the state is saved.
    ConfigError: a checkpoint cannot be written, or there is no such score to
      keep the best by.
  """
  c, actor = setup.config, setup.actor
  update = update_of(setup)
  first, filters = int(state.step), tracked_names(state.filters)
  with (
    metrics.Log(
      workdir, step=first, evaluated=bool(checkpoints.steps()), wandb=c.wandb
    ) as log,
    metrics.progress(setup.console) as bars,
    _Stop() as stop,
  ):
    bar = bars.add_task('train', total=c.steps, completed=first, note='')
    watch = functools.partial(_watch, bars, bars.add_task('', note=''), stop)
    evaluated = functools.partial(
      _evaluate, setup, workdir, scorers, log, watch
    )
    late = []  # of a step: written while the next update runs

    def settle():
      for step, scalars, shown in late:
        log.step(step, scalars)
        if hosts.is_leader():
          samples.write(workdir, step, *shown)
      late.clear()

    def is_due(step, every):
      return step in (0, c.steps) or step % every == 0

    scores = None
    try:
      if is_due(first, c.eval_every) and not log.has_scores(first):
        scores = evaluated(state)
      if not checkpoints.steps():
        checkpoints.save(state, scores)
      for step in range(first, c.steps):
        key = prng.key(c.seed, Stream.STEP, step)
        rollouts, state, measured = rollout.collect(
          state, setup.stream, actor, scorers, c, watch
        )
        outcomes = rollout.outcomes(rollouts, c.group_size)
        advantages = c.advantage(*outcomes) if rollouts else np.zeros(0)
        tokens = rollout.tokens(
          rollouts,
          advantages,
          c.sequence_tokens,
          rows=c.sequences,
          step=step if c.oversample > 1 else None,
        )
        started = time.perf_counter()
        state, inner, seen = update(state, tokens, key)
        settle()
        shown = samples.chosen(rollouts, advantages, c.sequences, c.inner_steps)
        measured |= covariance.of_rollouts(rollouts, advantages)
        inner, seen = jax.device_get((inner, seen))
        measured |= metrics.reduce(inner)
        measured |= _speed(actor.policy, rollouts, started, measured)
        state = state._replace(step=np.int32(step + 1))
        late.append((step + 1, measured, (shown, seen, filters)))

        bars.update(bar, advance=1, note=_note(measured))
        if (step + 1) % max(1, c.steps // 10) == 0:
          bars.console.print(f'step {step + 1:>5}  {_note(measured)}')
        if c.reference_every and (step + 1) % c.reference_every == 0:
          oldest = min(checkpoints.steps(), default=0)
          state = reset_reference(setup, workdir, state, oldest)
        scores = None
        if is_due(step + 1, c.eval_every):
          # The law reads the rows of all steps, as it will after a resume.
          settle()
          scores = evaluated(state)
        if is_due(step + 1, c.checkpoint_every):
          settle()
          checkpoints.save(state, scores)
    except Interrupted:
      settle()
      checkpoints.wait()
      if int(state.step) not in checkpoints.steps():
        checkpoints.save(state)
      raise Interrupted(f'step {int(state.step)}') from None
    checkpoints.wait()
  return state


def _speed(
  shape: PolicyConfig, rollouts: Sequence[Rollout], started: float, measured
) -> dict[str, float]:
  """Of an update that has just ended, and of the rollout before it.

  Model FLOPs are those of the policy's matrix products and attention, three
  times forward for an update; recomputation and padding do not count.
  """
  seconds = time.perf_counter() - started
  lengths = [len(r.prompt_ids) + len(r.ids) for r in rollouts]
  return {
    'time/update_s': seconds,
    'time/update_tokens_per_s': sum(lengths) / seconds,
    'time/update_model_flops_per_s': 3 * shape.forward_flops(lengths) / seconds,
  }


def _watch(bars, bar, stop: _Stop, progress: Progress) -> None:
  """Between two segments of sampling: shows where it is, or ends it."""
  if hosts.any_of('stop', [stop.asked])[0]:
    raise Interrupted
  bars.update(
    bar,
    description='rollout',
    total=progress.total,
    completed=progress.done,
    note=progress.note,
  )


def _evaluate(setup, workdir, scorers, log, watch, state) -> dict[str, float]:
  c = setup.config
  started = time.perf_counter()
  measured, questions = evaluate.run(
    setup.actor,
    state.params,
    c.evaluations,
    scorers,
    key=prng.key(c.seed, Stream.EVALUATE, int(state.step)),
    max_completion_tokens=c.max_completion_tokens,
    max_prompt_tokens=c.max_prompt_tokens,
    on_progress=watch,
  )
  if c.keep_best and c.keep_best not in measured:
    raise ConfigError(
      f'keep_best={c.keep_best!r} is no score; there are {", ".join(measured)}'
    )
  step, took = int(state.step), {'time/eval_s': time.perf_counter() - started}
  law = {}
  if hosts.is_leader():
    rows, evaluations = metrics.logged(workdir)
    evaluations.append({'step': step} | measured)
    law = entropy_law.streamed(rows, evaluations, c.steps)
    evaluate.write(workdir / 'eval' / f'{step:06d}.jsonl', questions)
  log.evaluation(step, measured | law | took)
  setup.console.print(f'held out, after {step} steps:')
  setup.console.print(evaluate.tables(measured))
  for each in questions[:: max(1, len(questions) // 3)][:3]:
    r = each.rollouts[0]
    question = r.prompt.messages[-1]['content']
    setup.console.print(
      f'  reward {r.reward}: {question!r} → {r.completion.text!r}',
      markup=False, highlight=False,
    )  # fmt: skip
  return measured


def _note(measured) -> str:
  return (
    f'reward {measured["reward/mean"]:.3f}  '
    f'entropy {measured["entropy/token_mean"]:.3f}  '
    f'{measured["time/rollout_tokens_per_s"]:.0f} tokens/s'
  )


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
  parser.add_argument('--workdir', help='folder, or gs://bucket/folder')
  parser.add_argument(
    '--dry_run', action='store_true', help='check all, show all, train nothing'
  )
  hosts.add_flags(parser)
  arguments = parser.parse_args(argv)
  if not arguments.dry_run and arguments.workdir is None:
    parser.error('--workdir is required')
  return hosts.run(_run, arguments)


def _run(arguments: argparse.Namespace) -> int:
  console = Console(quiet=not hosts.is_leader())
  try:
    with hosts.all_or_none('setup'):
      setup = prepare(arguments.config, console)
      c = setup.config
    if arguments.dry_run:
      console.print(resolved(setup))
      console.print(memory(setup))
      console.print(first_prompt(setup), markup=False, highlight=False)
      return 0
    workdir = storage.path(arguments.workdir)
    with hosts.all_or_none('scorers'):
      scorers = Scorers(
        c.tasks_scored,
        c.scorers,
        c.reward_deadline_s,
        c.reward_memory_mb,
        c.batch_deadline_s,
      )
    record(setup, workdir)
  except (ValueError, OSError, ImportError) as error:
    return _refused(error)
  console.print(resolved(setup))
  try:
    with (
      scorers,
      Checkpoints(
        workdir / 'checkpoints',
        c.keep_checkpoints,
        keep_every=c.keep_every,
        keep_best=c.keep_best,
      ) as checkpoints,
    ):
      state = start(setup, workdir, checkpoints)
      train(setup, workdir, state, scorers, checkpoints)
  except ConfigError as error:
    if hosts.several():
      # It may be this host's alone.
      hosts.abandon(error, 2)
    return _refused(error)
  except Interrupted as stopped:
    console.print(f'stopped and saved at {stopped}; run again to go on')
    return hosts.AGAIN
  console.print(
    f'next: python -m jax_rlvr.evaluate --workdir {arguments.workdir} '
    '--samples 8',
    soft_wrap=True,
  )
  return 0


if __name__ == '__main__':
  sys.exit(main())
