"""Which collectives of a program for CPUs could overtake others.

See `jax_rlvr.mesh.after`.
"""

import pathlib

from jax_rlvr import hlo

# Instructions that XLA:CPU does nothing for, and the number of others up to
# which it runs a computation in order.
FREE = (
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast',
  'after-all', 'partition-id', 'replica-id',
)  # fmt: skip
IN_ORDER = 8
BODIES = (
  'body', 'condition', 'to_apply', 'branch_computations', 'true_computation',
  'false_computation',
)  # fmt: skip


def loose(text):
  """Pairs of a loop with collectives and a later one that does not need it."""
  _, computations = hlo.parse(text)

  def bodies(one):
    if one.op not in ('while', 'call', 'conditional'):
      return []
    names = [name for kind in BODIES for name in one.called(kind)]
    return [computations[name] for name in names]

  def collective(one):
    return one.op.removesuffix('-start') in hlo.COLLECTIVES or any(
      map(collective, (x for body in bodies(one) for x in body.values()))
    )

  def leaves_early(one):
    return any(
      sum(x.op not in FREE for x in body.values()) > IN_ORDER
      or any(map(leaves_early, body.values()))
      for body in bodies(one)
    )

  found = []
  for computation in computations.values():
    needs = {}
    for name, one in computation.items():
      needs[name] = set(one.operands).union(
        *(needs.get(operand, ()) for operand in one.operands)
      )
    collectives = [one for one in computation.values() if collective(one)]
    for i, loop in enumerate(collectives):
      if leaves_early(loop):
        found += [
          (loop.source, later.source)
          for later in collectives[i + 1 :]
          if loop.name not in needs[later.name]
        ]
  return found


def dumped_to(folder: pathlib.Path) -> str:
  """XLA's flags for a run whose programs are to be read."""
  return f'--xla_dump_hlo_as_text --xla_dump_to={folder}'


def loose_of(folder: pathlib.Path) -> dict[str, list[tuple[str, str]]]:
  """Of each program that was dumped and has any."""
  files = sorted(folder.glob('*cpu_after_optimizations.txt'))
  assert {'jit_step', 'jit_inner_step'} <= {x.name.split('.')[1] for x in files}
  found = {file.name: loose(file.read_text()) for file in files}
  return {name: pairs for name, pairs in found.items() if pairs}
