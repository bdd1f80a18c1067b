"""Size and shape of the repository: lines and files of every package, import circles, imports that go upward.

python benchmarks/house.py            (in a worktree of an older commit too, for the figures before a change)
"""

from __future__ import annotations

import sys
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "scone"
sys.path.insert(0, str(ROOT))

from scone.tests.test_architecture import ALLOWED, FILES, imported  # noqa: E402


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def import_circles() -> list[list[str]]:
    """Files that import one another, in functions and for type checkers too; ``scone`` itself only names its parts."""
    modules = {module_of(path): path for path in FILES if path.parent != PACKAGE}
    graph = nx.DiGraph()
    for module, path in modules.items():
        for name in imported(path):
            while name and name not in modules:
                name = name.rpartition(".")[0]
            if name and name != module:
                graph.add_edge(module, name)
    return [sorted(circle) for circle in nx.strongly_connected_components(graph) if len(circle) > 1]


def upward_imports() -> list[str]:
    """Imports of a package that stands above the importing one."""
    found = set()
    for path in FILES:
        own = path.relative_to(PACKAGE).parts[0]
        for other in {name.split(".")[1] for name in imported(path) if name.startswith("scone.")} & set(ALLOWED):
            if other not in ALLOWED.get(own, ALLOWED) and other != own:
                found.add(f"{module_of(path)} -> {other}")
    return sorted(found)


def show(name: str, paths: list[Path]) -> None:
    lines = sum(len(path.read_bytes().splitlines()) for path in paths)
    print(f"{name:28}{len(paths):6} files{lines:8,} lines")


if __name__ == "__main__":
    for package in ALLOWED:
        show(f"scone/{package}", [path for path in FILES if PACKAGE / package in path.parents])
    show("scone, all without tests", FILES)
    show("scone/tests", list((PACKAGE / "tests").rglob("*.py")))
    show("benchmarks + experiments", [p for name in ("benchmarks", "experiments") for p in (ROOT / name).rglob("*.py")])
    print("import circles:", import_circles() or 0)
    print("upward imports:", upward_imports() or 0)
