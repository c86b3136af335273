"""What the site has beyond the pages of docs/: the reference, pages of other folders, and links
that work on a forge too."""

import posixpath
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

from notebook import notebook_page  # noqa: E402
from reference import reference_pages  # noqa: E402

ELSEWHERE = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md")
"""Pages outside docs/ that the site shows too."""
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made here."""
    made = {path: (ROOT / path).read_text() for path in ELSEWHERE} | reference_pages()
    made["first-hour.md"] = notebook_page(ROOT / "docs" / "first-hour.ipynb")
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with links between pages as the site has them; one to a file that the site does not show
    becomes its text."""
    path = page.file.src_uri
    folder = posixpath.dirname(path if path in ELSEWHERE else f"docs/{path}")

    def on_site(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        file, _, anchor = target.partition("#")
        in_repository = posixpath.normpath(posixpath.join(folder, file))
        if not (ROOT / in_repository).exists():
            raise PluginError(f"{path}: got a link to {target}, which is no file of the repository")
        shown = in_repository.removeprefix("docs/")
        if files.get_file_from_path(shown) is None:
            return text
        relative = posixpath.relpath(shown, posixpath.dirname(path) or ".")
        return f"{mark}[{text}]({relative}{'#' if anchor else ''}{anchor})"

    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [_LINK.sub(on_site, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _LINK.sub(on_site, markdown[end:])])
