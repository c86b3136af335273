"""The images of a folder in the order of the frames that they are."""

import re
from collections.abc import Iterable
from pathlib import Path

from salt_distill.common.clip import BadVideoError
from salt_distill.common.data.skipped import printable
from salt_distill.common.data.stills import IMAGE_SUFFIXES

_NUMBER = re.compile(r"(\d+)")


def frame_names(names: Iterable[str]) -> list[str]:
    """The names that are images, ordered by all of their numbers. What macOS writes beside files (``._*``) is
    left out. Raises BadVideoError where the names do not tell the order."""
    images = sorted(
        name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("._")
    )
    if not images:
        raise BadVideoError("it is a folder without images, expected a file or a folder of frames")
    pieces = {name: _NUMBER.split(Path(name).stem) for name in images}
    by_number: dict[tuple[int, ...], str] = {}
    for name in images:
        numbers = tuple(int(number) for number in pieces[name][1::2])
        if not numbers:
            raise BadVideoError(
                f"its image {printable(name)} has no number, expected all of them to be numbered frames"
            )
        if numbers in by_number:
            raise BadVideoError(
                f"its images {printable(by_number[numbers])} and {printable(name)} have the same number"
            )
        by_number[numbers] = name
    first = images[0]
    for name in images:
        if _text(pieces[name]) != _text(pieces[first]):
            raise BadVideoError(
                f"its images {printable(first)} and {printable(name)} differ in more than their numbers:"
                " that leaves their order open"
            )
        if _fraction_widths(pieces[name]) != _fraction_widths(pieces[first]):
            raise BadVideoError(
                f"its images {printable(first)} and {printable(name)} have numbers of other lengths behind a"
                " point: as fractions or as numbers they have another order"
            )
    return [by_number[numbers] for numbers in sorted(by_number)]


def _text(pieces: list[str]) -> list[str]:
    """What stands between the numbers of a name."""
    return [text.casefold() for text in pieces[0::2]]


def _fraction_widths(pieces: list[str]) -> list[int]:
    """The digits of each number that stands behind another one and a point."""
    return [len(pieces[place]) for place in range(3, len(pieces), 2) if pieces[place - 1] == "."]
