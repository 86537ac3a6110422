import shutil
import types

from rlhf_jax.commands import report
from rlhf_jax.experiment import remote_workdir


def test_one_run_or_several(make_run, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  first, second = make_run('a'), make_run('b', seed=1)
  assert report.main([str(first)]) == 0
  assert 'ppo is better than sft' in (first / 'report.html').read_text()
  assert report.main([str(first), str(second)]) == 0
  assert '2 runs, 1 configs' in (tmp_path / 'comparison.html').read_text()
  assert capsys.readouterr().out.split() == [str(first / 'report.html'), 'comparison.html']


def test_what_is_no_run_is_refused(make_run, tmp_path, capsys):
  assert report.main([str(tmp_path / 'nowhere')]) == 2
  assert 'expected the workdir of a run' in capsys.readouterr().err
  assert report.main([str(make_run('a')), f'--output={tmp_path}']) == 2
  assert '--output: expected a file, got the folder' in capsys.readouterr().err


def test_a_run_is_followed_until_ctrl_c(make_run, monkeypatch):
  workdir = make_run('a', finished=False)
  page = workdir / 'report.html'
  seen = []

  def sleep(seconds):
    seen.append(page.read_text())
    if len(seen) == 1:
      (workdir / 'sft' / 'metrics.jsonl').write_text('{"step": 1, "norm/gradient": 2.0}\n')
      return
    raise KeyboardInterrupt

  # Only of this module: threads of earlier tests may sleep too.
  monkeypatch.setattr(report, 'time', types.SimpleNamespace(sleep=sleep))
  assert report.main([str(workdir), '--follow']) == 130
  assert 'data-follow' in seen[0] and 'gradient' in seen[1] and 'gradient' not in seen[0]


def test_a_run_behind_a_url(make_run, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.chdir(tmp_path)
  url = f'memory://bucket/{tmp_path.name}'
  with remote_workdir.opened(url) as remote:
    shutil.copytree(make_run('a'), remote.folder, dirs_exist_ok=True)
  assert report.main([url]) == 0
  assert capsys.readouterr().out.splitlines()[-1] == 'report.html'
  assert 'ppo is better than sft' in (tmp_path / 'report.html').read_text()
