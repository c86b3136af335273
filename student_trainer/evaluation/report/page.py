"""The report's HTML: one file, nothing loaded from outside, light or dark as the reader's system is."""

from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --bg: #fafaf8; --panel: #ffffff; --ink: #1d2327; --muted: #626c74; --line: #e1e5e6;
  --s0: #0f766e; --s1: #b45309; --s2: #4f46e5; --s3: #be185d; --s4: #4d7c0f; --s5: #0369a1; }
@media (prefers-color-scheme: dark) { :root { --bg: #131719; --panel: #1a1f22; --ink: #e4e8e9; --muted: #98a3aa; --line: #2b3236;
  --s0: #2dd4bf; --s1: #f5a83d; --s2: #a5b0fc; --s3: #f27fb5; --s4: #a8d85c; --s5: #5bc0f5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 44px 0 4px; }
h3 { font-size: 14px; margin: 22px 0 4px; color: var(--muted); font-weight: 600; }
p { margin: 4px 0 12px; max-width: 76ch; }
.note { color: var(--muted); font-size: 13.5px; }
.panel, .fact { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; }
.panel { padding: 14px 16px; margin: 10px 0 16px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { text-align: right; padding: 6px 9px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 2px; }
thead th { color: var(--muted); font-weight: 600; font-size: 12.5px; }
tbody tr:last-child td { border-bottom: 0; }
td.wide { width: 45%; }
.bar { height: 10px; border-radius: 2px; background: var(--s0); min-width: 1px; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(136px, 1fr)); gap: 10px; margin: 12px 0 16px; }
.fact { padding: 12px 14px; }
.fact b { display: block; font-size: 20px; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums; }
.fact span { color: var(--muted); font-size: 13px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 4px 24px; }
.columns > :only-child { max-width: calc(50% - 12px); min-width: min(100%, 420px); }
figure { margin: 10px 0; }
figcaption { color: var(--muted); font-size: 13px; margin: 0 0 5px; }
img { width: 100%; height: auto; display: block; image-rendering: pixelated; }
svg { width: 100%; height: auto; display: block; }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin: 0 5px -1px 12px; }
code { font: 13px ui-monospace, "DejaVu Sans Mono", monospace; }
footer { color: var(--muted); font-size: 13px; margin-top: 48px; border-top: 1px solid var(--line); padding-top: 12px; }
"""


def page(title: str, lead: str, sections: Sequence[str], footer: str) -> str:
    """The whole document; ``sections`` are HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n<p>{escape(lead)}</p>\n"
        + "\n".join(sections)
        + f"\n<footer>{escape(footer)}</footer>\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A titled part of the page; ``parts`` are HTML."""
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def text(sentences: str) -> str:
    """A paragraph."""
    return f"<p>{escape(sentences)}</p>"


def note(sentences: str) -> str:
    """A quiet paragraph."""
    return f'<p class="note">{escape(sentences)}</p>'


def heading(title: str) -> str:
    """A title inside a section."""
    return f"<h3>{escape(title)}</h3>"


def panel(html: str) -> str:
    """A box round a table or chart."""
    return f'<div class="panel">{html}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text cells."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return panel(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def bar_table(header: tuple[str, str], rows: Sequence[tuple[str, str, float]]) -> str:
    """A table whose rows end in a bar: name, value as text, value."""
    most = max(value for _, _, value in rows)
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(shown)}</td>"
        f'<td class="wide"><div class="bar" style="width:{100 * value / (most or 1):.1f}%"></div></td></tr>'
        for name, shown, value in rows
    )
    return panel(f"<table><thead><tr>{head}<th></th></tr></thead><tbody>{body}</tbody></table>")


def facts(items: Sequence[tuple[str, str]]) -> str:
    """Large numbers with their meaning under them."""
    return (
        '<div class="facts">'
        + "".join(
            f'<div class="fact"><b>{escape(number)}</b><span>{escape(meaning)}</span></div>'
            for number, meaning in items
        )
        + "</div>"
    )


def figure(data_uri: str, caption: str) -> str:
    """A picture under its caption."""
    return (
        f'<figure><figcaption>{escape(caption)}</figcaption><img src="{data_uri}"'
        f' alt="{escape(caption)}"></figure>'
    )


def columns(parts: Sequence[str]) -> str:
    """HTML parts side by side, as far as the page is wide enough."""
    return '<div class="columns">' + "".join(f"<div>{part}</div>" for part in parts) + "</div>"


def colour_key(items: Sequence[tuple[tuple[int, int, int], str]]) -> str:
    """What the colours of the pictures mean."""
    parts = [
        f'<span class="key" style="background:rgb{colour}"></span>{escape(meaning)}'
        for colour, meaning in items
    ]
    return f'<p class="note">{"".join(parts)}</p>'


def quantity(value: float, unit: str) -> str:
    """Three digits and a decimal prefix: 1.23 GB."""
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
