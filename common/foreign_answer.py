"""What a server that is none of ours answers, in a few words."""

import re

_LONGEST = 200
"""Characters that are shown."""
_TITLE = re.compile(r"<title[^>]*>(.*?)</title>", re.IGNORECASE | re.DOTALL)


def is_web_page(content: bytes) -> bool:
    """Whether it is HTML, which no route for programs answers."""
    return content.lstrip()[:1] == b"<"


def in_words(content: bytes) -> str:
    """A web page by its title, all else as it begins; one line."""
    text = content.decode(errors="replace")
    if is_web_page(content):
        title = _TITLE.search(text)
        return "a web page" + (f" with the title {_one_line(title[1])!r}" if title else "")
    return _one_line(text) or "nothing more"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_LONGEST]
