"""What smoke.sh compares, and its report.

python launch/smoke.py attention --out runs/smoke
python launch/smoke.py report --out runs/smoke
"""

import argparse
import importlib.metadata
import json
import pathlib
import platform
import subprocess
import sys

# Nats a token: ten times and more what bfloat16 has on CPUs. Errors: over XLA's
# own, where interpreted on CPUs they were up to 2.3 times as large.
MISMATCH = {'mismatch/mean': 0.02, 'mismatch/kl': 1e-4}
TIMES_XLA = 3.0
PASS_AT_1 = 0.72


def attention(out: pathlib.Path) -> int:
  """Splash and XLA in bfloat16, forward and backward, against float32."""
  import jax
  import jax.numpy as jnp

  from jax_rlvr.policy import PolicyConfig
  from jax_rlvr.policy import attention as backends

  on_tpu = jax.default_backend() == 'tpu'
  splash = backends.splash(None, interpret=not on_tpu)
  length, batch = (1100, 2) if on_tpu else (130, 1)
  window = {'window': length // 4, 'local': (True,)}
  rows = []
  for head_size, changes in (
    (64, {}),
    (128, {}),
    (128, window | {'attention_softcap': 50.0}),
  ):
    config = PolicyConfig(
      vocab_size=8, layers=1, width=8, heads=4, kv_heads=2, feed_forward=8,
      head_size=head_size, **changes,
    )  # fmt: skip
    # Two sequences in a row, of which the first ends within a tile.
    columns = jnp.broadcast_to(jnp.arange(length), (batch, length))
    group = (columns > length // 2).astype(jnp.int32)
    layout = backends.Layout(columns, group, jnp.zeros_like(group))
    arrays = [
      jax.random.normal(jax.random.key(i), (batch, length, n, head_size))
      for i, n in enumerate((4, 2, 2, 4))
    ]
    # Rounded once, for all three to compute of the same numbers.
    arrays = [x.astype(jnp.bfloat16) for x in arrays]

    def of(backend, dtype, config=config, layout=layout, arrays=arrays):
      @jax.jit
      def run(query, key, value, pull):
        attend = backend.attend(config, layout)
        local = config.window is not None
        mixed, pullback = jax.vjp(
          lambda *args: attend(*args, local)[0], query, key, value
        )
        return mixed, *pullback(pull)

      with jax.default_matmul_precision('highest'):
        return run(*(x.astype(dtype) for x in arrays))

    exact = of(backends.XLA, jnp.float32)
    found = {
      name: [
        float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max())
        for a, b in zip(of(backend, jnp.bfloat16), exact, strict=True)
      ]
      for name, backend in (('splash', splash), ('xla', backends.XLA))
    }
    what = f'head size {head_size}' + (', window, soft cap' if changes else '')
    rows.append({'what': what} | found)
  (out / 'attention.json').write_text(json.dumps(rows, indent=1))
  return 0


def report(out: pathlib.Path) -> int:
  """Prints the table, writes report.md; 1 if something is not well."""
  checks = []  # (what, what was found, whether it is well)
  steps = out / 'steps.tsv'
  for line in steps.read_text().splitlines() if steps.exists() else ():
    name, code, seconds = line.split('\t')
    checks.append((f'`{name}` ends', f'code {code}, {seconds} s', code == '0'))
  found = _json(out / 'evaluate.json').get('eval/addition/pass@1')
  checks.append(
    _check('quickstart, pass@1', found, lambda x: x >= PASS_AT_1, PASS_AT_1)
  )
  for run in ('quickstart', 'splash', 'xla'):
    rows = _rows(out / run / 'metrics.jsonl')
    for key, bound in MISMATCH.items():
      values = [row[key] for row in rows if key in row]
      mean = sum(values) / len(values) if values else None
      checks.append(
        _check(f'{run}, {key}', mean, lambda x, b=bound: x <= b, bound)
      )
    values = [row['mismatch/max'] for row in rows if 'mismatch/max' in row]
    checks.append(
      (f'{run}, mismatch/max', f'{max(values, default=float("nan")):.3g}', True)
    )
  compared = _json(out / 'attention.json')
  for row in compared or [{'what': 'attention', 'splash': [], 'xla': []}]:
    pairs = list(zip(row['splash'], row['xla'], strict=True))
    checks.append(
      (
        f'splash / xla, {row["what"]}',
        ', '.join(f'{a:.1e} / {b:.1e}' for a, b in pairs) or 'nothing',
        bool(pairs) and all(a <= TIMES_XLA * b for a, b in pairs),
      )
    )
  well = all(ok for *_, ok in checks)
  lines = [
    f'### Smoke test: {"all is well" if well else "NOT well"}',
    '',
    *_machine(),
    '',
    '| check | found | |',
    '|---|---|---|',
    *(f'| {a} | {b} | {"ok" if ok else "**no**"} |' for a, b, ok in checks),
    '',
    'Mismatches are nats a token, means over the steps (max: over all tokens).',
    'splash / xla: largest error of outputs and of the gradients of queries,',
    'keys and values, over the largest number, against XLA in float32.',
  ]
  text = '\n'.join(lines) + '\n'
  (out / 'report.md').write_text(text)
  print(text)
  return 0 if well else 1


def _check(what, found, holds, bound):
  if found is None:
    return what, 'nothing', False
  return what, f'{found:.3g} (bound {bound:g})', bool(holds(found))


def _rows(path: pathlib.Path) -> list[dict]:
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text().splitlines()]


def _json(path: pathlib.Path):
  return json.loads(path.read_text()) if path.exists() else {}


def _machine() -> list[str]:
  """Of the versions and the devices; asked in a process of its own."""
  devices = subprocess.run(
    [sys.executable, '-c', 'import jax; print(jax.devices())'],
    capture_output=True,
    text=True,
  )
  commit = subprocess.run(
    ['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True
  )
  versions = []
  for name in ('jax-rlvr', 'jax', 'jaxlib', 'libtpu', 'flax'):
    try:
      versions.append(f'{name} {importlib.metadata.version(name)}')
    except importlib.metadata.PackageNotFoundError:
      versions.append(f'{name} –')
  return [
    f'- devices: {devices.stdout.strip() or devices.stderr[-200:]}',
    f'- {", ".join(versions)}, Python {platform.python_version()}',
    f'- commit: {commit.stdout.strip() or "unknown (a copy)"}',
  ]


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('what', choices=('attention', 'report'))
  parser.add_argument('--out', type=pathlib.Path, required=True)
  arguments = parser.parse_args()
  return {'attention': attention, 'report': report}[arguments.what](
    arguments.out
  )


if __name__ == '__main__':
  sys.exit(main())
