"""The page: controls on one side, both sides of the comparison on the other."""

from __future__ import annotations

import base64
import html
import io
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from calib_guidance.app.session import CONFIGURED, Comparison, Session, Settings, Trajectory
from calib_guidance.errors import first_line

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # the page asks for nothing from anywhere

import gradio as gr

_LABELS = {
    CONFIGURED: "of the configuration",
    "tempered": "log-probability",
    "entropy": "entropy-regularized",
    "fkl": "forward KL",
    "rkl": "reverse KL",
    "js": "Jensen–Shannon",
    "hellinger": "Hellinger",
    "tilted": "tilted over these samples",
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "dpm_solver": "DPM-Solver++",
    "dpm_solver_sde": "SDE-DPM-Solver++",
    "flow_ode": "flow ODE (Heun)",
    "flow_sde": "flow SDE",
    "unipc": "UniPC",
}
_WIDTH, _HEIGHT = 420, 200  # of a plot, in its own units
_LEFT, _BOTTOM, _TOP, _RIGHT = 44, 34, 10, 8


def _choices(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(_LABELS.get(name, name), name) for name in names]


def _uri(image: np.ndarray) -> str:
    """A uint8 image ``(C, H, W)`` as ``data:`` address."""
    buffer = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _percent(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.0%}"


def _side(title: str, side: Trajectory, names: Sequence[str]) -> str:
    sharp = " cg-sharp" if side.images.shape[-1] < 64 else ""
    samples = [
        f'<div><img class="cg-image{sharp}" src="{_uri(image)}" alt="{title}, class {name}">'
        f"<p>{name} <span>{_percent(confidence)}</span></p></div>"
        for image, name, confidence in zip(side.images, map(html.escape, names), side.confidence[-1], strict=True)
    ]
    return f'<section><h3>{title}</h3><div class="cg-images">{"".join(samples)}</div></section>'


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over samples ``(steps,)``, NaN where the classifier did not run."""
    return np.array([row.mean() for row in values])


def _plot(title: str, about: str, unguided: np.ndarray, guided: np.ndarray, t: np.ndarray, top: float | None) -> str:
    """An SVG of two lines over the steps, from noise to image; it takes its colors from the page."""
    lines = {"unguided": _mean(unguided), "guided": _mean(guided)}
    finite = np.concatenate([line[np.isfinite(line)] for line in lines.values()])
    high = top or (float(finite.max()) if finite.size and finite.max() > 0 else 1.0)
    x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * (np.arange(len(t)) / max(len(t) - 1, 1))
    floor = _HEIGHT - _BOTTOM

    def y(value: Any) -> Any:
        return floor - (floor - _TOP) * value / high

    parts = []
    for fraction in (0, 0.5, 1):
        place, label = y(fraction * high), f"{fraction * high:.2g}"
        parts.append(f'<line class="cg-grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{label}</text>')
    for k, anchor in ((0, "start"), (len(t) // 2, "middle"), (len(t) - 1, "end")):
        parts.append(f'<text x="{x[k]:.1f}" y="{floor + 16}" text-anchor="{anchor}">{t[k]:.0f}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">diffusion step t (noise → image)</text>')
    for name, line in lines.items():
        there = np.isfinite(line)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x[there], y(line[there]), strict=True))
        parts.append(f'<polyline class="cg-{name}" points="{points}"/>')
    legend = '<span class="cg-key cg-unguided">unguided</span><span class="cg-key cg-guided">guided</span>'
    ends = "; ".join(f"{name} ends at {line[-1]:.3g}" for name, line in lines.items())
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}: {ends}">{"".join(parts)}</svg>'
    return f'<section><h3>{title}</h3><p class="cg-about">{about} {legend}</p>{svg}</section>'


def render(comparison: Comparison, settings: Settings, class_names: Sequence[str]) -> str:
    """Both sides, what the classifier said along the trajectory, and the command, as HTML."""
    names = [class_names[label] for label in settings.classes]
    unguided, guided, t = comparison.unguided, comparison.guided, comparison.t
    label = _LABELS.get(settings.score, settings.score)
    sides = _side("Unguided", unguided, names) + _side(f"Guided: {label}, scale {settings.scale:g}", guided, names)
    plots = _plot("Gradient norm", "mean ‖∇S‖", unguided.gradient_norm, guided.gradient_norm, t, None) + _plot(
        "Confidence", "mean probability of the class", unguided.confidence, guided.confidence, t, 1.0
    )
    about = (
        f"{len(names)} samples on each side from the same noise, {comparison.nfe} NFE each, in {comparison.seconds:.1f} s. "
        "Below each sample: its class, and the guiding classifier's confidence in it."
    )
    command = html.escape(comparison.command)
    return (
        f'<div class="cg"><div class="cg-pair">{sides}</div><p class="cg-about">{about}</p><div class="cg-pair">{plots}</div>'
        f'<details><summary>The command that samples with these settings</summary><pre class="cg-command">{command}</pre>'
        "</details></div>"
    )


def build(session: Session) -> gr.Blocks:
    """The page of a session."""
    first = session.settings

    def sample(*values: Any, progress: Callable[..., None] = gr.Progress()) -> str:  # noqa: B008, where Gradio looks for it
        score, scale, tau2, smooth, beta, sampler, steps, seed, classes = values
        try:
            chosen = tuple(map(int, classes))
            beta = float(beta) if smooth else None
            settings = Settings(score, float(scale), float(tau2), beta, sampler, int(steps), int(seed or 0), chosen)
            tell = lambda done, count: progress((done, count), desc="sampling", unit="steps")  # noqa: E731
            return render(session.compare(settings, tell), settings, session.class_names)
        except (ValueError, RuntimeError) as error:
            raise gr.Error(first_line(error)) from error

    with gr.Blocks(title="calib_guidance", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown("## Classifier guidance, from the same noise")
        with gr.Row(elem_classes="cg-page"):
            with gr.Column(scale=1, min_width=280, elem_classes="cg-controls"):
                score = gr.Dropdown(_choices([*session.scores]), value=first.score, label="Score")
                scale = gr.Slider(0, max(5.0, 2 * first.scale), first.scale, step=0.05, label="Scale", elem_id="scale")
                tau2 = gr.Slider(0, 1.5, first.tau2, step=0.05, label="Temperature τ2")
                with gr.Row(visible=session.smooths):
                    smooth = gr.Checkbox(
                        first.softplus_beta is not None, label="Softplus for ReLU", min_width=100, scale=1
                    )
                    beta = gr.Slider(0.5, 20, first.softplus_beta or 3.0, step=0.5, label="β", min_width=130, scale=2)
                sampler = gr.Dropdown(_choices([*session.samplers]), value=first.sampler, label="Sampler")
                steps = gr.Slider(2, max(250, first.steps), first.steps, step=1, label="Steps")
                seed = gr.Number(first.seed, precision=0, minimum=0, label="Seed")
                classes = gr.Dropdown(
                    [(name, str(number)) for number, name in enumerate(session.class_names)],
                    value=[str(label) for label in first.classes],
                    multiselect=True,
                    label="Classes, one sample each",
                )
                with gr.Row():
                    run = gr.Button("Sample", variant="primary", min_width=100, elem_id="sample")
                    other = gr.Button("Other noise", min_width=100)
            with gr.Column(scale=3, min_width=300):
                shown = gr.HTML('<p class="cg-about">Choose settings, and press Sample.</p>', elem_id="comparison")
        controls = [score, scale, tau2, smooth, beta, sampler, steps, seed, classes]
        run.click(sample, controls, shown, show_progress="full")
        other.click(lambda: random.randrange(2**31), None, seed).then(sample, controls, shown)
        if session.is_quick:
            page.load(sample, controls, shown)
    return page


def launch(page: gr.Blocks, host: str, port: int | None, **options: Any) -> tuple[Any, str, str]:
    """Start serving a page, with its looks."""
    theme = gr.themes.Default(
        primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    return page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        theme=theme,
        css_paths=Path(__file__).with_name("page.css"),
        footer_links=[],
        ssr_mode=False,
        **options,
    )


def serve(session: Session, host: str, port: int | None, in_browser: bool) -> None:
    """Serve the page until the process is stopped."""
    page = build(session)
    _, address, _ = launch(page, host, port, prevent_thread_lock=True, inbrowser=in_browser)
    print(f"the page is at {address}; Ctrl-C ends it", flush=True)
    page.block_thread()
