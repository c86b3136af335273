"""A notebook as a page: its text, its code, and what the code gave when it was run."""

import json
from pathlib import Path
from typing import Any


def notebook_page(path: Path) -> str:
    """Markdown of a notebook; pictures stand in the page itself."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        is_bash = source.startswith("%%bash\n")
        parts.append(_block("bash" if is_bash else "python", source.removeprefix("%%bash\n")))
        parts += [shown for output in cell["outputs"] if (shown := _output(output))]
    return "\n\n".join(parts) + "\n"


def _output(output: dict[str, Any]) -> str:
    if output["output_type"] == "stream":
        return _block("text", "".join(output["text"]))
    picture = output["data"].get("image/png")
    if picture is not None:
        return f"![what the code above draws](data:image/png;base64,{''.join(picture).strip()})"
    return _block("text", "".join(output["data"]["text/plain"]))


def _block(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"
