"""What the source files import, read from their syntax trees: also inside functions and under TYPE_CHECKING."""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("jobs", "pipeline", "vitcop")


def modules() -> dict[str, Path]:
    """All modules of the product by dotted name; a package stands for its `__init__.py`."""
    files = [path.relative_to(ROOT) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(file.with_suffix("").parts).removesuffix(".__init__"): ROOT / file for file in files}


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names that a file imports. `from a.b import c` counts as `a.b.c`, whether c is a module or not.

    Raises:
        ValueError: a relative import, of which the product has none.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.module is None or node.level:
                raise ValueError(f"{path}, line {node.lineno}: import by the full name")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def top_level(path: Path) -> set[str]:
    """The top-level packages among `imports`."""
    return {name.split(".")[0] for name in imports(path)}


def edges() -> dict[str, set[str]]:
    """The modules of the product that each of them imports. What a package's face hands on counts as the face."""
    known = modules()
    return {
        name: {target for each in imports(path) if (target := _module(each, known)) and target != name}
        for name, path in known.items()
    }


def _module(name: str, known: dict[str, Path]) -> str | None:
    """The module that a dotted name means: itself, or the one it is a name in."""
    return name if name in known else parent if (parent := name.rpartition(".")[0]) in known else None


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of two or more that reach each other; that a module imports a package it stands in does not count."""
    graph = {name: {to for to in targets if not name.startswith(f"{to}.")} for name, targets in graph.items()}
    reached = {name: _reachable(name, graph) for name in graph}
    groups = {frozenset({name} | {to for to in reached[name] if name in reached[to]}) for name in graph}
    return [set(group) for group in groups if len(group) > 1]


def _reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    rest = [start]
    while rest:
        new = graph[rest.pop()] - seen
        seen |= new
        rest.extend(new)
    return seen
