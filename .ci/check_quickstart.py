"""The quickstart's promises, checked on a finished run."""

import json
import pathlib
import sys

workdir, scores = map(pathlib.Path, sys.argv[1:])
lines = (workdir / 'eval.jsonl').read_text().splitlines()
before, *_, after = map(json.loads, lines)
first, last = (row['eval/addition/pass@1'] for row in (before, after))
wide = before['eval/addition/pass@8']
evaluated = json.loads(scores.read_text())['eval/addition/pass@1']
print(f'pass@1 {first:.3f} → {last:.3f} (evaluate: {evaluated:.3f})')
print(f'pass@8 before {wide:.3f}')
assert 0.1 <= first <= 0.4 and wide >= first + 0.2, 'warm-up off its mark'
assert last >= 0.75 and evaluated >= 0.72, 'the target was missed'
