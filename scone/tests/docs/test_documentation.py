"""Every code block of the documentation runs or says why not; commands, options and links in it exist.

That the site builds without warnings is checked by `make docs`, which continuous integration runs.
"""

from __future__ import annotations

import importlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from scone.cli import VERBS
from scone.configs.schema import entries
from scone.tests.docs.blocks import REPOSITORY, Block, blocks_of, pages, run, script_of

pytestmark = pytest.mark.skipif(
    not (REPOSITORY / "mkdocs.yml").exists(), reason="an installed package has no documentation"
)
# In the order in which a reader would: the tutorial makes what the guides use. Pages that are not named here are of
# fixed commands (README.md: the same as those that scone/tests/scripts runs) and are checked by parsing.
RUN = (
    *("docs/tutorial.md", "docs/how-to/large-table.md", "docs/how-to/read-a-report.md", "docs/how-to/sweeps.md"),
    *("docs/how-to/tracking.md", "docs/how-to/retrofit.md", "docs/how-to/several-gpus.md", "docs/how-to/spark.md"),
    *("docs/how-to/own-training-loop.md", "docs/how-to/packed-data.md", "docs/how-to/compile.md"),
    *("docs/how-to/azure.md", "docs/how-to/container.md", "docs/index.md", "docs/robustness.md"),
)
ALL_BLOCKS = [block for page in pages() for block in blocks_of(page)] if (REPOSITORY / "mkdocs.yml").exists() else []
_LINK = re.compile(r"\[[^\]\n]+\]\((?P<target>[^)\s]+)\)")


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCONE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


@pytest.mark.slow
def test_every_block_of_tutorial_and_guides_runs_or_says_why_not(workspace: Path) -> None:
    ran = 0
    for page in RUN:
        names: dict[str, object] = {"__name__": "__main__"}
        for block in blocks_of(REPOSITORY / page):
            if not block.reason:
                run(block, workspace, names)
                ran += 1
    assert ran > 10
    assert (workspace / "outputs" / "tutorial" / "embeddings.int8").exists()


@pytest.mark.parametrize("block", ALL_BLOCKS, ids=str)
def test_every_command_of_ours_is_understood(block: Block, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags and values of every documented command are read by the command's own parser, run or not."""
    monkeypatch.chdir(REPOSITORY)  # where configs/ is
    if block.language == "yaml":
        assert yaml.safe_load(block.text) is not None
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "python":
        compile(block.text.replace("…", "..."), str(block), "exec")
    else:
        for command in block.commands():
            script, arguments = script_of(command.split(" | ")[0]) or ("", [])
            if script == "table":
                assert arguments[0] == "convert"
            elif script and "…" not in arguments:
                importlib.import_module(f"scone.scripts.{script}").read_arguments(arguments)


def test_links_lead_somewhere() -> None:
    broken = []
    for page in [*pages(), *REPOSITORY.glob("*.md")]:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for match in _LINK.finditer(text):
            target, _, anchor = match["target"].partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            path = (page.parent / target) if target else page
            if not path.exists():
                broken.append(f"{page.name}: {match['target']}")
            elif anchor and path.suffix == ".md" and anchor not in anchors(path):
                broken.append(f"{page.name}: no heading for {match['target']}")
    assert not broken


def test_tables_are_those_of_the_results() -> None:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "fill_tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-500:]


def test_the_readme_stays_short_and_every_decision_has_a_status_and_states_itself() -> None:
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
    for path in (REPOSITORY / "docs" / "decisions").glob("*.md"):
        title, blank, stated, *_ = path.read_text(encoding="utf-8").splitlines()
        assert title.startswith(f"# {int(path.name[:4])}. "), path.name
        assert not blank, path.name
        assert re.fullmatch(r"\*Status: [^*]+\.\* .{20,}", stated), path.name


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and the site give the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading)).strip().lower() for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def test_the_reference_has_every_option_and_command() -> None:
    reference = runpy.run_path(str(REPOSITORY / "docs" / "reference.py"))
    made = reference["pages"]()
    for name, entry in entries().items():
        assert f"| `{name}` | `--{entry.flag}` |" in made["reference/options.md"], name
    for verb in VERBS:
        text = made["reference/commands.md"].partition(f"## `scone {verb}`\n")[2]
        assert text.lstrip("\n`tex").startswith("usage: "), verb
    for names in reference["API"].values():
        for name in names:
            assert f"## `{name}`" in made["reference/python.md"]
