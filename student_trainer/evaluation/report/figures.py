"""Charts as inline SVG whose colours are CSS variables of the page, so that one chart serves light and
dark."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from salt_distill.student_trainer.evaluation.report.render import decimal_prefix
from salt_distill.student_trainer.evaluation.selection import NAMES, SelectResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _MUTED, _LINE = "#1d2327", "#626c74", "#e1e5e6"
_SERIES = ["#0f766e", "#b45309", "#4f46e5", "#be185d", "#4d7c0f", "#0369a1"]
_VARIABLES = {_INK: "var(--ink)", _MUTED: "var(--muted)", _LINE: "var(--line)"}
_VARIABLES |= {colour: f"var(--s{number})" for number, colour in enumerate(_SERIES)}
"""matplotlib knows only fixed colours: these, the page's light ones, stand for the page's variables, and are
replaced in the SVG."""
_DASHES = ["-", (0, (6, 2)), (0, (2.5, 1.5))]
"""Of a curve, of one that lies on it, and of further ones: all are seen."""
_MARKERS = "osD^vP"
_HIGHEST = 0.1
"""Share of a curve's losses, the highest, that may stand above the axis."""
_FEWEST_TO_CUT = 8
"""Points of a curve from which on its first ones may stand above the axis."""


@dataclass(frozen=True, kw_only=True)
class LossCurve:
    """The loss of a run."""

    name: str
    colour: int
    """Number of the run's colour, the same in every chart."""
    steps: Sequence[int]
    flops: Sequence[float]
    """Training compute up to each of ``steps``, its teacher's forwards included."""
    losses: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class LossChart:
    """Loss curves as SVG."""

    svg: str
    notes: Sequence[str]
    """Sentences about what cannot be seen in it."""


@dataclass(frozen=True, kw_only=True)
class AccuracyBar:
    """One accuracy with its 95% interval."""

    name: str
    colour: int | None
    """None: no run of this page (drawn muted)."""
    value: float
    interval: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class CostPoint:
    """A run's accuracy, with its 95% interval, and what it cost."""

    name: str
    colour: int | None
    """None: no run of this page (drawn muted)."""
    flops: float
    value: float
    interval: tuple[float, float]


def loss_curves(curves: Sequence[LossCurve], *, chart_id: str, loss_name: str) -> LossChart:
    """Losses that may be compared with each other, against steps and against training compute."""
    figure = _figure(9.2, 3.0)
    by_steps, by_flops = figure.subplots(1, 2, sharey=True)
    low, top = _loss_range(curves)
    size, prefix = decimal_prefix(max(curve.flops[-1] for curve in curves))
    within = 0.01 * (top - low)
    below = [
        [other for other in curves[:number] if _coincide(curve, other, within)]
        for number, curve in enumerate(curves)
    ]
    for curve, under in zip(curves, below, strict=True):
        is_wide = not under and any(curve in others for others in below)
        style = {
            "color": _SERIES[curve.colour % len(_SERIES)],
            "linewidth": 5 if is_wide else 1.8,
            "alpha": 0.4 if is_wide else 1,
            "linestyle": _DASHES[min(len(under), len(_DASHES) - 1)],
            "label": f"{curve.name} (on {under[0].name})" if under else curve.name,
            "marker": "o" if len(curve.losses) == 1 else None,
        }
        by_steps.plot(curve.steps, curve.losses, **style)
        by_flops.plot([flops / size for flops in curve.flops], curve.losses, **style)
    by_steps.set_xlabel("step")
    by_flops.set_xlabel(f"training compute in {prefix}FLOPs (6ND)")
    by_steps.set_ylabel(loss_name)
    above = [curve for curve in curves if max(curve.losses) > top]
    if above:
        by_steps.set_ylim(low - 0.05 * (top - low), top)
    for axes in (by_steps, by_flops):
        _quiet(axes, grid_axis="y")
    if len(curves) > 1:
        by_flops.legend(frameon=False, labelcolor=_INK, fontsize=9)
    notes = [f"Above the axis: {curve.name}, up to {max(curve.losses):.3g}." for curve in above]
    if any(below):
        notes.append("A dashed curve lies on a wide one: they are the same to 1% of the axis.")
    return LossChart(svg=_svg(figure, chart_id), notes=notes)


def _loss_range(curves: Sequence[LossCurve]) -> tuple[float, float]:
    """Ends of an axis on which the steps after the first ones fill the chart: without the highest tenth of
    the curves' losses, where these would take more than half of it. The status page does alike."""
    low, highest = (pick([pick(curve.losses) for curve in curves]) for pick in (min, max))
    high = max(float(np.quantile(curve.losses, 1 - _HIGHEST, method="lower")) for curve in curves)
    if max(len(curve.losses) for curve in curves) < _FEWEST_TO_CUT or highest - low <= 2 * (high - low):
        return low, highest
    return low, high + 0.08 * (high - low)


def _coincide(curve: LossCurve, other: LossCurve, within: float) -> bool:
    """Whether two curves cannot be told apart where both are."""
    losses = dict(zip(other.steps, other.losses, strict=True))
    apart = [
        abs(loss - losses[step])
        for step, loss in zip(curve.steps, curve.losses, strict=True)
        if step in losses
    ]
    return len(apart) > 1 and max(apart) <= within


def accuracy_bars(
    panels: Mapping[str, Sequence[AccuracyBar]], chance: Mapping[str, float], *, chart_id: str
) -> str:
    """A panel of horizontal bars for every label, with intervals and the chance level as a dashed line."""
    from matplotlib.ticker import MaxNLocator

    num_bars = max(len(bars) for bars in panels.values())
    figure = _figure(9.2, 0.9 + 0.34 * num_bars)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (label, bars) in zip(all_axes, panels.items(), strict=True):
        rows = range(len(bars))
        colours = [_MUTED if bar.colour is None else _SERIES[bar.colour % len(_SERIES)] for bar in bars]
        axes.barh(rows, [bar.value for bar in bars], height=0.62, color=colours)
        for row, bar in zip(rows, bars, strict=True):
            axes.plot(bar.interval, (row, row), color=_INK, linewidth=1.1, solid_capstyle="butt")
            axes.annotate(
                f"{bar.value:.2f}",
                (max(bar.interval[1], bar.value), row),
                (5, 0),
                textcoords="offset points",
                va="center",
                color=_INK,
                fontsize=9,
            )
        axes.axvline(chance[label], color=_INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        # Bars begin at 0; the longest interval leaves room for its number.
        axes.set_xlim(0, min(1.08, 1.2 * max(chance[label], *(bar.interval[1] for bar in bars))))
        axes.set_yticks(rows, [bar.name for bar in bars])
        axes.set_title(label, fontsize=10, color=_INK, loc="left")
        _quiet(axes, grid_axis="x")
        axes.tick_params(axis="y", length=0, labelcolor=_INK)
    all_axes[0].invert_yaxis()
    return _svg(figure, chart_id)


def pareto(points: Sequence[CostPoint]) -> list[CostPoint]:
    """The points that no other one beats: none costs as little or less and is better. In the order of their
    cost."""
    front: list[CostPoint] = []
    for point in sorted(points, key=lambda point: (point.flops, -point.value)):
        if not front or point.value > front[-1].value:
            front.append(point)
    return front


def accuracy_against_flops(panels: Mapping[str, Sequence[CostPoint]], *, chart_id: str) -> str:
    """A panel for every label: accuracy against training compute, with intervals and the Pareto front as a
    line (arXiv:2509.24317, Figure 1)."""
    figure = _figure(9.2, 3.2)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    size, prefix = decimal_prefix(max(point.flops for points in panels.values() for point in points))
    for axes, (label, points) in zip(all_axes, panels.items(), strict=True):
        front = pareto(points)
        axes.step(
            [p.flops / size for p in front],
            [p.value for p in front],
            where="post",
            color=_MUTED,
            linewidth=1.2,
            linestyle=(0, (4, 3)),
        )
        for number, point in enumerate(points):
            colour = _MUTED if point.colour is None else _SERIES[point.colour % len(_SERIES)]
            place = point.flops / size
            axes.plot((place, place), point.interval, color=colour, linewidth=1.1)
            marker = _MARKERS[number % len(_MARKERS)]
            axes.plot(place, point.value, marker, color=colour, markersize=6, label=point.name)
        axes.margins(x=0.12, y=0.15)
        axes.set_xlabel(f"training compute in {prefix}FLOPs (6ND)")
        axes.set_title(label, fontsize=10, color=_INK, loc="left")
        _quiet(axes, grid_axis="y")
    all_axes[0].set_ylabel("accuracy")
    # Names beside the points would lie on each other where runs cost the same.
    handles, names = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", frameon=False, labelcolor=_INK, fontsize=9)
    return _svg(figure, chart_id)


def accuracy_by_line(selection: SelectResults, colours: Mapping[str, int], *, chart_id: str) -> str:
    """Accuracy against what predicts it: every checkpoint, the line through those that were probed, and the
    95% interval of the others.

    ``colours``: of the runs. The selection has a line.
    """
    return _svg(_accuracy_by_line(selection, colours), chart_id)


def save_accuracy_by_line(selection: SelectResults, path: Path) -> None:
    """The same as a PNG."""
    runs = dict.fromkeys(point.run for point in selection.checkpoints)
    figure = _accuracy_by_line(selection, {name: number for number, name in enumerate(runs)})
    figure.axes[0].set_title(f"{selection.verdict} (open)", fontsize=10, color=_INK, loc="left")
    figure.savefig(path, dpi=110)


def _accuracy_by_line(selection: SelectResults, colours: Mapping[str, int]) -> "Figure":
    line = selection.line
    assert line is not None, "nothing is drawn without one"
    figure = _figure(9.2, 3.6)
    axes = figure.subplots()
    xs = [point.x for point in selection.checkpoints]
    room = 0.04 * (max(xs) - min(xs))
    ends = np.linspace(min(xs) - room, max(xs) + room, 60)
    centre, low, high = zip(*(line.predict(x) for x in ends), strict=True)
    axes.fill_between(ends, low, high, color=_MUTED, alpha=0.13, linewidth=0)
    axes.plot(ends, centre, color=_MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
    runs = dict.fromkeys(point.run for point in selection.checkpoints)
    run_colours = {
        name: _SERIES[colours[name] % len(_SERIES)] if name in colours else _MUTED for name in runs
    }
    for name, colour in run_colours.items():
        axes.plot([], [], "o", color=colour, markersize=6, label=name)
    for point in selection.checkpoints:
        colour, (value, *interval) = run_colours[point.run], line.predict(point.x)
        if point.accuracy is None:
            axes.plot((point.x, point.x), interval, color=colour, linewidth=1.1)
        axes.plot(
            point.x,
            value if point.accuracy is None else point.accuracy,
            "o",
            color=colour,
            markersize=6,
            markerfacecolor="none" if point.accuracy is None else colour,
        )
    axes.set_xlim(ends[0], ends[-1])
    bottom, top = axes.get_ylim()
    axes.set_ylim(
        max(bottom, -0.02), min(top, 1.02)
    )  # where few were probed, the interval knows nothing of what an accuracy can be
    axes.set_xlabel(f"{NAMES[selection.by]}, {selection.split} split")
    axes.set_ylabel(f"accuracy, {selection.label}")
    _quiet(axes, grid_axis="y")
    axes.legend(frameon=False, labelcolor=_INK, fontsize=9)
    return figure


def _figure(width_in: float, height_in: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, height_in), layout="constrained")


def _quiet(axes: "Axes", *, grid_axis: str) -> None:
    """Only what carries information: a light grid across the values, no frame."""
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.grid(axis=grid_axis, color=_LINE, linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, labelsize=9, length=0)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set(color=_MUTED, fontsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_offset_text().set(color=_MUTED, fontsize=9)


def _svg(figure: "Figure", chart_id: str) -> str:
    """The figure as an SVG element to stand inside HTML: own ids, the page's colours and font, nothing that
    points outside."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": chart_id}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 role="img"', text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = (
        text.replace('id="', f'id="{chart_id}-')
        .replace('href="#', f'href="#{chart_id}-')
        .replace("url(#", f"url(#{chart_id}-")
    )
    text = re.sub(r"<style.*?</style>|font-family:[^;\"]*;?", "", text, flags=re.DOTALL)
    for fixed, variable in _VARIABLES.items():
        text = text.replace(fixed, variable)
    return text
