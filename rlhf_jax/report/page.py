"""Puts the page together: one run in full, or several beside each other."""

import base64
from collections.abc import Mapping, Sequence
import datetime
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

import rlhf_jax
from rlhf_jax import plain_text
from rlhf_jax.report import about, curves, headline, samples, tables, words
from rlhf_jax.report.headline import Headline, Sentence
from rlhf_jax.report.run_files import Run

TEMPLATES = Path(__file__).parent / 'templates'
MAX_TRANSCRIPTS = 12


def render_run(run: Run, is_followed: bool = False) -> str:
  """Renders the page of one run.

  Args:
    run: what it has left.
    is_followed: whether the page loads itself again every few seconds.
  """
  models = samples.final_rows(run.responses, 'sampled')
  names = [name for name in run.results.get('models') or {} if name in models]
  main = [name for name in names if name != run.baseline]
  best: list[samples.Case] = []
  worst: list[samples.Case] = []
  if main and run.baseline in models:
    best, worst = samples.best_and_worst(models, main[-1], run.baseline)
  groups = {run.name: [run]}  # of one run, without a band
  return _render(
    'run.html',
    title=run.name,
    headline=headline.write_headline(run),
    run=run,
    tables=tables.make_tables(run, is_full=False),
    full_tables=tables.make_tables(run, is_full=True),
    table_text=run.results.get('table', ''),
    by_kind=tables.make_kinds(run.results),
    curves=curves.draw_curves(groups),
    frontier=curves.draw_frontier(groups),
    distributions=curves.draw_distributions(run),
    cases=samples.side_by_side(models, names, run.baseline),
    main=main[-1] if main else '',
    best=best,
    worst=worst,
    histories=_find_histories(run),
    mistakes=_find_mistakes(run),
    bought=run.results.get('downstream') or {},
    agreement=run.results.get('reward_agreement') or {},
    steps=words.describe_stages([(stage.name, stage.kind) for stage in run.stages]),
    tokens=samples.token_views(run.responses),
    transcripts=_list_transcripts(run),
    durations=about.list_durations(run),
    changes=about.list_changes(run.sessions.get('defaults') or {}, run.config)
    if run.sessions.get('defaults')
    else None,
    checkpoints=about.list_checkpoints(run),
    session=_last_session(run),
    is_followed=is_followed,
  )


def render_comparison(runs: Sequence[Run], is_followed: bool = False) -> str:
  """Renders the page of several runs; those that differ in their seed only are one group.

  Args:
    runs: at least two.
    is_followed: whether the page loads itself again every few seconds.
  """
  groups = group_runs(runs)
  return _render(
    'comparison.html',
    title='Comparison of ' + ', '.join(groups),
    headline=_compare_groups(groups),
    groups=groups,
    rows=_list_rows(groups),
    curves=curves.draw_curves(groups),
    frontier=curves.draw_frontier(groups),
    differences=about.list_differences([own[0].config for own in groups.values()]),
    cases=_shared_cases(groups),
    durations={run.name: about.list_durations(run) for run in runs},
    checkpoints={run.name: about.list_checkpoints(run) for run in runs},
    sessions={run.name: _last_session(run) for run in runs},
    runs=runs,
    is_followed=is_followed,
  )


def _find_histories(run: Run) -> dict[str, list[samples.Case]]:
  """Returns the responses over time, by stage."""
  found = {stage.name: samples.histories(run.responses, stage.name) for stage in run.stages}
  return {name: cases for name, cases in found.items() if cases}


def _find_mistakes(run: Run) -> dict[str, list[samples.Case]]:
  """Returns the pairs that each reward model gets most wrong, by stage."""
  found = {stage.name: samples.reward_errors(run.responses, stage.name) for stage in run.stages}
  return {name: cases for name, cases in found.items() if cases}


def _list_transcripts(run: Run) -> dict[str, Sequence[Mapping[str, Any]]]:
  """Returns the critiques and revisions, by stage."""
  return {
    stage.name: stage.transcripts[:MAX_TRANSCRIPTS] for stage in run.stages if stage.transcripts
  }


def _last_session(run: Run) -> Mapping[str, Any]:
  """Returns how the run was started the last time; {} where that is not known."""
  sessions = run.sessions.get('sessions') or [{}]
  return sessions[-1]


# Several runs.


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
  """Groups runs whose configs differ in the seed only.

  Returns:
    Name → runs. A group of several is named after the first of them and its
    size.
  """
  by_config: dict[str, list[Run]] = {}
  for run in runs:
    # `seed` is the seed of all randomness; a data section's own seed may differ too.
    config = {key: value for key, value in run.config.items() if key != 'seed'}
    by_config.setdefault(json.dumps(config, sort_keys=True), []).append(run)
  groups: dict[str, list[Run]] = {}
  for own in by_config.values():
    name = own[0].name if len(own) == 1 else f'{own[0].name} ({len(own)} seeds)'
    while name in groups:  # folders of the same name
      name += '′'
    groups[name] = own
  return groups


def _compare_groups(groups: Mapping[str, Sequence[Run]]) -> Headline:
  """Says what each group has shown, seed by seed."""
  sentences = []
  for group, runs in groups.items():
    lines = []
    tones = set()
    for run in runs:
      own = headline.write_headline(run)
      lines.append(f'{own.title} (seed {run.config.get("seed")})')
      tones.add(own.tone)
    tone = tones.pop() if len(tones) == 1 else headline.OPEN
    sentences.append(Sentence(f'{group}: {"; ".join(lines)}.', tone))
  count = sum(map(len, groups.values()))
  return Headline(f'{count} runs, {len(groups)} configs', headline.OPEN, sentences)


def _list_rows(groups: Mapping[str, Sequence[Run]]) -> list[tables.Table]:
  """Makes the table of all groups: a row for each model, the mean over its seeds."""
  made = []
  for decoding in ('sampled', 'greedy'):
    averages: dict[str, dict[str, Any]] = {}
    for group, runs in groups.items():
      names = dict.fromkeys(name for run in runs for name in run.results.get('models') or {})
      for name in names:
        rows = [
          run.results['models'][name][decoding]
          for run in runs
          if decoding in (run.results.get('models') or {}).get(name, {})
        ]
        if rows:
          averages.setdefault(group, {})[name] = tables.average_rows(rows)
    every = [row for rows in averages.values() for row in rows.values()]
    if not every:
      continue
    # Each run has a baseline of its own.
    columns = tables.choose_columns(every, 'the baseline', is_full=False)
    shown = []
    for group, own_rows in averages.items():
      baseline = groups[group][0].baseline
      own = [
        tables.TableRow(name, [tables.make_cell(c, row) for c in columns], name == baseline)
        for name, row in own_rows.items()
      ]
      shown.append(tables.Group(group, own))
    made.append(tables.Table(decoding, columns, shown))
  return made


def _shared_cases(groups: Mapping[str, Sequence[Run]]) -> list[samples.Case]:
  """Shows the last model of every group at prompts that all were asked."""
  columns: dict[str, Any] = {}
  for group, runs in groups.items():
    models = samples.final_rows(runs[0].responses, 'sampled')
    own = [name for name in runs[0].results.get('models') or {} if name in models]
    if own:
      columns[f'{group}: {own[-1]}'] = models[own[-1]]
  if len(columns) < 2:
    return []
  return samples.side_by_side(columns, list(columns), next(iter(columns)))


# Rendering.


def _render(template: str, **values: Any) -> str:
  """Renders a template. What models wrote is escaped, and so is what browsers would obey."""
  environment = _open_templates()
  script = (TEMPLATES / 'report.js').read_text(encoding='utf-8')
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  # The browser runs the script of this digest and no other, whatever a model wrote.
  now = datetime.datetime.now().astimezone()
  return environment.get_template(template).render(
    style=markupsafe.Markup((TEMPLATES / 'report.css').read_text(encoding='utf-8')),
    script=markupsafe.Markup(script),  # both are files of this package
    script_digest=digest,
    written=now.isoformat(' ', 'minutes'),
    version=rlhf_jax.__version__,
    glossary=words.GLOSSARY,
    **values,
  )


@functools.cache
def _open_templates() -> jinja2.Environment:
  """Opens the templates; every value is made harmless before it is escaped."""
  return jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATES),
    autoescape=True,
    undefined=jinja2.ChainableUndefined,  # a run of an older version lacks some things
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=_make_harmless,
  )


def _make_harmless(value: Any) -> Any:
  """Shows control characters and half surrogates as escapes; escaping itself comes after it."""
  if isinstance(value, str) and not isinstance(value, markupsafe.Markup):
    return plain_text.visible(value)
  return value
