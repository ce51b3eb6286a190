"""Diagrams as inline SVG, in the colors of the page."""

from __future__ import annotations

import ast
import html
import re
import textwrap
from pathlib import Path

from docstrings import as_markdown

ROOT = Path(__file__).parents[2]
WIDTH, LINE, PAD = 430, 17, 9
# Top floor first.
GROUPS = {
    "commands": ("app", "experiments", "cli", "report"),
    "Lightning": ("callbacks", "tasks"),
    "measurement, data, files": ("evaluation", "plots", "data", "runs"),
    "metrics and losses": ("metrics", "training"),
    "the method": ("samplers", "guidance", "classifiers", "denoisers"),
    "foundations": ("weights", "networks", "backend", "scores", "diffusion"),
}
# What happens to a sample: where, and what.
PATH = (
    ("YAML and options", "--config digits --model.guidance.scale 2"),
    ("cli/configs.py", "finds files by name, puts the files named by base: before them"),
    ("cli/lightning.py", "checks options, builds denoiser, sampler, guidance, data and callbacks"),
    ("data/requests.py", "claims a shard, gives batches of index, label and seed"),
    ("tasks/predict.py", "makes the noise of each (seed, index), runs the sampler"),
    ("samplers/base.py", "the loop over noise levels, from pure noise to the image:"),
    ("callbacks/sample_writer.py", "rounds to uint8, writes samples/00000000.parquet, then the record of the shard"),
    ("callbacks/, report/", "metrics, plots and report.html of the complete run"),
)
LOOP = (
    ("denoisers/", "x̂0 of x_t; rules and negatives combine predictions"),
    ("classifiers/", "logits of x̂0 (or of x_t and t)"),
    ("scores/", "S(logits, y)"),
    ("guidance/", "s·∇S, with schedule and stabilizer"),
    ("samplers/NAME.py", "Transition(mean, std); the loop draws x′ = mean + std·z"),
)


def _svg(parts: list[str], height: float, title: str) -> str:
    body = "".join(parts)
    marker = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8"/></marker></defs>'
    )
    return f'<svg class="diagram" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{title}">{marker}{body}</svg>'


def _box(x: float, y: float, width: float, name: str, about: str) -> tuple[str, float]:
    """A box with a name and what it does, and its lower edge."""
    lines = textwrap.wrap(about, int((width - 2 * PAD) / 6.1))
    height = 2 * PAD + LINE * (1 + len(lines)) - 3
    text = [f'<text class="name" x="{x + PAD}" y="{y + PAD + 12}">{html.escape(name)}</text>']
    for number, line in enumerate(lines, 1):
        text.append(f'<text class="small" x="{x + PAD}" y="{y + PAD + 12 + LINE * number}">{html.escape(line)}</text>')
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4"/>' + "".join(text), y + height


def architecture() -> str:
    """The folders of the package, a floor each, with the first line of their docstrings."""
    floors = re.search(r'FLOORS = """(.*?)"""', (ROOT / "tests/test_architecture.py").read_text(), re.DOTALL)[1].split()
    drawn = [folder for group in GROUPS.values() for folder in group]
    if drawn != floors[::-1]:
        raise ValueError(f"the folders of docs/site/diagrams.py are {drawn}, those of the package {floors[::-1]}")
    parts, y = [], 4.0
    for group, folders in GROUPS.items():
        top, inner = y, []
        y += 20
        for folder in folders:
            tree = ast.parse((ROOT / "calib_guidance" / folder / "__init__.py").read_text())
            about = as_markdown(ast.get_docstring(tree)).splitlines()[0].replace("`", "")
            box, y = _box(10, y, WIDTH - 20, folder, about)
            inner.append(box)
            y += 5
        y += 3
        frame = f'<rect class="group" x="2" y="{top}" width="{WIDTH - 4}" height="{y - top}" rx="6"/>'
        parts += [frame, f'<text class="small" x="12" y="{top + 15}">{group}</text>', *inner]
        y += 8
    return _svg(parts, y, "Folders of the package, from commands down to foundations")


def sample_path() -> str:
    """The path of a sample, from YAML to bytes."""
    parts, y = [], 2.0
    for number, (name, about) in enumerate(PATH):
        if number:
            parts.append(f'<path d="M{WIDTH / 2} {y} v16" marker-end="url(#tip)"/>')
            y += 18
        box, bottom = _box(2, y, WIDTH - 4, name, about)
        if name == "samplers/base.py":
            inner, bottom = [], bottom + 2
            for each in LOOP:
                part, bottom = _box(26, bottom, WIDTH - 52, *each)
                inner.append(part)
                bottom += 6
            box = re.sub(r'height="[\d.]+"', f'height="{bottom - y}"', box, count=1) + "".join(inner)
        parts.append(box)
        y = bottom
    return _svg(parts, y + 4, "The path of a sample from YAML to bytes")


DRAWN = {"diagram: architecture": architecture, "diagram: sample path": sample_path}
