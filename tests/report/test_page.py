import re
import types

from made_runs import EVIL
import pytest

from rlhf_jax import fingerprints
from rlhf_jax.errors import UserError
from rlhf_jax.report import kept_responses, page, refresh, run_files

# What a page may name: the name spaces and the addresses of its own parts.
OUTSIDE = re.compile(r'(?:src|href)="(?!#|data:)|url\(|@import|https?://')


def render(workdir):
  return page.render_run(run_files.read_run(workdir))


def test_a_finished_run(make_run):
  text = render(make_run('run'))
  for part in ('table', 'curves', 'frontier', 'samples', 'extremes', 'history', 'tokens', 'about'):
    assert f'id="{part}"' in text and f'href="#{part}"' in text, part
  assert 'ppo is better than sft' in text
  assert 'python -m rlhf_jax --workdir=x' in text and 'jax 1.2.3' in text and 'abc123' in text
  assert re.search(
    r'ppo\.kl_coefficient</code></th><td><code>0\.05</code>.*<code>0\.1</code>', text
  )
  assert 'It is <mark>blue</mark>.' in text
  assert not OUTSIDE.search(text) and len(text) < 2 * 10**6


def test_what_the_reward_model_bought_and_where_it_errs(make_run):
  workdir = make_run('run')
  gain = dict(row='ppo', how='trained', utility_gain=0.5, utility_gain_ci95=[0.3, 0.7])
  gain |= dict(win_rate=0.7, win_rate_ci95=[0.6, 0.8], kl=1.0)
  results = fingerprints.read_json(workdir / 'results.json')
  results['downstream'] = {'reward': 'reward', 'judge': 'oracle', 'gains': [gain]}
  fingerprints.write_json(workdir / 'results.json', results)
  ranking = types.SimpleNamespace(
    id='r', messages=[{'role': 'user', 'content': '?'}], responses=['Right', 'Wrong'], ranks=[1, 2]
  )
  for step in (0, 4):
    rows = kept_responses.make_given_rows(
      [ranking], {0: [-1.0, 2.0]}, {0: [1, 1]}, stage='sft', step=step
    )
    kept_responses.keep(workdir, rows)
  text = render(workdir)
  assert 'gained in the judge&#39;s utility, against sft' in text and '+0.30 to +0.70' in text
  assert 'href="#bought"' in text and 'id="mistakes"' in text
  assert 'people prefer' in text and '>Wrong<' in text
  assert 'people rank it first' in text and '<h3>sft</h3>\n<details class="case"' not in text


def test_what_is_gained_and_lost_by_the_kind_of_prompt(make_run):
  workdir = make_run('run')
  results = fingerprints.read_json(workdir / 'results.json')
  rates = {'sft': (0.5, 0.9), 'ppo': (0.7, 0.2)}  # greedy: a loss
  results['kinds'] = {}
  for name, (sampled, greedy) in rates.items():
    results['kinds'][name] = {
      'sampled': {'two_reasons': dict(prompts=12, helpful=sampled)},
      'greedy': {'two_reasons': dict(prompts=12, helpful=greedy)},
    }
  fingerprints.write_json(workdir / 'results.json', results)
  text = render(workdir)
  assert 'Helpful by kind of prompt, sampled / greedy' in text
  row = re.search('<tr><th scope="row">two reasons</th>.*', text)
  assert row and re.findall('<td>(.*?)</td>', row[0]) == ['12', '50% / 90%', '70% / 20%']


def test_what_models_wrote_is_shown_and_not_obeyed(make_run):
  text = render(make_run('run'))
  text.encode()  # no half surrogate pair
  assert '\x1b' not in text and '\u202e' not in text and 'alert(1)</script>' not in text
  assert '\\x1b[31mred' in text and '&lt;script&gt;alert(1)' in text and '{{ 7 * 7 }}' in text
  assert EVIL.count('\\') == 0 and '\\ud800' in text


def test_a_killed_run_has_a_report(make_run):
  workdir = make_run('run', finished=False)
  metrics = workdir / 'ppo' / 'metrics.jsonl'
  metrics.write_text(metrics.read_text() + '{"step": 5, "rew')
  (workdir / 'sessions.json').write_text('{"half')
  assert refresh.write(workdir)
  text = (workdir / 'report.html').read_text()
  assert 'Not finished' in text and 'sessions.json: damaged' in text and 'id="history"' in text
  # Killed before anything was measured.
  for path in workdir.rglob('*.jsonl'):
    path.unlink()
  assert refresh.write(workdir) and 'id="curves"' not in (workdir / 'report.html').read_text()


def test_a_report_that_fails_stops_nothing(make_run, caplog):
  workdir = make_run('run')
  (workdir / 'config.json').write_text('{}')
  assert not refresh.write(workdir)
  assert 'report.html: not written' in caplog.text
  assert not refresh.write(workdir / 'nowhere')  # a stage without a run around it


def test_the_report_takes_a_small_share_of_the_time(make_run, monkeypatch):
  now, calls = [100.0], []

  def write(workdir):
    calls.append(now[0])
    now[0] += 2

  monkeypatch.setattr(refresh, 'write', write)
  monkeypatch.setattr(refresh.time, 'monotonic', lambda: now[0])
  page_of_run = refresh.Refresher('run')
  for _ in range(300):
    page_of_run.refresh()
    now[0] += 1
  assert calls == [100.0, 202.0, 304.0]


def test_several_runs(make_run):
  runs = [
    run_files.read_run(make_run('a', seed=0)),
    run_files.read_run(make_run('b', seed=1)),
    run_files.read_run(make_run('c', coefficient=0.3)),
  ]
  assert {name: len(own) for name, own in page.group_runs(runs).items()} == {
    'a (2 seeds)': 2,
    'c': 1,
  }
  text = page.render_comparison(runs)
  assert '3 runs, 2 configs' in text and 'class="band"' in text and 'kl_coefficient' in text
  assert 'ppo is better than sft (seed 0); ppo is better than sft (seed 1)' in text
  assert not OUTSIDE.search(text)


def test_a_folder_without_a_run_is_refused(tmp_path):
  with pytest.raises(UserError, match='expected the workdir of a run'):
    run_files.read_run(tmp_path)


def test_the_last_evaluation_and_whole_lines(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "eval/loss": 2.0}\n{"step": 2}\n{"st')
  rows = run_files.read_metrics(tmp_path)
  assert rows == [{'step': 1, 'eval/loss': 2.0}, {'step': 2}]
  assert run_files.last_evaluation(rows) == {'loss': 2.0}
  assert run_files.last_evaluation(rows[1:]) == {} == run_files.last_evaluation([])
  assert run_files.read_metrics(tmp_path / 'x') == []


def test_damaged_results_are_said(make_run):
  workdir = make_run('run')
  fingerprints.write_json(workdir / 'results.json', {'models': {}})
  (workdir / 'results.json').write_text((workdir / 'results.json').read_text().replace('{}', '[]'))
  assert 'results.json: damaged' in render(workdir)
