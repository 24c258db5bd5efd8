"""The demo's report: one HTML file with curves, a transcript, times and versions.

It asks for nothing from outside. The curves are SVG, drawn by matplotlib.
"""

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib import figure

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem; text-align: left; }
tr:nth-child(even) { background: #f3f3f3; } pre { background: #f3f3f3; padding: .8rem;
white-space: pre-wrap; } svg { width: 100%; height: auto; }
"""
Curve = tuple[str, Sequence[float], Sequence[float]]


def draw_curves(panels: Sequence[tuple[str, str, Sequence[Curve]]]) -> str:
    """Return an <svg> element with a panel for each (title, unit of y, curves).

    A curve is its label, its steps and its values.
    """
    settings = {"svg.fonttype": "none", "svg.hashsalt": "m1", "font.size": 9}
    with matplotlib.rc_context(settings):
        drawing = figure.Figure(figsize=(10, 3.2 * ((len(panels) + 1) // 2)), layout="constrained")
        for number, (title, unit, curves) in enumerate(panels, 1):
            axes = drawing.add_subplot((len(panels) + 1) // 2, 2, number)
            for label, steps, values in curves:
                axes.plot(steps, values, label=label, marker="o" if len(steps) < 20 else "")
            axes.set(title=title, xlabel="step", ylabel=unit)
            axes.grid(alpha=0.3)
            axes.legend()
        buffer = io.StringIO()
        drawing.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    # Inside of HTML neither prologue nor metadata have a place.
    return re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)


def make_page(
    summary: Sequence[str],
    svg: str,
    transcript: Sequence[tuple[str, str]],
    step_secs: Mapping[str, float],
    versions: Mapping[str, Any],
) -> str:
    """Return the report as HTML.

    Args:
      summary: one sentence a line.
      svg: the curves, from `draw_curves`.
      transcript: (prompt, answer) pairs.
      step_secs: seconds of each step by its title.
      versions: versions by name.
    """
    secs = {title: f"{value:.1f}" for title, value in step_secs.items()}
    secs["all steps"] = f"{sum(step_secs.values()):.1f}"
    texts = "".join(
        f"<p><b>{html.escape(prompt)}</b></p><pre>{html.escape(answer)}</pre>"
        for prompt, answer in transcript
    )
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in summary)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>m1_jax: the demo</title>
<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body>
<h1>A tiny MiniMax-M1, through every step</h1>
<p>1.5 million parameters, random at first. It is converted, checked, trained on text, tuned on sums
of which half are wrong, and then rewarded for right answers.</p>
<ul>{lines}</ul>
<h2>Curves</h2>
{svg}
<p>Held-out loss is the mean over the same 20 stories each time. Correlation is that of the
probabilities that the sampler and the trainer give to sampled tokens.</p>
<h2>Answers after reinforcement learning</h2>{texts}
<h2>Seconds</h2>{_make_table(secs)}
<h2>Versions</h2>{_make_table(versions)}
</body></html>
"""


def _make_table(rows: Mapping[str, Any]) -> str:
    cells = (
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in rows.items()
    )
    return f"<table>{''.join(cells)}</table>"
