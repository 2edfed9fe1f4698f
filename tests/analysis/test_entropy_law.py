"""Laws that are known, and the logs of runs that follow them."""

import math

import numpy as np
import pytest

from jax_rlvr.analysis import entropy_law
from jax_rlvr.analysis.entropy_law import ENTROPY


def exact(a, b):
  """The law of points without noise."""
  entropy = np.array([0.1, 0.4, 1.0])
  return entropy_law.fit(entropy, -a * np.exp(entropy) + b)


def test_law_without_noise_is_found():
  law = exact(0.212, 0.599)
  assert law.a == pytest.approx(0.212, abs=1e-12)
  assert law.b == pytest.approx(0.599, abs=1e-12)
  assert law.ceiling == pytest.approx(0.387, abs=1e-12)
  assert law.line.r2 == pytest.approx(1.0)
  # The paper's 7B starts at 0.55 nats and 23.3 %, and ends at 0.019 and 38.3.
  np.testing.assert_allclose(
    law.score([0.55, 0.019]), [0.233, 0.383], atol=0.0015
  )
  low, high = law.band(0.0)
  assert low == pytest.approx(high)


def test_law_is_linear_in_the_exponential_not_in_the_entropy():
  entropy = np.array([0.0, math.log(2), math.log(3)])
  law = entropy_law.fit(entropy, [0.5, 0.4, 0.3])
  # R = 0.6 − 0.1 e^H: e^H is 1, 2, 3.
  assert (law.a, law.b, law.ceiling) == pytest.approx((0.1, 0.6, 0.5))
  straight = np.polyfit(entropy, [0.5, 0.4, 0.3], 1)
  assert abs(straight[1] - law.ceiling) > 1e-3


def run_like_the_papers(noise=0.0, seed=0):
  """240 steps, evaluated every 4: 7B's law, its entropy from 0.55 to 0.02."""
  step = np.arange(0, 241, 4)
  entropy = 0.55 * (1 + step / 20) ** -1.3
  score = 0.599 - 0.212 * np.exp(entropy)
  score += noise * np.random.default_rng(seed).normal(size=step.size)
  return step, entropy, score


def test_forecast_fits_the_first_36_of_240_steps():
  made = entropy_law.forecast(*run_like_the_papers())
  # Steps 0, 4, …, 36.
  assert made.fitted == 10
  assert made.rmse < 1e-12 and made.final_error < 1e-12
  assert made.law.ceiling == pytest.approx(0.387)


def test_forecast_is_that_of_a_loop():
  step, entropy, score = run_like_the_papers(noise=0.005)
  made = entropy_law.forecast(step, entropy, score, share=0.3)
  early = [i for i in range(len(step)) if step[i] <= 72]
  slope, start = np.polyfit(np.exp(entropy[early]), score[early], 1)
  errors = [
    start + slope * math.exp(entropy[i]) - score[i]
    for i in range(len(step))
    if step[i] > 72
  ]
  assert made.law.a == pytest.approx(-slope)
  assert made.rmse == pytest.approx(math.sqrt(np.mean(np.square(errors))))
  assert made.final_error == pytest.approx(abs(errors[-1]))


def test_forecast_of_a_noisy_run_is_as_good_as_the_papers():
  made = [
    entropy_law.forecast(*run_like_the_papers(noise=0.005, seed=seed))
    for seed in range(100)
  ]
  assert np.mean([each.rmse for each in made]) < 0.009
  assert np.mean([each.law.ceiling for each in made]) == pytest.approx(
    0.387, abs=0.002
  )
  held = [
    low <= 0.387 <= high for low, high in (each.law.band(0.0) for each in made)
  ]
  # 95 of 100, give or take four standard errors of 2.2.
  assert 86 <= sum(held) <= 100


def test_forecast_of_everything_is_refused():
  with pytest.raises(ValueError, match='leaves none to predict'):
    entropy_law.forecast([0, 1, 2], [1, 0.5, 0.2], [0, 1, 2], share=1.0)


def test_coefficients_are_lines_in_the_log_of_size():
  # Read off the paper's figures for Qwen2.5, embeddings aside, in billions.
  size = [0.36, 1.31, 2.77, 6.53, 31.0]
  a = [0.044, 0.096, 0.177, 0.212, 0.238]
  b = [0.195, 0.351, 0.480, 0.599, 0.692]
  laws = [exact(*each) for each in zip(a, b, strict=True)]
  line_a, line_b = entropy_law.by_size(size, laws)
  assert line_a.slope == pytest.approx(0.046, abs=5e-4)
  assert line_a.intercept == pytest.approx(0.102, abs=5e-4)
  assert line_b.slope == pytest.approx(0.116, abs=5e-4)
  assert line_b.intercept == pytest.approx(0.334, abs=5e-4)
  assert line_a.at(np.log(1.0)) == pytest.approx(line_a.intercept)


def rows(entropies):
  """Of metrics.jsonl, from step 1."""
  return [{'step': s + 1, ENTROPY: h} for s, h in enumerate(entropies)]


def test_score_is_paired_with_the_rollouts_of_the_same_weights():
  measured = rows([1.0, 0.8, 0.6, 0.5])
  evaluations = [
    {'step': 0, 'eval/sums/avg@8': 0.1, 'eval/sums/avg@8/low': 0.0},
    {'step': 2, 'eval/sums/avg@8': 0.3, 'eval/sums/pass@8': 0.9},
    {'step': 4, 'eval/sums/avg@8': 0.4},
  ]
  step, entropy, score = entropy_law.pairs(measured, evaluations)
  # After 2 steps the weights draw the rollouts of step 3; nothing follows 4.
  assert step.tolist() == [0, 2]
  assert entropy.tolist() == [1.0, 0.6]
  assert score.tolist() == [0.1, 0.3]


def test_score_is_the_mean_over_evaluations_and_entropy_may_be_theirs():
  evaluations = [
    {'step': 0, 'eval/a/avg@8': 0.1, 'eval/b/avg@16': 0.3,
     'eval/a/entropy': 1.0, 'eval/b/entropy': 2.0},
    {'step': 5, 'eval/a/avg@8': 0.5, 'eval/b/avg@16': 0.7,
     'eval/a/entropy': 0.25, 'eval/b/entropy': 0.75},
  ]  # fmt: skip
  step, entropy, score = entropy_law.pairs([], evaluations, held_out=True)
  assert step.tolist() == [0, 5]
  assert entropy.tolist() == [1.5, 0.5]
  assert score.tolist() == pytest.approx([0.2, 0.6])
  assert entropy_law.pairs([], evaluations).step.size == 0


def test_pairs_without_numbers_are_left_out():
  measured = rows([1.0, math.nan, 0.5]) + [{'step': 4}]
  evaluations = [{'step': s, 'eval/a/avg@8': 0.1} for s in (0, 1, 3)]
  evaluations.append({'step': 2, 'eval/a/pass@8': 0.1})
  assert entropy_law.pairs(measured, evaluations).step.tolist() == [0]
  assert entropy_law.pairs([], []).step.size == 0


def test_trend_finds_a_power_of_the_step():
  step = np.arange(1, 101)
  trend = entropy_law.trend(step, 2.0 * step**-0.7)
  assert trend.at(1000) == pytest.approx(2.0 * 1000**-0.7)
  # 2 s^−0.7 = 0.04 where s = 50^(1/0.7).
  assert trend.steps_until(0.04) == pytest.approx(50 ** (1 / 0.7) - 100)
  assert trend.steps_until(0.5) == 0.0
  assert trend.steps_until(1e-300) == math.inf


def test_trend_looks_at_the_latter_half():
  step = np.arange(1, 101)
  entropy = np.where(step <= 50, 5.0 / step, 0.3 * step**-0.1)
  trend = entropy_law.trend(step, entropy)
  assert trend.line.slope == pytest.approx(-0.1)


def test_rise_of_entropy_is_not_continued():
  step = np.arange(1, 11)
  trend = entropy_law.trend(step, 0.1 * step)
  assert not trend.falls
  assert trend.at(1000) == trend.at(10) == pytest.approx(1.0)
  assert trend.steps_until(0.5) == math.inf


def test_trend_bears_an_entropy_of_zero_and_few_steps():
  assert entropy_law.trend([1, 2, 3], [0.0, 0.0, 0.0]).at(9) < 1e-5
  with pytest.raises(ValueError, match='2 points'):
    entropy_law.trend([1, 2], [1.0, 0.5])


def test_steps_to_the_ceiling_are_those_to_a_hundredth_below_it():
  step = np.arange(1, 101)
  trend = entropy_law.trend(step, 2.0 * step**-0.7)
  law = exact(0.2, 0.6)
  # 0.2 (e^H − 1) = 0.01 at H = ln 1.05.
  expected = (2.0 / math.log(1.05)) ** (1 / 0.7) - 100
  assert entropy_law.steps_to_ceiling(law, trend) == pytest.approx(expected)
  assert law.score(trend.at(100 + expected)) == pytest.approx(0.39)
  # Where the score falls with the entropy there is nothing to come to.
  falling = exact(-0.2, 0.3)
  assert entropy_law.steps_to_ceiling(falling, trend) == math.inf


def test_streamed_law_waits_for_three_pairs():
  entropies = 2.0 * np.arange(1, 101) ** -0.7
  measured = rows(entropies)
  evaluations = [
    {'step': s, 'eval/a/avg@8': 0.6 - 0.2 * math.exp(entropies[s])}
    for s in (0, 20, 40)
  ]
  # When step 40 is evaluated, step 41 has not been run.
  assert entropy_law.streamed(measured[:40], evaluations, 200) == {}
  law = entropy_law.streamed(measured, evaluations, 200)
  assert law['law/a'] == pytest.approx(0.2)
  assert law['law/b'] == pytest.approx(0.6)
  assert law['law/ceiling'] == pytest.approx(0.4)
  # The weights after 200 steps would draw the rollouts of step 201.
  final = 0.6 - 0.2 * math.exp(2.0 * 201**-0.7)
  assert law['law/predicted_final'] == pytest.approx(final)
  assert set(law) == {'law/a', 'law/b', 'law/ceiling', 'law/predicted_final'}


def test_streamed_law_needs_entropies_that_differ():
  evaluations = [{'step': s, 'eval/a/avg@8': 0.1 * s} for s in range(3)]
  assert entropy_law.streamed(rows([0.5] * 5), evaluations, 9) == {}
