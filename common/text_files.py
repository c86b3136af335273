"""Text files that people give to a command."""

from pathlib import Path


def read_text(path: str | Path) -> str:
    """What is in it. Raises ValueError that names the file where it is not UTF-8, OSError where it cannot be
    read."""
    data = Path(path).read_bytes()
    if b"\0" in data[:1000]:
        raise ValueError(f"{path}: got a file that is no text, expected text in UTF-8: give another file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        got = data[error.start : error.start + 1]
        raise ValueError(
            f"{path}, line {line}: got the byte {got!r}, expected text in UTF-8: save the file as UTF-8"
        ) from None
