"""Plans again, and compares with what is written down, within 5 %.

  python .ci/check_plan.py small   a small run, with .ci/plan.json
  python .ci/check_plan.py rows    three rows of docs/pods.md, of which the
                                   programs named here

Both need the extra `plan`.
"""

import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / 'docs'))

import generate_pods as pods  # noqa: E402

from jax_rlvr import plan  # noqa: E402

WITHIN = 0.05
SMALL = '.ci/small.py', 'v5e:2x2'
# Of a row: an update takes minutes to compile.
PROGRAMS = {
  'Qwen2.5-7B, 16 v5p': ('inner step', 'fold', 'decode segment'),
  'Qwen2.5-7B, 32 v6e': ('fold', 're-layout', 'decode segment'),
  'Qwen3-8B, 16 v5p': ('re-layout', 'unstack', 'decode segment'),
}


def main(what: str) -> int:
  wrong = 0
  if what == 'small':
    kept = json.loads((ROOT / '.ci' / 'plan.json').read_text())
    wrong += compared(' on '.join(SMALL), plan.make(*SMALL), kept)
  else:
    kept = json.loads(pods.KEPT.read_text())
    for name, programs in PROGRAMS.items():
      wrong += compared(name, pods.planned(name, *programs), kept[name])
  return min(wrong, 1)


def compared(title: str, found: dict, kept: dict) -> int:
  """How many numbers differ; each is printed."""
  wrong = 0
  for name, size in found['stages'].items():
    old = plan.of(kept, name)
    new = plan.of(found, name)
    pairs = {'bytes of HBM': (size, kept['stages'][name])}
    for key in ('flops', 'bytes', 'roofline_s'):
      if old[key]:
        pairs[key] = new[key], old[key]
    for key, (is_now, was) in pairs.items():
      good = abs(is_now / was - 1) <= WITHIN
      wrong += not good
      mark = '' if good else '  <-- more than 5 % apart'
      print(f'{title}: {name}: {key} {is_now:.4g}, was {was:.4g}{mark}')
  return wrong


if __name__ == '__main__':
  sys.exit(main(sys.argv[1]))
