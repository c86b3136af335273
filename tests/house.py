"""The house in numbers and as a map. `python tests/house.py map` writes the map into README.md and
CONTRIBUTING.md; `python tests/house.py table [FOLDER]` prints how a checkout is built."""

import ast
import functools
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("common", "teacher_server", "student_trainer")
PAGES = ("README.md", "CONTRIBUTING.md")
BEGIN, END = "<!-- map: made by `python tests/house.py map` -->", "<!-- end of the map -->"
REST = {
    "salt_distill": "The one name when installed: links to the folders above, and the public Python names.",
    "deploy": "The demo, clusters, containers, dashboards.",
    "docs": "Pages for users.",
    "benchmarks": "Measurements that the pages quote; the study.",
    "tests": "The tests, on real videos and at nano size.",
}
"""Folders that are no packages of their own."""


def folder_map(root: Path = ROOT) -> str:
    """The tree of folders with a sentence each, from the docstrings of the packages."""
    rows = []
    for room in ROOMS:
        for package in sorted(path.parent for path in (root / room).rglob("__init__.py")):
            docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
            depth = len(package.relative_to(root).parts) - 1
            rows.append((f"{'  ' * depth}{package.name}/", " ".join(docstring.split()).replace("``", "")))
    rows += [(f"{name}/", sentence) for name, sentence in REST.items() if (root / name).is_dir()]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:{width}}{sentence}" for name, sentence in rows)


def with_map(page: str, root: Path = ROOT) -> str:
    """A page with the map as it is now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n```text\n{folder_map(root)}\n```\n{END}{after}"


@functools.cache
def trees(root: Path = ROOT) -> dict[str, ast.Module]:
    """The modules of the three packages, and of the public names, by their paths."""
    paths = [path for room in ROOMS for path in sorted((root / room).rglob("*.py"))]
    paths += sorted((root / "salt_distill").glob("*.py"))  # below it are links to the rooms
    return {str(path.relative_to(root)): ast.parse(path.read_text()) for path in paths}


def imports(tree: ast.AST, *, lazy: bool) -> Iterator[str]:
    """The modules that one imports: at its top only, or wherever it does."""
    for node in _everywhere(tree) if lazy else _at_the_top(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif lazy and isinstance(node, ast.Constant) and isinstance(node.value, str) and ":" in node.value:
            module = node.value.partition(":")[0]
            if module.startswith("salt_distill.") and module.replace(".", "").isidentifier():
                yield module


@functools.cache
def _everywhere(tree: ast.AST) -> list[ast.AST]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom | ast.Constant)]


def _at_the_top(tree: ast.AST) -> Iterator[ast.stmt]:
    for node in getattr(tree, "body", []):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _at_the_top(node)


def graph(modules: dict[str, ast.Module], *, lazy: bool) -> dict[str, set[str]]:
    """Which files each file imports."""
    by_name = {}
    for path in modules:
        dotted = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        by_name |= {dotted: path, f"salt_distill.{dotted}": path}
    return {
        path: {by_name[name] for name in imports(tree, lazy=lazy) if name in by_name} - {path}
        for path, tree in modules.items()
    }


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Files that import each other in a circle; none where there is no circle."""
    done: set[str] = set()

    def visit(path: str, trail: list[str]) -> list[str]:
        if path in trail:
            return trail[trail.index(path) :]
        if path in done:
            return []
        for below in sorted(arrows[path]):
            if loop := visit(below, [*trail, path]):
                return loop
        done.add(path)
        return []

    return next((loop for path in arrows if (loop := visit(path, []))), [])


def folders_of(arrows: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Which folder imports from which."""
    return {
        (str(Path(path).parent), str(Path(below).parent))
        for path, belows in arrows.items()
        for below in belows
        if Path(path).parent != Path(below).parent
    }


def hops(arrows: dict[str, set[str]], start: str, end: str) -> int:
    """The fewest imports from one file to another, those of functions and of commands too."""
    reached, number = {start}, 0
    while end not in reached:
        reached, number = reached.union(*(arrows[path] for path in reached)), number + 1
        assert number < 50, f"{start} never comes to {end}"
    return number


def functions(modules: dict[str, ast.Module]) -> Iterator[tuple[int, str]]:
    """Lines and name of every function."""
    for path, tree in modules.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield (node.end_lineno or 0) - node.lineno + 1, f"{path}: {node.name}"


def untyped(root: Path = ROOT) -> dict[str, int]:
    """How often each file says ``dict[str, Any]``."""
    counts = {path: (root / path).read_text().count("dict[str, Any]") for path in trees(root)}
    return {path: count for path, count in counts.items() if count}


def twice(modules: dict[str, ast.Module]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Names of public classes, and of modules, that several files have."""
    classes: dict[str, list[str]] = defaultdict(list)
    names: dict[str, list[str]] = defaultdict(list)
    for path, tree in modules.items():
        names[Path(path).stem].append(path)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes[node.name].append(path)
    return (
        {name: paths for name, paths in classes.items() if len(paths) > 1},
        {name: paths for name, paths in names.items() if len(paths) > 1},
    )


def table(root: Path) -> dict[str, object]:
    """What a checkout's three packages are like."""
    modules = trees(root)
    arrows = graph(modules, lazy=True)
    lengths = {path: len((root / path).read_text().splitlines()) for path in modules}
    classes, names = twice(modules)
    return {
        "files": len(modules),
        "lines": sum(lengths.values()),
        "folders": len({str(Path(path).parent) for path in modules}),
        "arrows between folders": len(folders_of(arrows)),
        "arrows between files": sum(map(len, arrows.values())),
        "longest file": max((length, path) for path, length in lengths.items()),
        "longest function": max(functions(modules)),
        "functions over 50 lines": sum(length > 50 for length, _ in functions(modules)),
        "dict[str, Any]": sum(untyped(root).values()),
        "public class names that stand twice": len(classes),
        "module names that stand twice": len(names.keys() - {"__init__", "cli"}),
        "imports from salt-train to the module of forward": hops(
            arrows, "student_trainer/cli.py", "student_trainer/salt.py"
        ),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["map"]:
        for page in PAGES:
            (ROOT / page).write_text(with_map((ROOT / page).read_text()))
    else:
        print(json.dumps(table(Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT), indent=2))
