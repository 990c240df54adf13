"""Charts of the report as data URIs: drawn by matplotlib without a display, in a light and a dark suit."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Theme:
    """Colours of one colour scheme; the page behind the charts shows through."""

    text: str
    muted: str
    grid: str
    series: tuple[str, ...]
    heat: str


LIGHT = Theme(
    "#1d2433", "#667085", "#e3e6ec", ("#2f6fde", "#d9662b", "#1f9d76", "#8a56d1", "#b8860b"), "magma"
)
DARK = Theme(
    "#e6e9f0", "#98a2b3", "#323a49", ("#7aa7ff", "#ff9d6b", "#5fd3a9", "#c19bff", "#e8c15a"), "magma"
)


@dataclass(frozen=True)
class Picture:
    """One chart in both suits, as data URIs, with a description for those who cannot see it."""

    light: str
    dark: str
    description: str


def data_uri(data: bytes, mime: str = "") -> str:
    """Bytes as a data URI; the type of a PNG or JPEG is recognised."""
    kind = mime or ("image/jpeg" if data[:2] == b"\xff\xd8" else "image/png")
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def training_curves(name: str, lines: Sequence[Mapping[str, Any]]) -> Picture | None:
    """Loss by step, with held-out recall beside it where it was logged; None without a loss."""
    loss = _series(lines, "loss")
    if not loss[0]:
        return None
    recalls = sorted(
        {key for line in lines for key in line if key.startswith("val/") and key.endswith("_r10")}
    )
    recalls = [key for key in recalls if "chance" not in key]
    drawn = {key: _series(lines, key) for key in recalls}
    # a single point is no curve, and the tables have it
    drawn = {key: series for key, series in drawn.items() if len(series[0]) > 1}

    def draw(theme: Theme) -> str:
        figure, axes = _figure(theme, 1 + bool(drawn), (4.6 if drawn else 9.2, 2.7))
        steps, values = loss
        smooth = smoothed(values)
        axes[0].plot(steps, values, color=theme.series[0], alpha=0.3, linewidth=1)
        axes[0].plot(steps, smooth, color=theme.series[0], linewidth=2)
        axes[0].set_title("contrastive loss", loc="left", fontsize=10, color=theme.text)
        if drawn:
            for number, (key, series) in enumerate(drawn.items()):
                colour = theme.series[number % len(theme.series)]
                label = key.removeprefix("val/").removesuffix("_r10").replace("/", " ")
                axes[1].plot(*series, color=colour, linewidth=2, label=label)
            axes[1].set_title("held-out R@10", loc="left", fontsize=10, color=theme.text)
            axes[1].legend(frameon=False, fontsize=8, labelcolor=theme.text)
            axes[1].set_ylim(bottom=0)
        for axis in axes:
            axis.set_xlabel("step", color=theme.muted, fontsize=9)
        return _svg(figure)

    first, last = loss[1][0], loss[1][-1]
    return Picture(draw(LIGHT), draw(DARK), f"{name}: loss from {first:.3f} to {last:.3f}")


def smoothed(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Exponential moving average over about `share` of the run, unbiased at the start."""
    keep = max(0.0, 1 - 1 / max(1.0, share * len(values)))
    result: list[float] = []
    total = weight = 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(total / weight)
    return result


def recall_bars(
    labels: Sequence[str], series: Mapping[str, Sequence[float]], chance: Sequence[float], description: str
) -> Picture:
    """Grouped bars in percent: one group per label, one bar per series, chance as a dashed line."""

    def draw(theme: Theme) -> str:
        figure, axes = _figure(theme, 1, (9.2, 2.8))
        axis = axes[0]
        width = 0.8 / max(1, len(series))
        centre = np.arange(len(labels))
        for number, (name, values) in enumerate(series.items()):
            place = centre + (number - (len(series) - 1) / 2) * width
            # a later series is what the earlier ones are compared with: the strongest colour
            colour = theme.series[0] if number == len(series) - 1 else theme.muted
            alpha = 1.0 if number == len(series) - 1 else 0.35 + 0.35 * number / max(1, len(series) - 1)
            bars = axis.bar(
                place, [100 * v for v in values], width * 0.92, color=colour, alpha=alpha, label=name
            )
            axis.bar_label(bars, fmt="%.1f", fontsize=8, color=theme.text, padding=2)
        for number, value in enumerate(chance):
            axis.plot(
                [number - 0.45, number + 0.45],
                [100 * value] * 2,
                color=theme.series[1],
                linestyle="--",
                linewidth=1.5,
                label="chance" if number == 0 else None,
            )
        axis.set_xticks(centre, labels)
        axis.set_ylabel("%", color=theme.muted, fontsize=9)
        axis.margins(y=0.16)
        axis.legend(
            frameon=False, fontsize=8, labelcolor=theme.text, ncols=1, loc="upper left", bbox_to_anchor=(1, 1)
        )
        return _svg(figure)

    return Picture(draw(LIGHT), draw(DARK), description)


def heat_map(values: npt.NDArray[np.float32], kind: str) -> Picture:
    """Similarity of texts (rows) and images (columns); right pairs lie on the diagonal."""

    def draw(theme: Theme) -> str:
        figure, axes = _figure(theme, 1, (4.4, 3.9))
        axis = axes[0]
        low, high = np.percentile(values, [1, 99.8])
        drawn = axis.imshow(values, cmap=theme.heat, vmin=low, vmax=high, interpolation="nearest")
        axis.grid(False)
        axis.set_xlabel("images", color=theme.muted, fontsize=9)
        axis.set_ylabel(f"{kind} captions", color=theme.muted, fontsize=9)
        bar = figure.colorbar(drawn, ax=axis, fraction=0.045, pad=0.03)
        bar.outline.set_visible(False)
        bar.ax.tick_params(colors=theme.muted, labelsize=8, length=0)
        return _svg(figure)

    size = len(values)
    right = float(np.diagonal(values).mean())
    wrong = float((values.sum() - np.trace(values)) / max(1, values.size - size))
    return Picture(
        draw(LIGHT),
        draw(DARK),
        f"{kind} captions: mean similarity {right:.2f} with the own image, {wrong:.2f} with others",
    )


def lines_over(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], across: str, up: str, description: str
) -> Picture:
    """Lines with points over a logarithmic axis: name -> (places, values)."""

    def draw(theme: Theme) -> str:
        figure, axes = _figure(theme, 1, (9.2, 2.8))
        axis = axes[0]
        for number, (name, (places, values)) in enumerate(series.items()):
            colour = theme.series[number % len(theme.series)]
            axis.plot(places, values, color=colour, linewidth=2, marker="o", markersize=4, label=name)
        axis.set_xscale("log")
        axis.set_xlabel(across, color=theme.muted, fontsize=9)
        axis.set_ylabel(up, color=theme.muted, fontsize=9)
        axis.legend(
            frameon=False, fontsize=8, labelcolor=theme.text, ncols=1, loc="upper left", bbox_to_anchor=(1, 1)
        )
        return _svg(figure)

    return Picture(draw(LIGHT), draw(DARK), description)


def _series(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [
        (int(line["step"]), float(line[key]))
        for line in lines
        if isinstance(line.get(key), (int, float))
        and isinstance(line.get("step"), int)
        and math.isfinite(line[key])
    ]
    return [step for step, _ in points], [value for _, value in points]


def _figure(theme: Theme, panels: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    # not pyplot: it keeps global state and may look for a display
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * panels, size[1]), layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0)
    axes = [figure.add_subplot(1, panels, number + 1) for number in range(panels)]
    for axis in axes:
        axis.patch.set_alpha(0)
        axis.grid(True, axis="y", color=theme.grid, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(colors=theme.muted, labelsize=8, length=0)
        for side in axis.spines.values():
            side.set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    buffer = io.BytesIO()
    # text as outlines: looks the same everywhere; no date: equal results give equal files
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "llm2clip"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return data_uri(buffer.getvalue(), "image/svg+xml")
