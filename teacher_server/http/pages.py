"""What people see in a browser: the status page, and the contract. Both load nothing from elsewhere."""

import base64
import hashlib
import html
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from fastapi.responses import HTMLResponse

_PAGE = Path(__file__).parent / "page" / "index.html"
_CODE = re.compile("``(.*?)``")
"""Code in a docstring."""
_SCRIPT = re.compile(r"<script>(.*?)</script>", re.S)

_DOCS = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style> :root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
summary {{ cursor: pointer; padding: .3rem 0; }} code, pre {{ font-size: 13px; }}
pre {{ background: #8881; padding: .6rem; overflow-x: auto; }} </style>
<h1>{title}, version {version}</h1> <p>The same for programs: <a href="openapi.json">openapi.json</a>. A body
that is JSON refuses unknown keys.</p> {routes} <h2>Bodies</h2> {bodies} </html>"""


def status_page() -> HTMLResponse:
    """``GET /``."""
    page, policy = _status_page()
    return HTMLResponse(page, headers={"Content-Security-Policy": policy})


def docs_page(openapi: dict[str, Any]) -> HTMLResponse:
    """``GET /docs``: the OpenAPI description of the service, readable."""
    routes = "\n".join(
        _details(f"{method.upper()} {path}", operation.get("summary", ""), operation)
        for path, operations in openapi["paths"].items()
        for method, operation in operations.items()
    )
    bodies = "\n".join(
        _details(name, " ".join(schema.get("description", "").split("\n\n")[0].split()), schema)
        for name, schema in openapi["components"]["schemas"].items()
    )
    info = openapi["info"]
    page = _DOCS.format(
        title=html.escape(info["title"]), version=html.escape(info["version"]), routes=routes, bodies=bodies
    )
    return HTMLResponse(page, headers={"Content-Security-Policy": _policy("")})


def _details(name: str, summary: str, described: dict[str, Any]) -> str:
    described_json = html.escape(json.dumps(described, indent=2))
    readable = _CODE.sub(r"<code>\1</code>", html.escape(summary))
    return (
        f"<details><summary><code>{html.escape(name)}</code> {readable}</summary>"
        f"<pre>{described_json}</pre></details>"
    )


@cache
def _status_page() -> tuple[str, str]:
    page = _PAGE.read_text()
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in _SCRIPT.findall(page)
    ]
    return page, _policy(f"script-src {' '.join(hashes)}; ")


def _policy(scripts: str) -> str:
    return (
        f"default-src 'none'; {scripts}style-src 'unsafe-inline'; img-src 'self' data:; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
