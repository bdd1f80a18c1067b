"""Fixtures that several packages' tests need."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
from hypothesis import settings

# what continuous integration finds must be what was changed; new examples are searched for on developers' machines
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

# one thread a process: the tests run in several processes, and spinning threads of one slow the others down
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no processes that import PyTorch to compile one graph
os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")  # for one graph it costs more than it saves
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# processes of a test are forked from one that has imported what any of them needs
multiprocessing.set_forkserver_preload(["scone.training.run", "scone.tokenization.counting"])


# what accelerate, transformers and PyTorch's loader say of themselves in a run, and not of how we call models
OF_A_RUN = (
    "error:.*past_key_values:FutureWarning",
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
    "ignore:.*pin_memory.*:UserWarning",
)
RUNS = ("training", "scripts", "docs")


def pytest_collection_modifyitems(items):
    """Files with slow tests first: whole files are handed to processes, and none should begin a long one at the end."""
    for item in items:
        for words in OF_A_RUN if item.path.parent.name in RUNS else ():
            item.add_marker(pytest.mark.filterwarnings(words), append=False)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real texts and tokenizers that the maintainers test with; users do not have it."""
    candidates = [os.environ.get("SCONE_SHARED"), Path(__file__).parents[3] / "shared"]
    for candidate in candidates:
        if candidate and (Path(candidate) / "data" / "README.md").is_file():
            return Path(candidate) / "data"
    pytest.skip("the maintainers' data folder is not here (set SCONE_SHARED to its path to run this test)")
