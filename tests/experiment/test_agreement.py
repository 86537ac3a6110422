import ml_collections

from rlhf_jax.experiment import agreement
from rlhf_jax.runtime import hosts


def test_the_process_that_differs_is_found():
  assert hosts.find_dissenters(['a', 'a']) == []
  assert hosts.find_dissenters(['a', 'b']) == [1]
  assert hosts.find_dissenters(['a', 'b', 'b']) == [0]
  assert hosts.find_dissenters(['a', 'b', 'a', 'c']) == [1, 3]


def test_the_code_includes_the_functions_that_a_config_names(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'agreed_reward.py').write_text('def f(): return 1\n')
  config = ml_collections.ConfigDict({'ppo': {'reward': 'agreed_reward:f(a=1)', 'init': 'sft'}})
  before = agreement.describe_code(config)
  assert {'jax', 'python', 'rlhf_jax', 'agreed_reward'} <= before.keys() and before['agreed_reward']
  (tmp_path / 'agreed_reward.py').write_text('def f(): return 2\n')
  after = agreement.describe_code(config)
  assert before.pop('agreed_reward') != after.pop('agreed_reward') and before == after
