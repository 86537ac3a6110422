"""report.html: the table, a picture of the run, and answers side by side; one file that opens anywhere."""

import base64
import html
import io
import json
from pathlib import Path

CURVES = (  # title, metric names of which the first found is drawn
    ('loss', ('loss',)), ('held-out', ('eval/loss', 'eval/accuracy', 'eval/reward/score')),
    ('score', ('reward/score',)), ('KL to SFT, nats', ('kl',)))


def read_metrics(directory: Path) -> list[dict]:
  """The lines of a stage's metrics.jsonl; none where there is no such file."""
  path = Path(directory) / 'metrics.jsonl'
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_transcripts(directory: Path, count: int = 20) -> list[dict]:
  """The first critiques and revisions of a stage, from its transcripts.jsonl; none where there is no such file."""
  path = Path(directory) / 'transcripts.jsonl'
  return [json.loads(line) for line in path.read_text().splitlines()[:count]] if path.exists() else []


def picture(stages: dict[str, list[dict]], models: dict[str, dict]) -> bytes:
  """A PNG: a panel for each stage's curve, and the rates of every model as bars."""
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot
  panels = []
  for name, lines in stages.items():
    for title, keys in CURVES:
      key = next((key for key in keys if any(key in line for line in lines)), None)
      if key and not (title == 'loss' and any('reward/score' in line for line in lines)):
        panels.append((f'{name}: {title}', key, [line for line in lines if key in line]))
  rates = [key for key in ('helpful', 'honest', 'harmless', 'win_rate_vs_sft')
           if any(key in values for values in models.values())]
  columns = 4
  rows = -(-(len(panels) + 1) // columns)
  figure, axes = pyplot.subplots(rows, columns, figsize=(16, 3.2 * rows), squeeze=False)
  for axis, (title, key, lines) in zip(axes.flat[1:], panels):
    axis.plot([line['step'] for line in lines], [line[key] for line in lines], marker='.' if len(lines) < 30 else '')
    axis.set_title(title)
    axis.set_xlabel('step')
    axis.grid(alpha=0.3)
  for axis in axes.flat[len(panels) + 1:]:
    axis.set_visible(False)
  bars = axes.flat[0]
  for number, (name, values) in enumerate(models.items()):
    places = [place + number * 0.8 / len(models) for place in range(len(rates))]
    bars.bar(places, [100 * values.get(key, 0) for key in rates], 0.8 / len(models), label=name)
  bars.set_xticks([place + 0.4 - 0.4 / len(models) for place in range(len(rates))],
                  [key.removesuffix('_vs_sft').replace('_', ' ') for key in rates])
  bars.set_title('held-out prompts, %')
  if models:
    bars.legend()
  figure.tight_layout()
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=80)
  pyplot.close(figure)
  return buffer.getvalue()


def page(title: str, table: str, image: bytes, answers: dict[str, list], prompts: list[str],
         transcripts: dict[str, list]) -> str:
  """The report as HTML.

  Args:
    answers: model → a text for each prompt.
    prompts: the first few of the held-out prompts.
    transcripts: stage → conversations with critiques and revisions, as stages.critique writes them.
  """
  escape = lambda text: html.escape(text).replace('\n', '<br>')
  head = ''.join(f'<th>{escape(name)}</th>' for name in ('prompt', *answers))
  body = ''.join('<tr>' + ''.join(f'<td>{escape(cell)}</td>' for cell in (prompt, *(a[i] for a in answers.values())))
                 + '</tr>' for i, prompt in enumerate(prompts))
  talks = ''.join(f'<h2>Critiques and revisions: {escape(name)}</h2>' + ''.join(_talk(row, escape) for row in rows)
                  for name, rows in transcripts.items() if rows)
  return f'''<!doctype html><meta charset="utf-8"><title>{escape(title)}</title>
<style>body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em }}
td, th {{ text-align: left; vertical-align: top; padding: .3em .8em; border-bottom: 1px solid #ddd }}
pre {{ overflow-x: auto; background: #f6f6f6; padding: 1em }} img {{ max-width: 100% }}</style>
<h1>{escape(title)}</h1><pre>{html.escape(table)}</pre>
<img alt="training curves and rates" src="data:image/png;base64,{base64.b64encode(image).decode()}">
<h2>Answers to held-out prompts</h2><table><tr>{head}</tr>{body}</table>
{talks}'''


def _talk(row, escape):
  """A conversation, to be unfolded: what was said at first, and for each round the critique and the revision."""
  said = [('prompt', row['messages'][-1]['content']), ('answer', row['response'])]
  for number, one in enumerate(row['rounds'], 1):
    said += [(f'{number}: {one["critique_request"]}', one['critique']),
             (f'{number}: {one["revision_request"]}', one['revision'])]
  lines = ''.join(f'<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>' for name, text in said)
  return f'<details><summary>{escape(row["messages"][-1]["content"])}</summary><table>{lines}</table></details>\n'
