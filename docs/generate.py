"""Writes docs/filters.md from the signatures and docstrings of the package.

  python docs/generate.py              rewrites the page
  python docs/generate.py --check      exits with 1 where the page is stale
  python docs/generate.py --notebooks  runs examples/*.py as notebooks, too

Notebooks need the extra `docs`.
"""

import argparse
import doctest
import inspect
import pathlib
import re
import sys

from jax_rlvr import advantages, filters, policy_gradient
from jax_rlvr.filters import base, recipes

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / 'docs' / 'filters.md'

INTRODUCTION = """\
# Filters

*Written by `python docs/generate.py` from the docstrings; change those.*

A chain of filters is an optax chain over token gradients: dL/dlogprob and
dL/dentropy of every token of an optimizer batch.

```python
filters = optax.chain(
  clip_ratio(low=1.0, high=1.0),
  clip_cov(fraction=2e-4, lower=1.0, upper=5.0),
  token_mean(),
)
```

It starts from `policy_gradient`, the gradient of −ratio · advantage on the
completion tokens, and each filter changes what has come so far:

1. a *head* puts the gradient of another surrogate in place of what has come, so
   it is written first;
2. *masks* and *weights* multiply both gradients;
3. *penalties* add to them;
4. an *aggregation* divides them, and ends the chain.

The order counts. A penalty written before a mask is masked, after it is not.
`clip_cov` draws among the tokens that earlier filters have left.

**What counts.** A row without completion tokens does not exist, for any filter,
count or aggregation. Rows whose advantage is zero, or that could not be scored,
do. N is the number of completion tokens of the whole inner batch: selections
and means do not depend on microbatches, packing, devices or the order of rows.
Ties, and what is drawn at random, go by `tokens.serial`.

**What divides.** `token_mean` divides by N, `sequence_mean_token_mean` by a
row's length and the number of rows, `sequence_mean_token_sum` by its constant
and the number of rows, `token_sum` by a constant alone. A mask changes none of
these. But `forking_tokens` and `entropy_above` multiply by N / selected, so
that `token_mean` divides by the selected tokens; a penalty written after them
keeps its size. They do not with `rescale=False`, which other aggregations ask
for.

Below, *reads* names fields of `stats` (logprob, entropy: the current policy's)
and of `tokens` (all others); *writes* names the gradients that may change; with
its *neutral* setting a filter is the identity. Advantages are in
`jax_rlvr.advantages`, recipes in `jax_rlvr.filters.recipes`, the others in
`jax_rlvr.filters`.
"""

KINDS = ('head', 'mask', 'weight', 'penalty', 'aggregation')
_LABELS = (
  'Reads|Writes|Kind|Neutral|Reports|Defaults|Numbers|Differs from [^:]+|'
  'References?'
)
_LABEL = re.compile(rf'(?:^|(?<=\s))({_LABELS}):\s+')
_LINK = re.compile(r'`([^`<]+?)\s*<([^>]+)>`_')


def paragraphs(f) -> list[str]:
  return inspect.getdoc(f).split('\n\n')


def labelled(paragraph: str) -> dict[str, str]:
  """'Reads: x. Writes: y.' → {'Reads': 'x.', 'Writes': 'y.'}."""
  parts = [part.strip() for part in _LABEL.split(paragraph)]
  return dict(zip(parts[1::2], parts[2::2], strict=True))


def fields(f) -> dict[str, str]:
  found = {}
  for paragraph in paragraphs(f):
    found |= labelled(paragraph)
  return found


def signature(f) -> str:
  """Names and defaults, without annotations."""
  empty = inspect.Signature.empty
  of = inspect.signature(f)
  parameters = [p.replace(annotation=empty) for p in of.parameters.values()]
  return str(of.replace(parameters=parameters, return_annotation=empty))


def markdown(text: str) -> str:
  """RST links as Markdown's; one may run over two lines."""
  return _LINK.sub(lambda m: f'[{" ".join(m[1].split())}]({m[2]})', text)


def listed(bullet: str, items) -> str:
  """Two lists that follow one another need two kinds of bullets."""
  return '\n'.join(f'{bullet} {name}: {markdown(x)}' for name, x in items)


def rendered(paragraph: str) -> str:
  heading, _, block = paragraph.partition('\n')
  if paragraph.startswith('>>> '):
    examples = doctest.DocTestParser().get_examples(paragraph)
    if any(example.want for example in examples):
      return f'```pycon\n{paragraph}\n```'
    source = ''.join(example.source for example in examples)
    return f'```python\n{source}```'
  if heading in ('Args:', 'Raises:'):
    items = re.split(r'\n(?! )', inspect.cleandoc(block))
    pairs = [re.sub(r'\s+', ' ', item).split(': ', 1) for item in items]
    return f'{heading}\n\n' + listed('*', [(f'`{n}`', x) for n, x in pairs])
  if heading == 'Returns:':
    return f'Returns: {markdown(inspect.cleandoc(block))}'
  if paragraph.startswith(('Reference: ', 'References: ')):
    return markdown(paragraph)
  if found := labelled(paragraph):
    items = [(f'*{k}*', ' '.join(x.split())) for k, x in found.items()]
    return listed('-', items)
  return markdown(paragraph)


def section(title: str, f, *extra: str) -> str:
  file = f'{f.__module__.replace(".", "/")}.py'
  head = f'### {title}\n\n`{f.__name__}{signature(f)}` in [{file}](../{file})'
  return '\n\n'.join([head, *map(rendered, paragraphs(f)), *extra])


def table(header: str, rows) -> str:
  def line(cells):
    flat = [re.sub(r'\s+', ' ', cell).replace('|', r'\|') for cell in cells]
    return f'| {" | ".join(flat)} |'

  names = header.split(', ')
  return '\n'.join([line(names), line(['---'] * len(names)), *map(line, rows)])


def named(title: str, f) -> str:
  anchor = re.sub(r'[^\w-]', '', title)
  return f'[`{title}`](#{anchor}) `{signature(f)}`'


def said(f, *labels: str) -> str:
  found = fields(f)
  return markdown(next((found[x] for x in labels if x in found), ''))


def of_filter(f) -> list[str]:
  """Its row in the table."""
  reads, writes, kind, neutral = (
    said(f, label).rstrip('.')
    for label in ('Reads', 'Writes', 'Kind', 'Neutral')
  )
  does = paragraphs(f)[0]
  return [kind, does, f'{reads} → {writes}', neutral, said(f, 'Defaults')]


def of_advantage(f) -> list[str]:
  source = said(f, 'Reference', 'References')
  return [paragraphs(f)[0], said(f, 'Defaults'), source]


def of_recipe(f) -> list[str]:
  # What it prints, on one line.
  flat = re.sub(r'\(\n\s+', '(', f'{f()}'.replace(',\n)', ')').strip(','))
  source = said(f, 'Reference', 'References')
  return [paragraphs(f)[0], f'`{flat}`', said(f, 'Numbers'), source]


HELPERS = (
  policy_gradient.policy_gradient,
  policy_gradient.token_gradients,
  policy_gradient.as_loss,
  base.stateless,
  base.tracked,
  base.per_microbatch,
)


def page() -> str:
  menu = sorted(
    filters.ALL.values(),
    key=lambda f: KINDS.index(said(f, 'Kind').rstrip('.')),
  )
  estimators = {f'advantages.{n}': f for n, f in advantages.ALL.items()}
  methods = {f'recipes.{n}': f for n, f in recipes.ALL.items()}
  parts = [
    INTRODUCTION.strip(),
    '## Names and defaults',
    table(
      'filter, kind, what it does, reads → writes, neutral, source of the '
      'numbers',
      ([named(f.__name__, f), *of_filter(f)] for f in menu),
    ),
    table(
      'advantage, what it is, source of the numbers, paper',
      ([named(n, f), *of_advantage(f)] for n, f in estimators.items()),
    ),
    table(
      'recipe, what it is, composition, source of the numbers, paper',
      ([named(n, f), *of_recipe(f)] for n, f in methods.items()),
    ),
    '## Filters, one by one',
    *(section(f.__name__, f) for f in menu),
    '## Around them',
    *(section(f.__name__, f) for f in HELPERS),
    '## Advantages',
    *map(rendered, paragraphs(advantages)),
    *(section(name, f) for name, f in estimators.items()),
    '## Recipes',
    *map(rendered, paragraphs(recipes)),
    *(section(n, f, f'```\n{f()}\n```') for n, f in methods.items()),
  ]
  return '\n\n'.join(parts) + '\n'


def write_notebook(script: pathlib.Path) -> None:
  """The script's cells with their outputs; no dates, no random names."""
  import jupytext
  import nbclient
  import nbformat

  book = jupytext.read(script)
  for i, cell in enumerate(book.cells):
    cell.id, cell.metadata = f'cell-{i}', {}
  nbclient.NotebookClient(
    book, kernel_name='python3', record_timing=False, coalesce_streams=True
  ).execute()
  kernel = {'name': 'python3', 'language': 'python', 'display_name': 'Python 3'}
  book.metadata = {'kernelspec': kernel}
  nbformat.write(book, script.with_suffix('.ipynb'))


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--check', action='store_true')
  parser.add_argument('--notebooks', action='store_true')
  arguments = parser.parse_args(argv)
  if arguments.check:
    if PAGE.exists() and PAGE.read_text() == page():
      return 0
    print(f'{PAGE} is stale; run python docs/generate.py', file=sys.stderr)
    return 1
  if arguments.notebooks:
    for script in sorted((ROOT / 'examples').glob('*.py')):
      write_notebook(script)
  PAGE.write_text(page())
  return 0


if __name__ == '__main__':
  sys.exit(main())
