"""The words of a report, explained for readers who do not know the field."""

# Kind of a stage → what it does.
STAGES = {
  'pretrain': 'predicts the next word of documents',
  'sft': 'imitates good responses (supervised fine-tuning)',
  'feedback': 'samples responses and has them ranked',
  'critique': 'criticises and revises its own responses by written principles',
  'reward': 'a second model learns to score responses as the rankings order them',
  'frozen_reward': 'a score is learnt from rankings on top of a model that does not change',
  'preference': 'learns from rankings without a reward model',
  'online_preference': "learns from rankings of the model's own responses",
  'policy_gradient': 'learns from the reward of its own responses (policy gradients)',
  'ppo': 'learns from the reward of its own responses (proximal policy optimisation)',
}

GLOSSARY = (
  ('held out', 'prompts that no stage was trained on'),
  ('baseline', 'the model that all others are compared with'),
  (
    'wins',
    'how often a response of the model is judged better than one of the baseline to the same '
    'prompt; a tie counts half, so two equal models win 50%',
  ),
  ('by substance', 'what is said counts, but not how politely or fully it is put'),
  (
    'controlled',
    'the wins that would remain if both models wrote equally long and in the same style',
  ),
  (
    '95% interval',
    'where the figure lies with other prompts of this kind, 19 times in 20; wins whose interval '
    'has 50% inside show no difference',
  ),
  ('sampled, greedy', 'words drawn by their probabilities; or the likeliest word every time'),
  ('utility', 'how good the judge finds a response; only differences have a meaning'),
  ('reward', 'the score that training optimises, of a reward model or a function'),
  (
    'KL',
    'how far the model has moved from its reference: the mean, over its responses, of the log of '
    'how much likelier it makes them (nats); 0 is not at all. √KL is its square root',
  ),
  (
    'over-optimised',
    'the reward still rises while the judge, who knows better, likes the responses less',
  ),
  ('log-probability', "the log of a token's probability; 0 is certain, −2.3 is one in ten"),
  ('advantage', 'how much better a token turned out than the value model expected'),
  ('entropy', 'how undecided the model is about the next token, in nats'),
)


def describe_stages(names_and_kinds: list[tuple[str, str]]) -> list[tuple[str, str]]:
  """Returns (name, what it does) of every stage whose kind is known."""
  return [(name, STAGES[kind]) for name, kind in names_and_kinds if kind in STAGES]
