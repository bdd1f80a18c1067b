"""The law vllm_equals_full_forward, in real engines of vLLM: `make test-vllm`, in an environment of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from scone.inference.stores import memory
from scone.inference.table_format import TableFile
from scone.tests.vllm import models

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: `make test-vllm` runs these tests"),
]
CHUNKS = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
"""Prompts are read in pieces that end anywhere."""
OLD = Path(__file__).parents[1] / "fixtures" / "saved_by_0.1.0" / "scone-llama-heads-of-32"
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
SAMPLED = {"n": 3, "temperature": 1.0, "top_p": 0.95}
TWICE: list[dict[str, Any]] = [{}, {}]
PLANS: dict[str, tuple[str, dict[str, Any]]] = {
    # all at once: chunks, prefix hits, too few blocks, drafts of which some are refused, three answers that share one
    "modern": (
        "modern",
        {
            "options": CHUNKS | {"num_gpu_blocks_override": 24, "speculative_config": DRAFTS},
            "ways": [{}, {}, SAMPLED],
            "forgets": True,
        },
    ),
    "gpt2": ("gpt2", {"options": CHUNKS, "ways": [{"prompt_logprobs": 0}], "count": 12}),
    "llama": ("llama", {"options": CHUNKS | {"num_gpu_blocks_override": 24}, "ways": TWICE}),
    "over-encoding": ("over-encoding", {"options": CHUNKS, "ways": TWICE, "count": 12, "forgets": True}),
    # whatever a request may ask for, and LoRA on the trunk's layers
    "surface": (
        "llama",
        {
            "options": CHUNKS | {"skip_tokenizer_init": False, "enable_lora": True, "max_lora_rank": 8},
            "count": 8,
            "surface": True,
            "adapter": "adapter",
        },
    ),
    "tensor parallel": (
        "modern",
        {
            "options": CHUNKS | {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
            "ways": TWICE,
            "count": 8,
        },
    ),
    "compiled, bf16": (
        "llama",
        {
            "options": CHUNKS | {"enforce_eager": False, "dtype": "bfloat16"},
            "ways": TWICE,
            "count": 8,
            "tolerance": 0.3,
            "forgets": True,
        },
    ),
    **{
        f"trunk in {form}": (
            "quantised",
            {"options": CHUNKS | {"dtype": "bfloat16"}, "count": 8, "tolerance": 0.4, "forgets": True, "form": form},
        )
        for form in models.FORMS
    },
    "a folder of 0.1.0": ("old", {"options": CHUNKS, "count": 8, "forgets": True}),
    # the runner that GPUs have, with and without the kernel
    "second runner, asynchronous": (
        "modern",
        {
            "second_runner": {"kernel": True, "asynchronous": True},
            "options": CHUNKS | {"max_model_len": 120},
            "ways": TWICE,
            "count": 4,
            "longest": 70,
            "new": 5,
        },
    ),
    "second runner, host": (
        "llama",
        {
            "second_runner": {"kernel": False, "asynchronous": False},
            "options": CHUNKS,
            "count": 3,
            "longest": 70,
            "new": 4,
            "forgets": True,
        },
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_vllm_equals_full_forward(name: str, tmp_path: Path) -> None:
    kind, plan = PLANS[name]
    folder = OLD if kind == "old" else models.make(kind, tmp_path / "model")
    if "adapter" in plan:
        models.make_tokenizer(folder)
        plan = plan | {"adapter": str(models.make_adapter(folder, tmp_path / "adapter"))}
        another = models.make_adapter(folder, tmp_path / "another", ("embed_tokens",))
        plan = plan | {"adapter_of_embeddings": str(another)}
    if "form" in plan:
        if plan["form"] == "fp8" and not torch.cpu._is_amx_tile_supported():
            pytest.skip("vLLM computes with fp8 on processors with AMX alone")
        plan = plan | {"reference": str(tmp_path / "plain")}
        models.quantise(folder, plan["form"], tmp_path / "quantised", tmp_path / "plain")
        folder = tmp_path / "quantised"
    found = run(folder, plan)
    assert found["compared"] > 10
    if kind != "over-encoding":
        assert found["share"] > 0.6  # otherwise the law says little
    if "tensor_parallel_size" in plan["options"]:
        with TableFile(folder / "embeddings.cache") as table:
            ours = f"scone-*-{table.layout.rows_checksum[:32]}-*"
        assert not [*memory.FOLDER.glob(ours)], "rows stayed in shared memory"
    assert ("adapted" in found) == ("adapter" in plan)
    if "adapter" in plan:
        assert "expected target modules in" in found["refused"]
        assert "but received ['trunk.model.embed_tokens'" in found["refused"]
    if plan.get("ways", []).count({}) == 2:
        assert found["cached"] >= 64
    if plan["options"].get("num_gpu_blocks_override"):
        assert found["num_preemptions"] > 0
    if "speculative_config" in plan["options"]:
        assert found["spec_decode_num_accepted_tokens"] > 0
    assert found.get("forgets", False) == plan.get("forgets", False)


NAMES_OF_VLLM = """
import dataclasses, inspect
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states import init_model_state, resolve_model_state_cls
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.states import RequestState
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.utils import init_vllm_registered_model
assert "get_model_state_cls" in inspect.getsource(resolve_model_state_cls)
assert [*inspect.signature(DefaultModelState.prepare_inputs).parameters] == ["self", "input_batch", "req_states"]
assert [*inspect.signature(DefaultModelState.prepare_dummy_inputs).parameters] == ["self", "num_reqs", "num_tokens"]
fields = {field.name for field in dataclasses.fields(InputBatch)}
wanted = {"input_ids", "query_start_loc", "query_start_loc_np", "idx_mapping", "num_reqs", "num_tokens_after_padding"}
assert fields > wanted, fields
for name in ("all_token_ids", "num_computed_tokens"):
    assert f"self.{name} = StagedWriteTensor(" in inspect.getsource(RequestState.__init__), name
assert {"hf_config", "architectures", "prefix"} <= {*inspect.signature(init_vllm_registered_model).parameters}
from scone.vllm import register
register()
assert "SconeForCausalLM" in MODELS_CONFIG_MAP
"""


def test_the_names_of_vllm_that_are_used() -> None:
    """vLLM changes monthly: which release took away what."""
    done = subprocess.run([sys.executable, "-c", NAMES_OF_VLLM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_hostile_folder_gets_one_line(tmp_path: Path) -> None:
    """The command of vLLM itself, which ends before any worker starts."""
    folder = models.make("modern", tmp_path / "model")
    (folder / "embeddings.cache").unlink()
    command = [Path(sys.executable).with_name("vllm"), "serve", folder, "--skip-tokenizer-init", "--port", "1"]
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("scone: found no embeddings.cache in")
    assert "Traceback" not in done.stderr


def run(folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """What `engine_run` says of a plan."""
    command = [sys.executable, "-m", "scone.tests.vllm.engine_run", str(folder), json.dumps(plan)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if "tensor_parallel_size" in plan["options"]:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"  # two workers on one NUMA node are to be told apart
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    # vLLM may say something after it, of workers that are slow to end
    line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
    found: dict[str, Any] = json.loads(line)
    return found
