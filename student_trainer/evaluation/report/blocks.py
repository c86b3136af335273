"""What the report's page is made of; the template writes each kind as HTML."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Paragraph:
    """Sentences."""

    kind: ClassVar[str] = "paragraph"
    text: str
    quiet: bool = False
    """Small and grey."""


@dataclass(frozen=True)
class CommandLine:
    """What is typed in a terminal, under what it makes."""

    kind: ClassVar[str] = "command"
    caption: str
    parts: Sequence[str]
    """Between which a line may break."""


@dataclass(frozen=True)
class Heading:
    """A title inside a section."""

    kind: ClassVar[str] = "heading"
    title: str


@dataclass(frozen=True)
class DataTable:
    """Plain text cells."""

    kind: ClassVar[str] = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class NamedBar:
    """A row of a table that ends in a bar."""

    name: str
    text: str
    """The value, for people."""
    value: float


@dataclass(frozen=True)
class BarTable:
    """A table whose rows end in a bar."""

    kind: ClassVar[str] = "bars"
    header: tuple[str, str]
    bars: Sequence[NamedBar]

    @property
    def most(self) -> float:
        """The value of a bar that is as long as the column."""
        return max(bar.value for bar in self.bars) or 1


@dataclass(frozen=True)
class LargeNumbers:
    """Large numbers with their meaning under them."""

    kind: ClassVar[str] = "facts"
    facts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Chart:
    """An SVG element of ours, whose text is escaped already."""

    kind: ClassVar[str] = "chart"
    svg: str


@dataclass(frozen=True)
class Picture:
    """A picture under its caption."""

    kind: ClassVar[str] = "picture"
    data_uri: str
    caption: str
    full_size: bool = False
    """Never made smaller than it is; scrolls where the page is narrower."""


@dataclass(frozen=True)
class Columns:
    """Blocks side by side, as far as the page is wide enough."""

    kind: ClassVar[str] = "columns"
    columns: Sequence[Sequence["Block"]]


@dataclass(frozen=True)
class ColourKey:
    """What the colours of the pictures mean."""

    kind: ClassVar[str] = "key"
    colours: Sequence[tuple[tuple[int, int, int], str]]


Block = (
    Paragraph
    | CommandLine
    | Heading
    | DataTable
    | BarTable
    | LargeNumbers
    | Chart
    | Picture
    | Columns
    | ColourKey
)


@dataclass(frozen=True)
class Section:
    """A titled part of the page."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True, kw_only=True)
class ReportPage:
    """The whole page."""

    title: str
    lead: Sequence[str]
    """Paragraphs under the title."""
    made: str
    """When, and by what."""
    sections: Sequence[Section]
    footer: str
