"""How commands speak: what was asked for on standard output, everything else on standard error."""

from rich.console import Console

console = Console(stderr=True)
"""Standard error: notes, progress, errors."""


def say(sentence: str) -> None:
    """Writes a note as it is, on one line however long."""
    console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def new_results(width: int = 110) -> Console:
    """Standard output, at least ``width`` characters wide: a wide table is read by scrolling, not cut off."""
    results = Console(highlight=False)
    results.width = max(results.width, width)
    return results
