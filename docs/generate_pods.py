"""Writes docs/pods.md from plans of the papers' recipes, in docs/pods.json.

  python docs/generate_pods.py                   rewrites the page
  python docs/generate_pods.py --plan [ROW …]    plans rows anew: minutes each
  python docs/generate_pods.py --check           exits with 1 where it is stale

A row is named as in the page's first column. Planning needs the extra `plan`.
"""

import argparse
import json
import pathlib
import sys

from jax_rlvr import plan
from jax_rlvr.compilation import FLAGS

HERE = pathlib.Path(__file__).parent
PAGE, KEPT = HERE / 'pods.md', HERE / 'pods.json'
GIB = 2**30

# Row → recipe and topology.
ROWS = {
  'Qwen2.5-7B, 16 v5p': ('qwen2_5_7b_clip_cov.py', 'v5p:2x2x4'),
  'Qwen2.5-7B, 32 v6e': (
    'qwen2_5_7b_clip_cov.py:sampling_tensor=2,slots=512',
    'v6e:4x8',
  ),
  'Qwen3-8B, 16 v5p': ('qwen3_8b_forking.py', 'v5p:2x2x4'),
  'Qwen3-8B, 32 v6e': ('qwen3_8b_forking.py:slots=128', 'v6e:4x8'),
  'Qwen3-14B, 32 v5p': ('qwen3_14b_forking.py', 'v5p:2x4x4'),
  'Qwen2.5-32B, 64 v5p': ('qwen2_5_32b_clip_cov.py', 'v5p:4x4x4'),
  'Qwen2.5-32B, 128 v6e': (
    'qwen2_5_32b_clip_cov.py:slots=512,remat=full',
    'v6e:8x16',
  ),
  'Qwen3-32B, 64 v5p': ('qwen3_32b_forking.py', 'v5p:4x4x4'),
  'Qwen3-32B, 128 v6e': (
    'qwen3_32b_forking.py:slots=256,remat=full',
    'v6e:8x16',
  ),
}

PAGE_TEXT = """\
# Pods

*Written by `python docs/generate_pods.py` from docs/pods.json, which
`python docs/generate_pods.py --plan` makes with `jax_rlvr.plan`. Nothing on
this page has been measured on a TPU: memory is what the TPU compiler assigns,
times are lower bounds from the chips' published peaks.*

## What fits where

{rows}

{footnote}\
Lengths, batches and groups are the papers': 2,048 + 8,192 tokens, 256 prompts
of 8 (Qwen2.5); 2,048 + 20,480 tokens, 512 prompts of 16 (Qwen3). The update is
planned with every sequence at full length; decoding with every slot at work,
its completion half way on average.

*Update* is one weight update, *decode* one segment of 32 tokens in every slot;
GiB are those of one device while it runs, with all that waits beside it.
Utilisation of the update is the FLOPs that the method needs (score, forward,
backward, no recomputation) over the chip's peak; that of decoding is the time
to read the weights once a token, and what is there of keys and values, over the
time planned. *A step* is their sum over a training step, prompts read and
weights laid out anew; scoring by the graders goes on beside decoding.

One row again, and the same for any other recipe and slice:

```
pip install 'jax_rlvr[plan]'
python -m jax_rlvr.plan --config configs/qwen2_5_7b_clip_cov.py \\
  --topology v5p:2x2x4 --json plan.json
```

`--fit` looks for the largest microbatch and number of slots, `--hlo FOLDER`
keeps the compiled programs to read. A run that does not fit ends with 1 and
says by how much; `.ci/check_plan.py` compiles three of the rows again.

## What holds them

Updates have `tensor=1`: every chip is a data shard, weights are gathered a
layer at a time beside the products, and no activations are summed over chips.
With the `tensor` that sampling wants, those sums held Qwen2.5-7B at 59 % of the
peak on v5p, and 7B, 8B and 32B at 43, 31 and 24 % on v6e, which has twice the
FLOPs of v5p and links as fast. `sampling_tensor` alone divides the weights to
sample with.

What is left on v5p is recomputation. Of 31.5 s of Qwen2.5-7B the method needs
22.8; 4.9 are computed again or masked in attention's tiles, 1.3 are traffic of
HBM that takes longer than the products it belongs to, and for 2.6 s gathers and
sums of gradients are waited for. On v6e HBM weighs more: of 8.5 s of Qwen2.5-7B
the method needs 5.7; 1.2 are computed again, 1.5 are HBM, and the 2.7 s of
gathers and sums go beside all this. Over 128 v6e they do not altogether: 1.4 of
10.2 s and 3.2 of 59.5 s are waited for.

`remat='attention'` keeps what the attention kernel made of each layer, so that
it does not run again on the way back. 32B on v6e has no room for it and takes
`remat='full'`. The head is multiplied with 1,024 tokens at a time; with 256,
reading it and adding to its gradient took 0.9 s more of Qwen2.5-7B's update.

Decoding, and with 20,480 tokens most of a step, is at 80 to 99 % of HBM's
bandwidth. Weights are there twice while they are laid out anew to sample with:
that is what keeps 32B on v6e from fewer devices a copy.

Weights go to all of `fsdp` before they are multiplied, not around a ring of
partial products: `jax_rlvr/compilation.py` has the flag. With 16 data shards
the ring had an update of 7B on v6e read and write 20 TB of HBM a chip, without
it 9.

## What a roofline leaves out

Each instruction takes its FLOPs over the peak or its bytes over the bandwidth
of HBM, whichever is longer; loops count as often as they run, attention kernels
as the tiles that they compute. Collectives that the compiler runs beside others
cost what they take beyond those of their loop; the others are added. A ring
passes on what one link carries, times two where the torus is closed along its
axis, times the axes that it runs along. Latencies, the host, and what a kernel
loses below the peak are left out: expect less.

## Mesh axes

`fsdp` cuts rows and, in training, parameters and their moments: weights are
gathered a layer at a time, gradients scattered. It costs the interconnect as
many bytes a microbatch as there are weights, whatever the tokens: raise
`microbatch_tokens` where it holds the update. In sampling its parts are
strangers: each has all weights and slots of its own.

`tensor` cuts heads, feed-forward and vocabulary, in training and in sampling.
It divides the weights that each device samples with, and what a token reads;
it costs two sums over activations a layer, in training too. So sampling may
have one of its own, `sampling_tensor`: give it the least that leaves room for
slots (beyond the number of key heads, devices hold the same ones), and training
`tensor=1` as long as a row of each device fits and there are rows for all.

`slice` cuts rows over the data-centre network; parameters are whole in each
slice, and gradients are summed over it once an update.
"""


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--plan', nargs='*', choices=[*ROWS, []], metavar='ROW')
  parser.add_argument('--check', action='store_true')
  arguments = parser.parse_args(argv)
  kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
  if arguments.plan is not None:
    for name in arguments.plan or ROWS:
      print(name, flush=True)
      kept[name] = shortened(planned(name))
      KEPT.write_text(json.dumps(kept, indent=1) + '\n')
  text = PAGE_TEXT.format(rows=table(kept), footnote=footnote(kept))
  if arguments.check:
    if PAGE.exists() and PAGE.read_text() == text:
      return 0
    print(f'{PAGE} is stale; run {sys.argv[0]}', file=sys.stderr)
    return 1
  PAGE.write_text(text)
  return 0


def planned(name: str, *programs: str) -> dict:
  """The plan of a row; of some programs, if any are named."""
  recipe, topology = ROWS[name]
  return plan.make(f'configs/{recipe}', topology, *programs)


def shortened(found: dict) -> dict:
  """The plan without what only a reader of HLO wants."""
  for program in found['programs']:
    for one in program.get('collectives', []):
      for key in ('count', 'bytes'):
        del one[key]
    if 'collectives' in program:
      least = 0.01 * program['roofline_s']
      program['collectives'] = [
        one for one in program['collectives'] if one['seconds'] > least
      ]
  return rounded(found)


def rounded(x):
  if isinstance(x, float):
    return float(f'{x:.5g}')
  if isinstance(x, dict):
    return {key: rounded(value) for key, value in x.items()}
  return [rounded(value) for value in x] if isinstance(x, list) else x


def table(kept: dict) -> str:
  names = (
    'run', 'recipe', 'fsdp × tensor, to sample',
    'GiB: update, re-layout, decode', 'of', 'fits', 'update: s, utilisation',
    'slots, room for', 'decode: tokens/s, utilisation', 'a step, s',
    'compiled in, s',
  )  # fmt: skip
  lines = [line(names), line(['---'] * len(names))]
  lines += [line(row(name, kept[name])) for name in ROWS if name in kept]
  return '\n'.join(lines)


def is_older(found: dict) -> bool:
  """Whether a row was compiled with other flags than runs have now."""
  flags = {f'--{name}={value}' for name, value in FLAGS.items()}
  return set(found['flags'].split()) != flags


def footnote(kept: dict) -> str:
  notes = []
  if any(map(is_older, kept.values())):
    notes.append(
      '\\* Compiled with other flags than jax_rlvr/compilation.py has now.'
    )
  missing = [name for name in ROWS if name not in kept]
  if missing:
    notes.append(f'Not planned yet: {"; ".join(missing)}.')
  return ''.join(f'{note}\n\n' for note in notes)


def row(name: str, found: dict) -> list[str]:
  recipe, topology = ROWS[name]
  shapes, stages = found['shapes'], found['stages']
  meshes = [found['mesh']]
  if found.get('sampling_mesh', *meshes) not in meshes:
    meshes.append(found['sampling_mesh'])
  step, decode = (
    plan.of(found, program) for program in ('inner step', 'decode segment')
  )
  layouts = max(stages.get('re-layout', 0), stages.get('unstack', 0))
  sizes = stages.get('inner step'), layouts, stages.get('decode segment')
  cells = [
    f'{name} \\*' if is_older(found) else name,
    f'`{recipe}` on `{topology}`',
    ', '.join(f'{m["fsdp"]} × {m["tensor"]}' for m in meshes),
    ', '.join('?' if size is None else f'{size / GIB:.1f}' for size in sizes),
    f'{found["hbm_capacity_bytes"] / GIB:.1f}',
    'yes' if found['fits'] else '**no**',
    f'{step["roofline_s"]:.1f}, {step["utilisation"]:.0%}' if step else '?',
    f'{shapes["slots"]}, {found["slots_that_fit"]}',
  ]
  if decode:
    rate = 32 * shapes['slots'] / decode['roofline_s']
    cells.append(f'{rate:,.0f}, {decode["utilisation"]:.0%}')
  else:
    cells.append('?')
  times = [
    program['runs_per_step'] * program['roofline_s']
    for program in found['programs']
    if 'roofline_s' in program
  ]
  compiled = [program.get('compile_s', 0) for program in found['programs']]
  return [*cells, f'{sum(times):,.0f}', f'{sum(compiled):.0f}']


def line(cells) -> str:
  return f'| {" | ".join(cells)} |'


if __name__ == '__main__':
  sys.exit(main())
