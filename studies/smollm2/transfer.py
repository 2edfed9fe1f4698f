r"""What training on small sums carries over to: before, and after each run.

  python studies/smollm2/transfer.py --mawps path/to/mawps \
    --runs runs/smollm2 runs/smollm2_clip_cov \
    --json studies/smollm2/transfer.json

Asks the model as it came and each run's last checkpoint, at temperature 1, for
the trained task's held-out pairs, two-digit sums, and MAWPS problems of one
step.
"""

import argparse
import json
import pathlib

from jax_rlvr import actor as actors
from jax_rlvr import checkpoint, evaluate, mesh, policy, prng
from jax_rlvr.evaluation import Evaluation
from jax_rlvr.scoring import Scorers
from jax_rlvr.tasks import Arithmetic, Mawps


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--mawps', required=True, help='folder of JSONL files')
  parser.add_argument('--runs', type=pathlib.Path, nargs='*', default=[])
  parser.add_argument('--prompts', type=int, default=32, help='per task')
  parser.add_argument('--samples', type=int, default=8)
  parser.add_argument('--json', type=pathlib.Path, required=True)
  arguments = parser.parse_args()
  tasks = (
    Arithmetic(),
    Arithmetic(name='add2', operations=('add',), low=10, high=99),
    Mawps(path=arguments.mawps),
  )
  before = policy.load(policy.smollm2_path())
  assert before.tokenizer is not None
  actor = actors.Actor(
    policy=before.config,
    tokenizer=before.tokenizer,
    mesh=mesh.make(),
    slots=128,
  )
  shardings = mesh.shardings(
    actor.mesh, policy.abstract_params(before.config), mesh.SAMPLING
  )
  # What was measured before is kept: a run can be added later.
  scores = {}
  if arguments.json.exists():
    scores = json.loads(arguments.json.read_text())
  with Scorers(tasks) as scorers:
    for run in (None, *arguments.runs):
      name = run.name if run else 'before'
      if name in scores:
        continue
      if run is None:
        params = before.read(shardings)
      else:
        params, _ = checkpoint.read_params(
          run, before.config, actor.mesh, mesh.SAMPLING
        )
      scores[name], _ = evaluate.run(
        actor,
        params,
        [
          Evaluation(
            task=task,
            samples=arguments.samples,
            temperature=1.0,
            prompts=arguments.prompts,
          )
          for task in tasks
        ],
        scorers,
        key=prng.key(0, prng.Stream.EVALUATE, 10**6),
        max_completion_tokens=24,
      )
      arguments.json.write_text(json.dumps(scores, indent=2) + '\n')
      print(name, scores[name])


if __name__ == '__main__':
  main()
