"""Every knob of a run, once, typed; and recipes that set them.

A recipe is a Python file with `get_config(**overrides) -> Config`. Overrides
ride on its path: `configs/quickstart.py:seed=1,fraction=1e-3`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import pathlib
import runpy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import optax

from jax_rlvr.evaluation import Evaluation, resolved
from jax_rlvr.records import TokenStats

if TYPE_CHECKING:
  from jax_rlvr.policy import PolicyConfig
  from jax_rlvr.records import Completion, Prompt
  from jax_rlvr.sampling import Transform
  from jax_rlvr.tokenizer import Tokenizer


class ConfigError(ValueError):
  """Bad configuration or input: one line that names thing and remedy."""


class Task(Protocol):
  """Verifiable prompts: a frozen dataclass whose fields are JSON values.

  Optional methods: `traces(split) -> Sequence[Trace]` for warm-up, and
  `extract(completion) -> Hashable`, the final answer that votes in maj@k.
  """

  @property
  def name(self) -> str: ...

  def prompts(self, split: str) -> Sequence[Prompt]: ...

  def reward(self, prompt: Prompt, completion: Completion) -> float | None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmUp:
  """Supervised cold start on the traces of the tasks that have them.

  Attributes:
    steps: weight updates.
    batch_size: traces per update.
    optimizer: optax transformation, its schedule included.
    checkpoint_every: updates between checkpoints.
  """

  steps: int
  batch_size: int
  optimizer: optax.GradientTransformation
  checkpoint_every: int = 500


# The smallest value of each knob that counts something, and that measures.
_COUNTS = dict.fromkeys(
  'steps seed row_tokens reference_every keep_every reward_memory_mb '
  'sampling_tensor'.split(),
  0,
) | dict.fromkeys(
  'prompts_per_step group_size inner_steps microbatch_tokens max_prompt_tokens '
  'max_completion_tokens slots eval_every eval_prompts eval_samples '
  'checkpoint_every keep_checkpoints scorers slices tensor'.split(),
  1,
)
_NUMBERS = dict.fromkeys(
  'temperature eval_temperature reward_deadline_s batch_deadline_s'.split(), 0
) | {'oversample': 1, 'max_asked': 1}
_CHOICES = {
  'long_prompts': ('refuse', 'drop'),
  'attention': ('auto', 'xla', 'splash', 'cudnn'),
  'remat': ('none', 'dots', 'attention', 'full'),
  'compute_dtype': ('auto', 'float32', 'bfloat16'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """A run. All counts are global: over all devices and hosts.

  Attributes:
    policy: a shape starts from random weights; a GGUF file, a folder as
      transformers writes it, or the id of one on the hub starts from those
      weights and brings its tokenizer.
    tokenizer: needed where the policy brings none; goes before one it brings.
    tasks: trained on, their 'train' splits mixed by size.
    weights: how often each task is asked, > 0, one a task; none mixes them by
      size, each prompt once before any comes again.
    long_prompts: 'refuse' ends the run before it begins where a prompt is over
      max_prompt_tokens, 'drop' leaves it out and lists it in dropped.jsonl.
    eval_tasks: evaluated, their 'test' splits; `tasks` if empty.
    advantage: (rewards, valid, lengths) [P, G] → advantages [P, G].
    filters: token-space optax chain, ended by an aggregation.
    optimizer: weight-space optax chain, its clip and schedule included.
    steps: batches of prompts to train on.
    seed: of everything random.
    prompts_per_step: P.
    group_size: G, completions per prompt.
    inner_steps: weight updates per batch; divides prompts_per_step.
    balance_rewards: inner batches get prompts of like mean rewards in turn;
      else prompts stay in the order they were asked.
    reference: keeps the first weights as a frozen reference policy for filters
      that read `ref_logprob`; costs a forward pass an inner step.
    reference_every: steps after which the reference becomes the policy of that
      moment; 0 for never.
    microbatch_tokens: tokens, padding included, through one vjp on all devices;
      one row of each data shard at the least.
    max_prompt_tokens: see long_prompts.
    max_completion_tokens: completions are cut there, the end token included.
    row_tokens: of a packed row, in which the completions of a prompt share its
      tokens; 0 is room for the longest sequence.
    temperature: of rollouts and of the log-probabilities trained on, > 0.
    slots: sequences decoded at one time.
    oversample: groups begun over groups needed; above 1 sampling ends once
      enough are whole, and what is not goes on in the next step, off-policy.
    dynamic_sampling: groups whose rewards are all equal are dropped, and other
      prompts asked (DAPO).
    max_asked: prompts asked in a step at the most, over prompts per step.
    transform: of the distribution that completions are drawn from, see
      `jax_rlvr.sampling`; log-probabilities to train on are those before it.
    stop: texts that end a completion, which is cut before them.
    attention: what computes it in the update: 'splash' is for TPUs, and has
      each completion bring its own prompt tokens; 'cudnn' is for GPUs, 'xla'
      for all; 'auto' is what suits the devices.
    remat: what the backward pass keeps of each layer: all it needs ('none'),
      the outcomes of its matrix products ('dots'), its input and what the
      Splash kernel made ('attention'), or its input alone ('full'), a third
      more work.
    compute_dtype: of matrix products and activations, in rollouts too; weights
      and optimizer state are float32 all the same. 'auto' is bfloat16 on TPU
      and GPU, float32 on CPU.
    token_extras: fields of `TokenStats` that filters want beside logprob and
      entropy; they cost a forward pass in the first inner step.
    warm_up: supervised stage before the first step, or None.
    eval_every: steps between evaluations; one always comes first and last.
    eval_prompts: prompts per task and evaluation; the split's first ones.
    eval_samples: completions per evaluation prompt.
    eval_temperature: 0 for argmax.
    eval_transform: as `transform`, for evaluations.
    checkpoint_every: steps between checkpoints; one always comes last.
    keep_checkpoints: newest ones kept.
    keep_every: checkpoints of multiples of so many steps are kept too; 0 for
      none.
    keep_best: the checkpoint with the highest of this score is kept too, for
      example 'eval/addition/avg@8'; '' for none.
    scorers: worker processes that run rewards.
    reward_deadline_s: seconds an answer may take before its worker is killed.
    batch_deadline_s: seconds that all rewards of a step may take beyond its
      sampling; what is missing then is unscorable.
    reward_memory_mb: address space of a worker; 0 for no limit.
    wandb: project of Weights & Biases to log to; '' for none.
    slices, fsdp, tensor: mesh axes; fsdp = −1 takes the devices left over.
    sampling_tensor: the tensor axis of the mesh to sample on, of the same
      devices; 0 is `tensor`.
  """

  policy: PolicyConfig | str | pathlib.Path
  tokenizer: Tokenizer | None = None
  tasks: Sequence[Task]
  weights: Sequence[float] = ()
  long_prompts: Literal['refuse', 'drop'] = 'refuse'
  eval_tasks: Sequence[Task | Evaluation] = ()
  advantage: Callable[..., Any]
  filters: optax.GradientTransformation
  optimizer: optax.GradientTransformation
  steps: int
  seed: int = 0
  prompts_per_step: int
  group_size: int = 8
  inner_steps: int = 1
  balance_rewards: bool = False
  reference: bool = False
  reference_every: int = 0
  microbatch_tokens: int = 65_536
  max_prompt_tokens: int
  max_completion_tokens: int
  row_tokens: int = 0
  temperature: float = 1.0
  slots: int = 512
  oversample: float = 1.0
  dynamic_sampling: bool = False
  max_asked: float = 4.0
  transform: Transform | None = None
  stop: Sequence[str] = ()
  attention: Literal['auto', 'xla', 'splash', 'cudnn'] = 'auto'
  remat: Literal['none', 'dots', 'attention', 'full'] = 'full'
  compute_dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'
  token_extras: Sequence[str] = ()
  warm_up: WarmUp | None = None
  eval_every: int = 20
  eval_prompts: int = 256
  eval_samples: int = 8
  eval_temperature: float = 1.0
  eval_transform: Transform | None = None
  checkpoint_every: int = 20
  keep_checkpoints: int = 3
  keep_every: int = 0
  keep_best: str = ''
  scorers: int = 1
  reward_deadline_s: float = 10.0
  batch_deadline_s: float = math.inf
  reward_memory_mb: int = 0
  wandb: str = ''
  slices: int = 1
  fsdp: int = -1
  tensor: int = 1
  sampling_tensor: int = 0

  def __post_init__(self):
    for name, least in (_COUNTS | _NUMBERS).items():
      kind, what = (
        (int, 'an integer') if name in _COUNTS else (float, 'a number')
      )
      value = getattr(self, name)
      is_number = isinstance(value, kind | int) and not isinstance(value, bool)
      self._require(name, is_number, what)
      self._require(name, value >= least, f'{least} or more')
    for name in ('temperature', 'reward_deadline_s', 'batch_deadline_s'):
      self._require(name, getattr(self, name) > 0, 'above 0')
    self._require(
      'inner_steps',
      self.prompts_per_step % self.inner_steps == 0,
      f'a divisor of prompts_per_step={self.prompts_per_step}: inner batches '
      'are whole prompts',
    )
    if self.row_tokens == 0:
      object.__setattr__(self, 'row_tokens', self.sequence_tokens)
    self._require(
      'row_tokens',
      self.row_tokens >= self.sequence_tokens,
      f'at least {self.sequence_tokens} tokens: max_prompt_tokens + '
      'max_completion_tokens',
    )
    self._require(
      'microbatch_tokens',
      self.microbatch_tokens >= self.row_tokens,
      f'at least one row of {self.row_tokens} tokens',
    )
    self._require('tasks', len(self.tasks) > 0, 'at least one task')
    for name, choices in _CHOICES.items():
      *others, last = map(repr, choices)
      self._require(
        name,
        getattr(self, name) in choices,
        f'{", ".join(others)} or {last}',
      )
    self._require(
      'weights',
      not self.weights
      or (len(self.weights) == len(self.tasks) and min(self.weights) > 0),
      f'numbers above 0, one for each of the {len(self.tasks)} tasks, or ()',
    )
    self._require(
      'reference_every',
      self.reference or not self.reference_every,
      '0 without reference=True',
    )
    self._require('stop', not isinstance(self.stop, str), 'a sequence of texts')
    extras = TokenStats._fields[2:]
    self._require(
      'token_extras',
      not isinstance(self.token_extras, str)
      and set(self.token_extras) <= set(extras),
      f'some of {", ".join(map(repr, extras))}',
    )

  def _require(self, name: str, holds: bool, what: str) -> None:
    if not holds:
      raise ConfigError(f'{name}={getattr(self, name)!r} must be {what}')

  @property
  def tasks_scored(self) -> list[Task]:
    """All tasks whose rewards are asked for, each once."""
    tasks = list(self.tasks)
    for each in self.evaluations:
      if each.task not in tasks:
        tasks.append(each.task)
    return tasks

  @property
  def evaluations(self) -> tuple[Evaluation, ...]:
    """What is evaluated, and how."""
    return resolved(self.eval_tasks or self.tasks, vars(self))

  @property
  def sequences(self) -> int:
    """B: completions that a step trains on."""
    return self.prompts_per_step * self.group_size

  @property
  def sequence_tokens(self) -> int:
    """T: tokens of the longest prompt + completion."""
    return self.max_prompt_tokens + self.max_completion_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """A config with where it came from: what a run directory records."""

  config: Config
  name: str
  source: str
  overrides: Mapping[str, Any]


def load(spec: str) -> Recipe:
  """Loads `path/to/recipe.py[:key=value,…]`.

  A path that does not exist is looked for among the recipes that ship with the
  package. Values are Python literals; bare words are strings. Keys are those
  of the recipe's get_config and, where that takes **overrides, of Config.

  Raises:
    ConfigError: no such recipe or key, or a value out of range.
  """
  path, _, given = spec.partition(':')
  file = _find(path)
  overrides = _parse(given)
  get_config = runpy.run_path(str(file)).get('get_config')
  if get_config is None:
    raise ConfigError(f'{file} defines no get_config(); a recipe must')
  _check_keys(get_config, overrides, file)
  return Recipe(
    config=get_config(**overrides),
    name=file.name,
    source=file.read_text(),
    overrides=overrides,
  )


def _find(path: str) -> pathlib.Path:
  here = pathlib.Path(__file__).parent
  # In a wheel the recipes lie inside the package, in a checkout beside it.
  shipped = [here / 'configs', here.parent / 'configs']
  name = pathlib.Path(path).name
  for file in [pathlib.Path(path), *(folder / name for folder in shipped)]:
    if file.is_file():
      return file
  known = {f.name for folder in shipped for f in folder.glob('*.py')}
  raise ConfigError(
    f'no config file {path!r}{_did_you_mean(name, known, "configs/")}'
  )


def _parse(given: str) -> dict[str, Any]:
  try:
    call = ast.parse(f'f({given})', mode='eval').body
    assert isinstance(call, ast.Call) and not call.args
    return {
      str(keyword.arg): keyword.value.id
      if isinstance(keyword.value, ast.Name)
      else ast.literal_eval(keyword.value)
      for keyword in call.keywords
    }
  except (SyntaxError, ValueError, AssertionError):
    raise ConfigError(
      f'overrides {given!r} are not key=value,key=value with Python literals'
    ) from None


def _check_keys(get_config, overrides, file) -> None:
  parameters = inspect.signature(get_config).parameters.values()
  known = {p.name for p in parameters if p.kind != p.VAR_KEYWORD}
  if any(p.kind == p.VAR_KEYWORD for p in parameters):
    known |= {field.name for field in dataclasses.fields(Config)}
  for key in overrides:
    if key not in known:
      raise ConfigError(f'{file} has no key {key!r}{_did_you_mean(key, known)}')


def _did_you_mean(name: str, known, prefix: str = '') -> str:
  close = difflib.get_close_matches(name, sorted(known), n=1)
  if close:
    return f'; did you mean {prefix}{close[0]}?'
  return '; known: ' + ', '.join(prefix + k for k in sorted(known))
