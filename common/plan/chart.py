"""A plan as a picture: what each choice costs, and what binds it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from salt_distill.common.plan.arithmetic import Choice, best

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _MUTED, _LINE = "#1c1c1a", "#6f6e69", "#dedcd5"
_STUDENTS, _TEACHER, _DISK = "#3266ad", "#cf6a32", "#8a8f3c"
NUM_LIMITS = 6
"""Of each choice, the tightest."""


def draw(choices: Sequence[Choice], path: str) -> None:
    """Writes a PNG: prices by part, and the limits of every choice with the one that binds filled."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained", facecolor="white")
    prices, limits = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _draw_prices(prices, choices)
    _draw_limits(limits, choices)
    figure.savefig(path, format="png", dpi=150)


def _draw_prices(axes: "Axes", choices: Sequence[Choice]) -> None:
    rows = range(len(choices))
    of_hour = [choice.gpu_price / choice.gpu_hours for choice in choices]
    parts = [
        (
            "students' GPUs",
            _STUDENTS,
            [c.student_gpu_hours * hour for c, hour in zip(choices, of_hour, strict=True)],
        ),
        (
            "teacher's GPUs",
            _TEACHER,
            [c.teacher_gpu_hours * hour for c, hour in zip(choices, of_hour, strict=True)],
        ),
        ("disk", _DISK, [choice.disk_price for choice in choices]),
    ]
    left = [0.0] * len(choices)
    for name, colour, values in parts:
        axes.barh(rows, values, left=left, height=0.55, color=colour, label=name)
        left = [before + value for before, value in zip(left, values, strict=True)]
    for row, choice in zip(rows, choices, strict=True):
        said = choice.refused or f"${choice.price:,.0f}, {choice.hours:,.0f} h"
        axes.annotate(
            said, (left[row], row), (5, 0), textcoords="offset points", va="center", color=_INK, fontsize=9
        )
    names = [
        f"{c.name}, {c.replicas} replica{'s' if c.replicas > 1 else ''}" if c.replicas else c.name
        for c in choices
    ]
    axes.set_yticks(rows, names)
    for label, choice in zip(axes.get_yticklabels(), choices, strict=True):
        label.set_fontweight("bold" if choice is best(choices) else "normal")
    axes.set_xlim(0, 1.7 * max(left) or 1)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=5)
    axes.set_title("price in dollars", fontsize=10, color=_INK, loc="left")
    axes.legend(
        frameon=False,
        labelcolor=_INK,
        fontsize=9,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.1),
        ncols=len(parts),
    )
    _quiet(axes)


def _draw_limits(axes: "Axes", choices: Sequence[Choice]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    row, ticks, names = 0, [], []
    for choice in choices:
        for limit in sorted(choice.limits, key=lambda limit: limit.clips_per_s)[:NUM_LIMITS]:
            binds = limit is choice.binding
            axes.plot(
                limit.clips_per_s,
                row,
                "o",
                markersize=7,
                color=_TEACHER,
                markerfacecolor=_TEACHER if binds else "white",
            )
            ticks.append(row)
            names.append(f"{choice.name}: {limit.what}")
            row += 1
        row += 1
    axes.set_yticks(ticks, names)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title(
        "clips/s of a run that each part allows; filled: binds", fontsize=10, color=_INK, loc="left"
    )
    _quiet(axes)


def _quiet(axes: "Axes") -> None:
    """Only what carries information: a light grid across the values, no frame, the first row on top."""
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x", color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, labelsize=9, length=0)
    axes.tick_params(axis="y", labelcolor=_INK)
    axes.invert_yaxis()
