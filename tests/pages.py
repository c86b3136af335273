"""The pages of this repository, taken apart: code, links, headings, command lines."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = tuple(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "recipes/*.md", "deploy/**/*.md")
    for path in sorted(ROOT.glob(pattern))
)
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(`+)(.+?)\1", re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_ENDS = {"|", "||", "&&", ";", ">", ">>", "2>", "&"}
"""Words of a shell line that end a command."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    """Of the page, where it begins."""
    language: str
    text: str

    @property
    def place(self) -> str:
        """For a message."""
        return f"{self.page}:{self.line}"


def text_of(page: str) -> str:
    """A page as it stands."""
    return (ROOT / page).read_text()


def blocks(page: str, language: str | None = None) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = text_of(page)
    found = [
        Block(
            page,
            text.count("\n", 0, match.start()) + 1,
            match[2],
            re.sub(f"^{match[1]}", "", match[3], flags=re.M),
        )
        for match in _FENCE.finditer(text)
    ]
    return [block for block in found if language in (None, block.language)]


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", text_of(page))


def spans(page: str) -> list[str]:
    """The code in the sentences of a page, on one line each."""
    return [" ".join(match[2].replace("\\|", "|").split()) for match in _SPAN.finditer(prose(page))]


def links(page: str) -> list[str]:
    """Where the links and pictures of a page lead, addresses of other hosts left out."""
    text = _SPAN.sub("", prose(page))
    found = [match[1] or match[2] for match in _LINK.finditer(text)]
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(page: str) -> set[str]:
    """What ``#...`` may follow the name of a page: its headings, as a forge names them."""
    names = set[str]()
    for heading in _HEADING.findall(_FENCE.sub("", text_of(page))):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        names.add(re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-"))
    return names


def command_lines(script: str) -> Iterator[list[str]]:
    """The words of each command of a shell script, without variables that are set before it and comments."""
    for line in script.replace("\\\n", " ").splitlines():
        yield from commands_of_line(line)


def commands_of_line(line: str) -> Iterator[list[str]]:
    """The words of each command of one line."""
    words: list[str] = []
    for word in [*shlex.split(line, comments=True), ";"]:
        if word in _ENDS or word.endswith(";"):
            words += [word.rstrip(";")] if word not in _ENDS else []
            if words:
                yield words
            words = []
        elif words or not re.fullmatch(r"\w+=.*", word, re.DOTALL):
            words.append(word)
