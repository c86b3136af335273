"""Files that appear whole or not at all, for who reads them while they are written."""

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Makes a file of a text, in place of one of that name; its folder too. Not for what must outlive a power
    cut: nothing is synced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
