"""The shape of the code: imports go one way, nothing heavy at import, nothing that executes data, no file too long."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import scone

ROOT = Path(scone.__file__).parent
# what each package may import, besides itself
ALLOWED: dict[str, set[str]] = {"utils": set()}
for package, below in {
    "configs": ["utils"],
    "kernels": ["utils"],
    "tokenization": ["configs", "kernels"],
    "data": ["tokenization"],
    "models": ["tokenization"],
    "inference": ["data", "models"],
    "training": ["data", "models"],
    "evaluation": ["inference", "training"],
    "scripts": ["evaluation"],
    "vllm": ["inference"],
}.items():
    ALLOWED[package] = set(below).union(*(ALLOWED[name] for name in below))
FILES = sorted(path for path in ROOT.rglob("*.py") if "tests" not in path.relative_to(ROOT).parts)


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_imports_go_one_way():
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"} == set(ALLOWED)
    wrong = []
    for path in FILES:
        package, *below = path.relative_to(ROOT).parts
        used = {name.split(".")[1] for name in imported(path) if name.startswith("scone.")} & set(ALLOWED)
        if below:  # __init__.py and cli.py stand above all packages
            wrong += [f"{path}: {name}" for name in used if name != package and name not in ALLOWED[package]]
    assert not wrong


def test_nothing_heavy_at_import():
    """One process imports the light ones, then what servers read first: their workers must not wait for numba, and
    those of vLLM on CPUs fail where llvmlite was loaded before their model is.
    """
    heavy = ("torch", "transformers", "numba", "datasets", "matplotlib", "numpy")
    program = (
        "import sys\n"
        "import scone, scone.cli, scone.scripts.train, scone.configs.schema, scone.vllm\n"
        f"print([name for name in {heavy} if name in sys.modules])\n"
        "import scone.models.configuration, scone.vllm.checks\n"
        "print([name for name in ('numba', 'llvmlite', 'vllm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["[]", "[]", ""]


def test_no_code_from_data():
    """No pickle, no eval, no unsafe loads anywhere in the package."""
    forbidden = {"pickle", "dill", "marshal", "shelve", "joblib"}
    for path in FILES:
        assert not forbidden & imported(path), path
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), f"{path}:{node.lineno}"
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant), f"{path}:{node.lineno}"
                assert node.value.value is False, f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "yaml.load"):
                safe = [keyword for keyword in node.keywords if ast.unparse(keyword) == "weights_only=True"]
                assert safe, f"{path}:{node.lineno}: a load that may execute what it reads"


def test_files_that_are_no_code_are_packaged():
    """Else an installed package lacks them, which a checkout does not show."""
    project = ROOT.parent / "pyproject.toml"
    if not project.exists():
        pytest.skip("an installed package has no pyproject.toml")
    globs = tomllib.loads(project.read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    packaged = {path for package, names in globs.items() for name in names
                for path in (ROOT.parent / package.replace(".", "/")).glob(name)}  # fmt: skip
    code = (".py", ".pyc", ".nbi", ".nbc")
    there = {path for path in ROOT.rglob("*.*") if path.is_file() and path.suffix not in code}
    assert {path for path in there if "tests" not in path.relative_to(ROOT).parts} == packaged


def test_files_fit_in_a_head_and_say_what_they_are_for():
    assert not [path for path in FILES if len(path.read_text(encoding="utf-8").splitlines()) > 450]
    assert not [path for path in FILES if not ast.get_docstring(parsed(path))]
