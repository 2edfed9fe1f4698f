r"""avg@k, unbiased pass@k and maj@k of a policy on held-out prompts.

  python -m jax_rlvr.evaluate --workdir runs/quickstart --json out.json

evaluates a run's checkpoint as the run itself did, by its manifest alone: the
recipe is not executed. Weights from elsewhere, a Hugging Face folder or hub id
or a GGUF file, take tasks and settings from a recipe, or from a run:

  python -m jax_rlvr.evaluate --policy path/to/folder \
    --config configs/quickstart.py --samples 16 --out questions.jsonl

Options go before what run or recipe say. Exit codes: 0 done; 2 bad
configuration or input.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import rich.console

from jax_rlvr import (
  checkpoint,
  config,
  hosts,
  manifest,
  metrics,
  policy,
  prng,
  rollout,
  storage,
)
from jax_rlvr import mesh as layouts
from jax_rlvr.actor import Actor, OnProgress, ignore
from jax_rlvr.config import ConfigError
from jax_rlvr.evaluation import Evaluation, resolved, tasks_of
from jax_rlvr.policy import attention
from jax_rlvr.prng import Stream
from jax_rlvr.sampling import (
  Transform,
  chain,
  entropy_temperature,
  min_p,
  stops,
  top_k,
  top_p,
)
from jax_rlvr.scores import Question, grouped, measures, tables, write
from jax_rlvr.scoring import Scorers


def run(
  actor: Actor,
  params: Any,
  evaluations: Sequence[Evaluation],
  scorers: Scorers,
  *,
  key: jax.Array,
  max_completion_tokens: int,
  max_prompt_tokens: int = 1,
  on_progress: OnProgress = ignore,
) -> tuple[dict[str, float], list[Question]]:
  """Asks what the evaluations ask.

  What one of them draws depends on the key, the place of the prompt in its
  split and the number of the sample: not on the other evaluations, their order,
  or how many prompts and samples there are.

  Args:
    actor: completes prompts.
    params: of the policy.
    evaluations: each with a name of its own.
    scorers: that know their tasks.
    key: of all that is drawn.
    max_completion_tokens: of evaluations that do not say.
    max_prompt_tokens: of any prompt, so that shapes are those of training; the
      longest if that is more.
    on_progress: called after each segment of sampling.

  Returns:
    `eval/<name>/avg@k` and the like, see `scores.measures`, and the questions
    of all evaluations with their samples.
  """
  measured, everything = {}, []
  for each in evaluations:
    asked = each.asked()
    completed = actor.complete(
      params,
      asked,
      prng.sample_keys(key, range(len(asked)), each.samples),
      temperature=each.temperature,
      max_completion_tokens=each.max_completion_tokens or max_completion_tokens,
      max_prompt_tokens=max_prompt_tokens,
      transform=each.transform,
      stop=each.stop,
      on_progress=on_progress,
    )
    rollouts, _ = rollout.score(actor, asked, each.samples, completed, scorers)
    questions = grouped(each.name, each.task, rollouts, each.samples)
    scores = measures(questions)
    measured |= {f'eval/{each.name}/{k}': x for k, x in scores.items()}
    everything += questions
  return measured, everything


def check(
  actor: Actor, evaluations: Sequence[Evaluation], max_completion_tokens: int
) -> None:
  """Meets the errors that `run` would, before anything compiles.

  Raises:
    ValueError: a split is empty, a prompt leaves no room for a completion, a
      stop text cannot be written, or the devices have no room.
  """
  most = actor.policy.max_tokens
  for each in evaluations:
    limit = each.max_completion_tokens or max_completion_tokens
    longest = max(
      len(actor.tokenizer.render(prompt.messages)) for prompt in each.asked()
    )
    if longest + limit > most:
      raise ConfigError(
        f'evaluation {each.name!r} has a prompt of {longest} tokens, which '
        f'with max_completion_tokens={limit} is more than the {most} that the '
        f'policy was made for; give {each.name!r} a lower one, or fewer prompts'
      )
    stops(actor.tokenizer, each.stop)
    actor.engine(longest, limit).check()


def main(argv: Sequence[str] | None = None) -> int:
  """The command; returns its exit code."""
  return hosts.run(_run, _parser().parse_args(argv))


def _run(arguments: argparse.Namespace) -> int:
  console = rich.console.Console(quiet=not hosts.is_leader())
  with contextlib.ExitStack() as stack:
    try:
      with hosts.all_or_none('setup'):
        subject = _prepare(arguments)
        knobs = subject.knobs
        scorers = Scorers(
          tasks_of(subject.evaluations),
          knobs['scorers'],
          knobs['reward_deadline_s'],
          knobs.get('reward_memory_mb', 0),
        )
      stack.enter_context(scorers)
      with hosts.all_or_none('weights'):
        params, step, of = _read(subject, arguments)
    except (ValueError, OSError, ImportError) as error:
      print(f'error: {error}', file=sys.stderr)
      return 2
    with metrics.progress(console) as bars:
      bar = bars.add_task('evaluate', total=None, note='')
      measured, questions = run(
        subject.actor,
        params,
        subject.evaluations,
        scorers,
        key=prng.key(knobs['seed'], Stream.EVALUATE, step),
        max_completion_tokens=knobs['max_completion_tokens'],
        max_prompt_tokens=knobs['max_prompt_tokens'],
        on_progress=lambda p: bars.update(
          bar, total=p.total, completed=p.done, note=p.note
        ),
      )
  console.print(tables(measured))
  if arguments.json and hosts.is_leader():
    arguments.json.write_text(json.dumps(of | measured, indent=2) + '\n')
  if arguments.out and hosts.is_leader():
    write(arguments.out, questions)
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m jax_rlvr.evaluate',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  path = pathlib.Path
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument('--workdir', type=storage.path, help='of a run')
  source.add_argument('--config', help='recipe.py[:key=value,…]')
  parser.add_argument('--policy', help='folder, hub id or GGUF file instead')
  parser.add_argument('--step', type=int, help='of the checkpoint; the latest')
  for name, kind, what in (
    ('samples', int, 'k, completions of each prompt'),
    ('prompts', int, 'per task'),
    ('max_completion_tokens', int, 'where completions are cut'),
    ('temperature', float, '0 for argmax'),
    ('top_k', int, 'draw from that many tokens'),
    ('top_p', float, 'draw from that mass'),
    ('min_p', float, 'draw from tokens that likely beside the top one'),
    ('seed', int, 'of what is drawn'),
    ('tensor', int, 'devices that share each layer; 1'),
  ):
    parser.add_argument(f'--{name}', type=kind, help=what)
  parser.add_argument(
    '--entropy_temperature',
    type=float,
    nargs=3,
    metavar=('LOW', 'HIGH', 'NATS'),
    help='one temperature up to an entropy, another above; to have them alone, '
    'give --temperature 1',
  )
  hosts.add_flags(parser)
  parser.add_argument('--json', type=path, help='where to write scores')
  parser.add_argument('--out', type=path, help='where to write all samples')
  return parser


class _Subject(NamedTuple):
  """What the command evaluates.

  Attributes:
    actor: with the policy's shape and tokenizer.
    evaluations: what is asked.
    knobs: of the run or the recipe, by name.
    pretrained: weights from elsewhere; None for those of the run.
  """

  actor: Actor
  evaluations: tuple[Evaluation, ...]
  knobs: Mapping[str, Any]
  pretrained: policy.Pretrained | None


def _prepare(arguments) -> _Subject:
  """Meets every error that can be met before weights are read."""
  workdir, elsewhere = arguments.workdir, arguments.policy
  if workdir is None and elsewhere is None:
    raise ConfigError('--config brings no weights; give --policy, too')
  if elsewhere is not None and arguments.step is not None:
    raise ConfigError(f'--step {arguments.step} of --policy; leave one out')
  if workdir is not None:
    saved = manifest.read(workdir)
    shape, tokenizer = saved.policy, saved.tokenizer
    knobs, asked = saved.sampling, saved.tasks
  else:
    c = config.load(arguments.config).config
    shape, tokenizer = c.policy, c.tokenizer
    knobs, asked = vars(c), c.eval_tasks or c.tasks
  evaluations = _overridden(resolved(asked, knobs), arguments)
  shape, tokenizer, pretrained = _policy(elsewhere, shape, tokenizer)
  mesh = layouts.make(tensor=arguments.tensor or 1)
  layouts.check_heads(mesh, shape.heads)
  # Runs from before there was a choice.
  dtype = layouts.compute_dtype(knobs.get('compute_dtype', 'float32'), mesh)
  actor = Actor(
    policy=shape,
    tokenizer=tokenizer,
    mesh=mesh,
    slots=knobs['slots'],
    dtype=dtype,
    backend=attention.choose('auto', shape, dtype, mesh),
  )
  check(actor, evaluations, knobs['max_completion_tokens'])
  for file in filter(None, (arguments.json, arguments.out)):
    if file.is_dir():
      raise ConfigError(f'{file} is a folder; give a file')
    file.parent.mkdir(parents=True, exist_ok=True)
  if arguments.seed is not None:
    knobs = dict(knobs) | {'seed': arguments.seed}
  return _Subject(actor, evaluations, knobs, pretrained)


def _policy(where, shape, tokenizer):
  """Shape, tokenizer and weights, in their files, of what is there.

  The others, of run or recipe, are for where they are missing.
  """
  if where is None:
    return shape, tokenizer, None
  pretrained = policy.load(where)
  shape = pretrained.config
  if pretrained.tokenizer is not None:
    return shape, pretrained.tokenizer, pretrained
  if tokenizer is None or tokenizer.vocab_size > shape.vocab_size:
    raise ConfigError(
      f'{where} brings no tokenizer, and that of run or recipe does not fit; '
      'put tokenizer.json and tokenizer_config.json beside the weights'
    )
  return shape, tokenizer, pretrained


def _read(subject: _Subject, arguments) -> tuple[Any, int, dict[str, Any]]:
  """The weights, the step that keys go by, and what the scores are of."""
  actor, pretrained = subject.actor, subject.pretrained
  if pretrained is None:
    params, step = checkpoint.read_params(
      arguments.workdir,
      actor.policy,
      actor.mesh,
      layouts.SAMPLING,
      arguments.step,
    )
    return params, step, {'step': step}
  abstract = policy.abstract_params(actor.policy)
  shardings = layouts.shardings(actor.mesh, abstract, layouts.SAMPLING)
  return pretrained.read(shardings), 0, {'policy': arguments.policy}


def _overridden(
  evaluations: Sequence[Evaluation], arguments
) -> tuple[Evaluation, ...]:
  names = ('samples', 'prompts', 'max_completion_tokens', 'temperature')
  given = vars(arguments)
  changes = {name: given[name] for name in names if given[name] is not None}
  cuts: list[Transform] = [
    cut(given[cut.__name__])
    for cut in (top_k, top_p, min_p)
    if given[cut.__name__] is not None
  ]
  if given['entropy_temperature'] is not None:
    # First: it is the policy's own entropy that tells forks.
    cuts.insert(0, entropy_temperature(*given['entropy_temperature']))
  if cuts:
    changes['transform'] = chain(*cuts)
  return tuple(dataclasses.replace(e, **changes) for e in evaluations)


if __name__ == '__main__':
  sys.exit(main())
