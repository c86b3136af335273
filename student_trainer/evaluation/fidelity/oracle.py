"""A number from outside, and whether ours is the same."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from typing import Any

PAPER = "arXiv:2509.24317"
VJEPA2 = "V-JEPA 2's code"
"""facebookresearch/vjepa2 at c2963a4, read and run on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a found value agrees with the expected one, and in what sense."""

    holds: bool
    words: str


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """One fact of the method that a source gives. Made by ``exact``, ``near`` or ``printed``."""

    name: str
    source: str
    expected: Any
    """As the source says it."""
    find: Callable[[], Any]
    """Computes ours."""
    judge: Callable[[Any, Any], Verdict]
    """From the expected and the found value."""
    show: Callable[[Any], str]
    """How a value is written."""
    differs: str | None = None
    """Why ours is meant to be another number. None: it is not."""

    @property
    def verdict(self) -> Verdict:
        """Of ours."""
        return self.judge(self.expected, self.find())


def exact(name: str, source: str, expected: Any, find: Callable[[], Any]) -> Oracle:
    """A value that ours equals."""

    def judge(expected: Any, found: Any) -> Verdict:
        return Verdict(holds=found == expected, words="equal" if found == expected else "differs")

    return Oracle(name=name, source=source, expected=expected, find=find, judge=judge, show=_plain)


def near(
    name: str,
    source: str,
    expected: float | Sequence[float],
    find: Callable[[], Any],
    *,
    within: float,
    relative: bool = False,
    digits: int = 3,
) -> Oracle:
    """A number, or several, from which ours is at most ``within`` away (``relative``: a share of it).
    ``digits``: decimals shown."""

    def judge(expected: float | Sequence[float], found: float | Sequence[float]) -> Verdict:
        pairs = zip(_several(expected), _several(found), strict=True)
        error = max(abs(ours - theirs) / (abs(theirs) if relative else 1) for theirs, ours in pairs)
        allowed = f"{100 * within:g} %" if relative else f"{within:g}"
        return Verdict(
            holds=error <= within,
            words=f"within {allowed}" if error <= within else f"more than {allowed} off",
        )

    def show(value: float | Sequence[float]) -> str:
        numbers = [f"{number:.{digits}f}" for number in _several(value)]
        return " ".join(numbers if len(numbers) <= 8 else [*numbers[:3], "...", numbers[-1]])

    return Oracle(name=name, source=source, expected=expected, find=find, judge=judge, show=show)


def printed(
    name: str,
    source: str,
    expected: str,
    find: Callable[[], float],
    *,
    unit: str = "",
    within: float = 0.0,
    differs: str | None = None,
) -> Oracle:
    """A figure as it was printed: ours rounds to it, or is it when cut to its digits, or is at most the share
    ``within`` of it off."""

    def judge(expected: str, found: float) -> Verdict:
        figure, ours = Decimal(expected), Decimal(found)
        if ours.quantize(figure, ROUND_HALF_UP) == figure:
            return Verdict(holds=True, words="rounded")
        if ours.quantize(figure, ROUND_DOWN) == figure:
            return Verdict(holds=True, words="cut")
        ratio = found / float(expected)
        words = f"{100 * (ratio - 1):+.2f} %" if 0.5 < ratio < 2 else f"{ratio:.2g} times"
        return Verdict(holds=abs(ratio - 1) <= within, words=words)

    decimals = len(expected.partition(".")[2])

    def show(value: float | str) -> str:
        number = value if isinstance(value, str) else f"{value:.{max(decimals + 1, 3)}f}"
        return f"{number} {unit}".rstrip()

    return Oracle(
        name=name, source=source, expected=expected, find=find, judge=judge, show=show, differs=differs
    )


def _several(value: float | Sequence[float]) -> Sequence[float]:
    return value if isinstance(value, Sequence) else [value]


def _plain(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, tuple | list):
        return ", ".join(map(_short, value))
    return str(value)


def _short(value: Any) -> str:
    """A member of a sequence; a size such as (5, 6) becomes 5x6."""
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
