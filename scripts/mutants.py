"""Breaks the package in one place at a time, and counts how many faults its tests notice.

  python scripts/mutants.py                     # all mutants, one after the other
  python scripts/mutants.py objectives ppo      # those whose file or change contains a word
  python scripts/mutants.py --jobs=4            # several at a time
  python scripts/mutants.py --list              # only lists them
  python scripts/mutants.py --results=FILE      # goes on where an earlier command stopped

A mutant is a small change of one file, such as γ in the place of λ. It is made in a copy of the
project, where the mirrored tests of that file, and the absolute one of a stage, then run until the
first failure. A mutant that no test notices has survived; it is printed with its change. At the
end comes a table by folder. With --results, FILE keeps a line for each mutant, and those that it
has are not tried again. The exit code is 1 if more than a twentieth survive.
"""

import argparse
from collections.abc import Mapping, Sequence
from concurrent import futures
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ('rlhf_jax', 'tests', 'experiments', 'pytest.ini', 'pyproject.toml', 'docs', 'scripts')
LIMIT_SECONDS = 900  # of the tests of a mutant; one that hangs is noticed
ALLOWED_SURVIVORS = 0.05  # share


class Mutant(NamedTuple):
  """A change of one place of a file, and the tests that should notice it."""

  file: str  # below rlhf_jax
  old: str  # occurs once in the file
  new: str
  tests: str  # below tests; words separated by blanks


ADVANTAGES = 'objectives/test_advantages.py'
POLICY = 'objectives/test_policy_gradient.py'
PREFERENCE = 'objectives/test_preference.py'
RANKING = 'objectives/test_ranking.py'
DIVERGENCE = 'objectives/test_divergence.py'
MASKED = 'objectives/test_masked.py objectives/test_finite.py'
STEP = 'runtime/test_step.py'
BATCHES = 'data/test_batches.py'
ENCODE = 'data/test_encode.py'
SAMPLER = 'generation/test_sampler.py'
HEADS = 'models/test_heads.py'
# The test of a stage against formulas written anew comes first, as it is quick.
PPO = 'stages/test_absolute.py::test_ppo stages/test_ppo.py'
GROUPS = 'stages/test_absolute.py::test_policy_gradient stages/test_policy_gradient.py'
PAIRS = 'stages/test_absolute.py::test_preference stages/test_preference.py'
ONLINE = 'stages/test_absolute.py::test_online_preference stages/test_online_preference.py'
REWARD = 'stages/test_absolute.py::test_reward_model stages/test_reward.py'
SUPERVISED = 'stages/test_absolute.py::test_next_token_prediction stages/test_supervised.py'
ROLLOUT = 'stages/test_rollout.py'
FROZEN = 'stages/test_absolute.py::test_frozen_reward'

MUTANTS = (
  # Formulas.
  Mutant('objectives/advantages.py', 'reward + discount *', 'reward + gae_lambda *', ADVANTAGES),
  Mutant('objectives/advantages.py', '+ discount * gae_lambda *', '+ gae_lambda *', ADVANTAGES),
  Mutant('objectives/advantages.py', 'reverse=True,', 'reverse=False,', ADVANTAGES),
  Mutant('objectives/advantages.py', 'jnp.where(inside, value, next_value)', 'value', ADVANTAGES),
  Mutant('objectives/advantages.py', '-coefficient * kl', 'coefficient * kl', ADVANTAGES),
  Mutant(
    'objectives/advantages.py',
    'last = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))',
    'last = mask & ~jnp.pad(mask[:, 2:], ((0, 0), (0, 2)))',
    ADVANTAGES,
  ),
  Mutant('objectives/advantages.py', '(count / max(count - 1, 1))', '1.0', ADVANTAGES),
  Mutant(
    'objectives/advantages.py',
    '(limit - buffer - lengths) / buffer, -1.0, 0.0',
    '(lengths - limit + buffer) / buffer, 0.0, 1.0',
    ADVANTAGES,
  ),
  Mutant(
    'objectives/advantages.py', 'rewards[:, ::-1], axis=1)[:, ::-1]', 'rewards, axis=1)', ADVANTAGES
  ),
  Mutant('objectives/advantages.py', 'jnp.sqrt(variance) + 1e-4', 'variance + 1e-4', ADVANTAGES),
  Mutant(
    'objectives/policy_gradient.py',
    'losses=jnp.maximum(unclipped_losses, clipped_losses),',
    'losses=jnp.minimum(unclipped_losses, clipped_losses),',
    POLICY,
  ),
  Mutant(
    'objectives/policy_gradient.py',
    'clipped_ratios = jnp.clip(ratios, 1.0 - clip_low, 1.0 + clip_high)',
    'clipped_ratios = jnp.clip(ratios, 1.0 - clip_low, 1.0 + clip_low)',
    POLICY,
  ),
  Mutant(
    'objectives/policy_gradient.py',
    'return finite_exp.exp(jnp.where(mask, logprobs - old_logprobs, 0.0))',
    'return finite_exp.exp(jnp.where(mask, old_logprobs - logprobs, 0.0))',
    POLICY,
  ),
  Mutant(
    'objectives/policy_gradient.py',
    'log_ratios = masked.keep(old_logprobs - sampler_logprobs, mask)',
    'log_ratios = masked.keep(sampler_logprobs - old_logprobs, mask)',
    POLICY,
  ),
  Mutant('objectives/policy_gradient.py', '/ tokens\n', '\n', POLICY),
  Mutant('objectives/policy_gradient.py', '-jax.lax.stop_gradient(weights)', '-weights', POLICY),
  Mutant(
    'objectives/policy_gradient.py',
    'losses = 0.5 * jnp.maximum(unclipped_losses, clipped_losses)',
    'losses = 0.5 * unclipped_losses',
    POLICY,
  ),
  Mutant(
    'objectives/policy_gradient.py',
    'losses / _tokens_of_responses(mask), mask',
    'losses, mask',
    POLICY,
  ),
  Mutant(
    'objectives/policy_gradient.py',
    '_count_responses(mask) * mask.shape[1]',
    '_count_responses(mask)',
    POLICY,
  ),
  Mutant(
    'objectives/divergence.py',
    'log_ratio = reference_logprobs - logprobs',
    'log_ratio = logprobs - reference_logprobs',
    DIVERGENCE,
  ),
  Mutant('objectives/divergence.py', 'kl / target - 1.0', '1.0 - kl / target', DIVERGENCE),
  Mutant(
    'objectives/divergence.py',
    'error * episodes / horizon',
    'error * horizon / episodes',
    DIVERGENCE,
  ),
  Mutant('objectives/masked.py', 'white = white + average', 'white = white', MASKED),
  Mutant('objectives/masked.py', '  x = keep(x, mask)\n  average', '  average', MASKED),
  Mutant(
    'objectives/ranking.py', 'ranks[:, :, None] < ranks', 'ranks[:, :, None] > ranks', RANKING
  ),
  Mutant('objectives/ranking.py', 'losses / count, 0.0', 'losses, 0.0', RANKING),
  Mutant('objectives/ranking.py', '& (group[:, :, None] > 0)', '', RANKING),
  Mutant('objectives/ranking.py', 'doubt = 1 - jnp', 'doubt = 0 * jnp', RANKING),
  Mutant('objectives/ranking.py', '0.5 + 0.5 * jnp.sign', '0.5 - 0.5 * jnp.sign', RANKING),
  Mutant(
    'objectives/preference.py', '(1 - 2 * smoothing) * doubt', '(1 - smoothing) * doubt', PREFERENCE
  ),
  Mutant(
    'objectives/preference.py',
    '(right - flipped) / (1 - 2',
    '(right + flipped) / (1 - 2',
    PREFERENCE,
  ),
  Mutant(
    'objectives/preference.py',
    'jax.nn.relu(-worse.ratio)',
    'jax.nn.relu(-better.ratio)',
    PREFERENCE,
  ),
  Mutant(
    'objectives/preference.py',
    'jnp.where(desirable, -1.0, 1.0)',
    'jnp.where(desirable, 1.0, -1.0)',
    PREFERENCE,
  ),
  Mutant('objectives/preference.py', 'jax.nn.relu(mean))', 'mean)', PREFERENCE),
  Mutant(
    'objectives/preference.py',
    '(difference - 0.5 / settings.beta) ** 2',
    '(difference - 1.0 / settings.beta) ** 2',
    PREFERENCE,
  ),
  Mutant(
    'objectives/language_model.py',
    'targets = mask != 0',
    'targets = mask == 0',
    'objectives/test_language_model.py',
  ),
  # Heads, sampler, batches, encoding.
  Mutant(
    'models/heads.py',
    'rounded(logits / temperature)',
    'rounded(logits)',
    HEADS,
  ),
  Mutant('models/heads.py', "@ head['kernel'] + head['bias']", "@ head['kernel']", HEADS),
  Mutant('models/heads.py', 'cap * jnp.tanh(logits / cap)', 'jnp.tanh(logits / cap)', HEADS),
  Mutant(
    'generation/sampler.py',
    'logits / (options.temperature or 1.0)',
    'logits',
    SAMPLER,
  ),
  Mutant(
    'generation/sampler.py',
    'kept = jnp.where(before < top_p, order, jnp.inf)',
    'kept = jnp.where(before > top_p, order, jnp.inf)',
    SAMPLER,
  ),
  Mutant('generation/sampler.py', 'jnp.where(done, definition.pad_id, tokens)', 'tokens', SAMPLER),
  Mutant(
    'generation/sampler.py',
    'jax.random.fold_in, key))(jnp.arange(length))',
    'jax.random.fold_in, key))(0 * jnp.arange(length))',
    SAMPLER,
  ),
  Mutant(
    'data/batches.py', '.seed(seed).shuffle().repeat()', '.seed(0).shuffle().repeat()', BATCHES
  ),
  Mutant('data/batches.py', "np.where(group > 0, arrays['index'], -1)", "arrays['index']", BATCHES),
  Mutant(
    'data/batches.py',
    'if used + count > responses_per_row:',
    'if used > responses_per_row:',
    BATCHES,
  ),
  Mutant('data/encode.py', 'targets[:num_context] = 0', 'targets[:0] = 0', ENCODE),
  Mutant(
    'data/encode.py', 'begins[number] = len(fitted)', 'begins[number] = len(fitted) + 1', ENCODE
  ),
  Mutant('data/encode.py', 'prompt[len(prompt) - num_kept :]', 'prompt[:num_kept]', ENCODE),
  # The step, its micro-batches and the optimizer.
  Mutant('runtime/step.py', 'jax.tree.map(lambda g: g / weight, gradients)', 'gradients', STEP),
  Mutant('runtime/step.py', 'keep_if_finite(new_params, params),', 'new_params,', STEP),
  Mutant('runtime/step.py', 'step=state.step + updates,', 'step=state.step + 1,', STEP),
  Mutant(
    'runtime/step.py',
    "random_keys.for_purpose(state.key, 'update'), state.step)",
    "random_keys.for_purpose(state.key, 'update'), 0)",
    'stages/test_keys.py',
  ),
  Mutant(
    'runtime/optimizers.py',
    "not ('norm' in name or 'bias' in name)",
    'True',
    'runtime/test_optimizers.py',
  ),
  Mutant(
    'runtime/optimizers.py',
    'peak * options.final_scale, remaining',
    'peak, remaining',
    'runtime/test_optimizers.py',
  ),
  # Stages: what formulas get, and when.
  Mutant(
    'stages/ppo/assessment.py',
    '    options.discount,\n    options.gae_lambda,',
    '    options.gae_lambda,\n    options.discount,',
    PPO,
  ),
  Mutant('stages/ppo/assessment.py', 'if options.whiten_rewards:', 'if False:', PPO),
  Mutant('stages/ppo/assessment.py', 'if options.whiten_advantages:', 'if False:', PPO),
  Mutant(
    'stages/ppo/assessment.py',
    '    logprobs=evaluated.logprobs,',
    '    logprobs=samples.logprobs,',
    PPO,
  ),
  Mutant('stages/ppo/update.py', '    options.value_clip,', '    options.clip,', PPO),
  Mutant('stages/ppo/update.py', 'options.value_coefficient * value_part', 'value_part', PPO),
  Mutant(
    'stages/shared/rollout.py',
    'values[:, -response_length - 1 : -1]',
    'values[:, -response_length:]',
    PPO,
  ),
  Mutant('stages/ppo/update.py', 'nll = nll * weight[0]', 'nll = nll', PPO),
  Mutant(
    'stages/ppo/assessment.py', 'value_mask = advantages.after_end(mask)', 'value_mask = mask', PPO
  ),
  Mutant('stages/policy_gradient.py', '    options.clip_high,', '    options.clip_low,', GROUPS),
  Mutant(
    'stages/policy_gradient.py',
    'rewards + advantages.overlong_penalty',
    'rewards - advantages.overlong_penalty',
    GROUPS,
  ),
  Mutant(
    'stages/policy_gradient.py', 'losses = losses * assessed.weights', 'losses = losses', GROUPS
  ),
  Mutant(
    'stages/policy_gradient.py',
    'rewards - options.kl_coefficient * jnp.sum(kl, axis=1)',
    'rewards',
    GROUPS,
  ),
  Mutant(
    'stages/policy_gradient.py',
    'options.kl_coefficient * advantages.reward_to_go(kl)',
    'options.kl_coefficient * kl',
    'stages/test_absolute.py::test_the_kl_of_each_token_counts_for_those_before_it',
  ),
  Mutant(
    'stages/policy_gradient.py',
    'rewards.reshape(-1, K), lengths',
    'rewards.reshape(K, -1).T, lengths',
    GROUPS,
  ),
  Mutant(
    'stages/shared/rollout.py',
    'jnp.where(ended, scores, options.missing_eos_score)',
    'scores',
    f'{ROLLOUT} {PPO}',
  ),
  Mutant('stages/shared/rollout.py', 'x[order].reshape(count, -1', 'x.reshape(count, -1', ROLLOUT),
  Mutant(
    'stages/shared/rollout.py',
    "random_keys.for_purpose(state.key, 'rollout'), state.step)",
    "random_keys.for_purpose(state.key, 'rollout'), 0)",
    f'stages/test_keys.py {ROLLOUT}',
  ),
  Mutant(
    'stages/shared/packing.py',
    'begins = ends - lengths',
    'begins = ends - lengths + 1',
    'stages/test_packing.py',
  ),
  Mutant(
    'stages/shared/off_policy.py',
    'policy_gradient.SAMPLER_WEIGHTS[options.weight_rule](ratios,',
    "policy_gradient.SAMPLER_WEIGHTS['truncate'](ratios,",
    PPO,
  ),
  Mutant(
    'stages/shared/off_policy.py',
    'step % options.sampler_every == 0',
    'step % options.sampler_every == 1',
    'stages/test_policy_gradient.py',
  ),
  Mutant('stages/frozen_reward.py', 'weights[width:] / width', 'weights[width:]', FROZEN),
  Mutant(
    'stages/frozen_reward.py',
    'segment_ids[row, : len(ids)] = 1',
    'segment_ids[row, : len(ids) - 1] = 1',
    FROZEN,
  ),
  Mutant('stages/shared/ranked_logprobs.py', '(places >= begins)', '(places > begins)', PAIRS),
  Mutant('stages/preference.py', 'policy.sums - reference.sums', 'policy.sums', PAIRS),
  Mutant(
    'stages/preference.py',
    'reference_logprobs=reference.logprobs(reference.params, placed)',
    'reference_logprobs=placed.reference_logprobs',
    PAIRS,
  ),
  Mutant(
    'stages/online_preference.py',
    'ranks=ranking.from_scores(group(scores))',
    'ranks=ranking.from_scores(-group(scores))',
    ONLINE,
  ),
  Mutant(
    'stages/online_preference.py',
    'batch.replace(reference_logprobs=sums.reshape(batch.group.shape))',
    'batch',
    ONLINE,
  ),
  Mutant(
    'stages/reward.py',
    'jnp.where(segment_ids > 0, places, 0), axis=1)',
    'jnp.where(segment_ids > 0, places - 1, 0), axis=1)',
    REWARD,
  ),
  Mutant(
    'stages/reward.py', "head['bias'] - np.float32(mean)", "head['bias'] + np.float32(mean)", REWARD
  ),
  Mutant('stages/reward.py', '(batch.ranks == 1)', '(batch.ranks > 1)', REWARD),
  Mutant(
    'stages/shared/supervised.py',
    'mask = batch.loss_mask[:, 1:]',
    'mask = batch.loss_mask[:, :-1]',
    SUPERVISED,
  ),
)


def main() -> int:
  """Tries the mutants, prints a line for each and the share that was noticed."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('words', nargs='*', help='only mutants whose file or change has one of these')
  parser.add_argument('--jobs', type=int, default=1, help='how many at a time')
  parser.add_argument('--list', action='store_true', help='list the mutants and exit')
  parser.add_argument('--results', type=Path, help='JSON Lines of what was tried')
  parser.add_argument('--table', action='store_true', help='only print the table of --results')
  options = parser.parse_args()
  chosen = [mutant for mutant in MUTANTS if is_chosen(mutant, options.words)]
  for mutant in chosen:
    check_occurs_once(mutant)
    if options.list:
      print(describe(mutant))
  if options.list:
    return 0
  noticed = read_results(options.results)  # description → whether it was noticed
  if options.table:
    print(format_table(chosen, noticed))
    return 0
  left = [mutant for mutant in chosen if describe(mutant) not in noticed]
  with futures.ThreadPoolExecutor(options.jobs) as pool:
    for mutant, (is_noticed, seconds) in zip(left, pool.map(try_mutant, left), strict=True):
      noticed[describe(mutant)] = is_noticed
      word = 'noticed ' if is_noticed else 'SURVIVED'
      print(f'{word} {seconds:4.0f} s  {describe(mutant)}', flush=True)
      if options.results:
        with options.results.open('a') as file:
          row = {'mutant': describe(mutant), 'noticed': is_noticed, 'seconds': round(seconds)}
          file.write(json.dumps(row, ensure_ascii=False) + '\n')
  print(format_table(chosen, noticed))
  survivors = [mutant for mutant in chosen if not noticed[describe(mutant)]]
  return int(len(survivors) > ALLOWED_SURVIVORS * len(chosen))


def read_results(path: Path | None) -> dict[str, bool]:
  """Reads which mutants were noticed by earlier commands."""
  if path is None or not path.is_file():
    return {}
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  return {row['mutant']: row['noticed'] for row in rows}


def format_table(mutants: Sequence[Mutant], noticed: Mapping[str, bool]) -> str:
  """Formats how many mutants of each folder were noticed, in Markdown."""
  lines = ['| folder | mutants | tried | noticed |', '| --- | --- | --- | --- |']
  folders = {mutant.file.rpartition('/')[0] for mutant in mutants}
  for folder in [*sorted(folders), '']:
    own = [mutant for mutant in mutants if folder in ('', mutant.file.rpartition('/')[0])]
    tried = [noticed[describe(mutant)] for mutant in own if describe(mutant) in noticed]
    lines.append(f'| {folder or "all"} | {len(own)} | {len(tried)} | {sum(tried)} |')
  return '\n'.join(lines)


def is_chosen(mutant: Mutant, words: Sequence[str]) -> bool:
  """Says whether a mutant has one of the words, or there are none."""
  return not words or any(word in describe(mutant) for word in words)


def describe(mutant: Mutant) -> str:
  """Returns a mutant in one line."""
  old, new = (' '.join(text.split()) for text in (mutant.old, mutant.new))
  return f'{mutant.file}: {old} → {new or "nothing"}'


def check_occurs_once(mutant: Mutant) -> None:
  """Stops if the code of a mutant has changed, so that it must be written anew."""
  count = (ROOT / 'rlhf_jax' / mutant.file).read_text(encoding='utf-8').count(mutant.old)
  if count != 1:
    sys.exit(f'{describe(mutant)}: the old text occurs {count} times; correct scripts/mutants.py')


def try_mutant(mutant: Mutant) -> tuple[bool, float]:
  """Runs the tests of a mutant in a copy; returns whether they fail, and their seconds."""
  began = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    copy = Path(folder)
    for name in COPIED:
      source = ROOT / name
      if source.is_dir():
        shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns('__pycache__'))
      else:
        shutil.copy(source, copy)
    path = copy / 'rlhf_jax' / mutant.file
    path.write_text(
      path.read_text(encoding='utf-8').replace(mutant.old, mutant.new), encoding='utf-8'
    )
    tests = [f'tests/{name}' for name in mutant.tests.split()]
    command = [
      sys.executable,
      '-m',
      'pytest',
      '-q',
      '-x',
      '-n',
      '0',
      '-p',
      'no:cacheprovider',
      *tests,
    ]
    try:
      done = subprocess.run(
        command,
        cwd=copy,
        env={**os.environ, 'PYTHONPATH': folder},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
      )
    except subprocess.TimeoutExpired:
      return True, time.monotonic() - began
  if done.returncode not in (0, 1):  # pytest itself failed
    sys.exit(f'{describe(mutant)}: {done.stdout[-2000:]}{done.stderr[-2000:]}')
  return done.returncode == 1, time.monotonic() - began


if __name__ == '__main__':
  sys.exit(main())
