"""The report of a run, report.html: the final table, plots, and responses side by side.

It is a single file that contains the plots, so it can be copied and opened anywhere.
"""

import base64
from collections.abc import Mapping, Sequence
import html
import io
from pathlib import Path
from typing import Any

from rlhf_jax import json_lines

CURVES = (  # (title, names of metrics); a panel shows the first of the metrics that the stage has
  ('loss', ('loss',)),
  ('held-out', ('eval/loss', 'eval/accuracy', 'eval/reward/score')),
  ('score', ('reward/score',)),
  ('KL to SFT, nats', ('kl',)),
)
RATES = (
  'helpful',
  'honest',
  'harmless',
  'win_rate_vs_sft',
)  # keys of the table that are drawn as bars
_COLUMNS = 4  # panels in a row
_GROUP_WIDTH = 0.8  # width of all bars of one rate; 1 is the distance between two rates

_Lines = Sequence[Mapping[str, Any]]  # the lines of a metrics.jsonl
_Panel = tuple[str, str, _Lines]  # (title, name of the metric, the lines that have it)

_PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>{style}</style>
<h1>{title}</h1><pre>{table}</pre>
<img alt="training curves and rates" src="data:image/png;base64,{image}">
<h2>Answers to held-out prompts</h2><table><tr>{head}</tr>{body}</table>
{talks}"""
_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1200px;
  padding: 0 1em }
td, th { text-align: left; vertical-align: top; padding: .3em .8em;
  border-bottom: 1px solid #ddd }
pre { overflow-x: auto; background: #f6f6f6; padding: 1em }
img { max-width: 100% }"""


def read_metrics(directory: str | Path) -> list[dict]:
  """Reads the metrics.jsonl in a stage's folder; returns [] where there is no such file."""
  return _read_json_lines(Path(directory) / 'metrics.jsonl')


def last_evaluation(rows: _Lines) -> dict[str, Any]:
  """Returns the values of a stage's last evaluation, with names without the prefix `eval/`.

  Args:
    rows: the lines of the stage's metrics.jsonl, from `read_metrics`.

  Returns:
    Name → value; empty if the stage has no evaluation.
  """
  for row in reversed(rows):
    values = {}
    for key, value in row.items():
      if key.startswith('eval/'):
        values[key.removeprefix('eval/')] = value
    if values:
      return values
  return {}


def read_transcripts(directory: str | Path, count: int = 20) -> list[dict]:
  """Reads the first critiques and revisions in the transcripts.jsonl of a stage."""
  return _read_json_lines(Path(directory) / 'transcripts.jsonl')[:count]


def _read_json_lines(path: Path) -> list[dict]:
  """Reads the values of a JSON Lines file; returns [] where there is no such file."""
  if not path.exists():
    return []
  return [row for _, row in json_lines.read_values(path)]


def draw_picture(
  stages: Mapping[str, _Lines],
  models: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> bytes:
  """Draws the rates of all models as bars, and then the stages' curves, in panels.

  Args:
    stages: name of a stage → the lines of its metrics.jsonl.
    models: title of a panel → name of a model → its row of the final table.

  Returns:
    The picture as PNG.
  """
  import matplotlib

  matplotlib.use('Agg')  # draws without a screen
  from matplotlib import pyplot

  panels = _choose_panels(stages)
  row_count = max(1, -(-(len(panels) + len(models)) // _COLUMNS))
  figure, axes = pyplot.subplots(row_count, _COLUMNS, figsize=(16, 3.2 * row_count), squeeze=False)
  bar_axes, curve_axes = axes.flat[: len(models)], axes.flat[len(models) :]
  for axis, (title, rows) in zip(bar_axes, models.items(), strict=True):
    _draw_bars(axis, title, rows)
  for axis, panel in zip(curve_axes, panels, strict=False):
    _draw_curve(axis, *panel)
  for axis in curve_axes[len(panels) :]:
    axis.set_visible(False)
  figure.tight_layout()
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=80)
  pyplot.close(figure)
  return buffer.getvalue()


def _choose_panels(stages: Mapping[str, _Lines]) -> list[_Panel]:
  """Chooses the panels to draw for each stage: those of CURVES for which it has a metric."""
  panels: list[_Panel] = []
  for name, lines in stages.items():
    for title, metrics in CURVES:
      present = [key for key in metrics if any(key in line for line in lines)]
      has_score = any('reward/score' in line for line in lines)
      # The loss of a policy-gradient stage does not tell how good the policy is.
      if not present or (title == 'loss' and has_score):
        continue
      metric = present[0]
      shown = [line for line in lines if metric in line]
      panels.append((f'{name}: {title}', metric, shown))
  return panels


def _draw_curve(axis: Any, title: str, metric: str, lines: _Lines) -> None:
  """Draws a metric over the steps."""
  steps = [line['step'] for line in lines]
  values = [line[metric] for line in lines]
  marker = '.' if len(lines) < 30 else ''  # a curve of few points shows them
  axis.plot(steps, values, marker=marker)
  axis.set_title(title)
  axis.set_xlabel('step')
  axis.grid(alpha=0.3)


def _draw_bars(axis: Any, title: str, models: Mapping[str, Mapping[str, Any]]) -> None:
  """Draws the rates of all models as bars side by side, with their 95% intervals."""
  rates = [key for key in RATES if any(key in row for row in models.values())]
  width = _GROUP_WIDTH / max(1, len(models))
  for number, (name, row) in enumerate(models.items()):
    places = [place + number * width for place in range(len(rates))]
    heights = [100 * row.get(key, 0) for key in rates]
    axis.bar(places, heights, width, label=name)
    for key, place in zip(rates, places, strict=True):
      if f'{key}_ci95' in row:
        interval = [100 * end for end in row[f'{key}_ci95']]
        axis.plot([place, place], interval, color='black', linewidth=1)
  middle = (_GROUP_WIDTH - width) / 2  # from the first bar's centre to that of the group
  names = [key.removesuffix('_vs_sft').replace('_', ' ') for key in rates]
  axis.set_xticks([place + middle for place in range(len(rates))], names)
  axis.set_title(f'{title}, %')
  axis.set_ylim(0, 125)  # room for the legend above the bars
  axis.set_yticks(range(0, 101, 20))
  if models:
    axis.legend(ncols=4, fontsize='small', loc='upper center')


def format_page(
  title: str,
  table: str,
  image: bytes,
  responses: Mapping[str, Sequence[str]],
  prompts: Sequence[str],
  transcripts: Mapping[str, Sequence[Mapping[str, Any]]],
) -> str:
  """Formats the report as HTML; texts of models are escaped.

  Args:
    title: the title of the page.
    table: the final table as aligned text.
    image: the picture, as PNG.
    responses: name of a model → its response to each of the prompts.
    prompts: the first few of the held-out prompts.
    transcripts: name of a stage → conversations with critiques and revisions, as
      stages.critique writes them.
  """
  head = ''.join(f'<th>{_escape(name)}</th>' for name in ('prompt', *responses))
  body = ''
  for place, prompt in enumerate(prompts):
    texts = [prompt, *(column[place] for column in responses.values())]
    cells = ''.join(f'<td>{_escape(text)}</td>' for text in texts)
    body += f'<tr>{cells}</tr>'
  talks = ''  # what the stages of kind `critique` wrote
  for name, rows in transcripts.items():
    if rows:
      talks += f'<h2>Critiques and revisions: {_escape(name)}</h2>'
      talks += ''.join(_format_talk(row) for row in rows)
  return _PAGE.format(
    title=_escape(title),
    style=_STYLE,
    table=html.escape(table),  # without <br>, because <pre> keeps line breaks
    image=base64.b64encode(image).decode(),
    head=head,
    body=body,
    talks=talks,
  )


def _escape(text: str) -> str:
  """Escapes a text for HTML, and keeps its line breaks."""
  return html.escape(text).replace('\n', '<br>')


def _format_talk(row: Mapping[str, Any]) -> str:
  """Formats a conversation with critiques as HTML that opens at a click.

  It shows the first response, and the critique and the revision of each round.
  """
  prompt = row['messages'][-1]['content']
  turns = [('prompt', prompt), ('response', row['response'])]
  for number, critique in enumerate(row['rounds'], start=1):
    critique_request = f'{number}: {critique["critique_request"]}'
    revision_request = f'{number}: {critique["revision_request"]}'
    turns.append((critique_request, critique['critique']))
    turns.append((revision_request, critique['revision']))
  cells = ''
  for name, text in turns:
    cells += f'<tr><th>{_escape(name)}</th><td>{_escape(text)}</td></tr>'
  summary = f'<summary>{_escape(prompt)}</summary>'
  return f'<details>{summary}<table>{cells}</table></details>\n'
