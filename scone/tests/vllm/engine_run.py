"""One vLLM engine in a fresh process, and the law in every way that this engine can go: for `test_engine`.

    python -m scone.tests.vllm.engine_run FOLDER '{"options": {…}, …}'

Prints as JSON what happened in it; exits with an error where the law does not hold. All is in one process, which starts
soonest: so nothing with numba is imported before the engine, see scone/vllm/__init__.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from scone.tests.vllm import checking


def second_runner(kernel: bool, asynchronous: bool) -> None:
    """vLLM's second model runner, as on a GPU, with all of its kernels in Triton's interpreter, and ours if wanted."""
    import os

    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    from triton.backends import backends

    class Nowhere:
        """A driver that nothing is launched on."""

        @staticmethod
        def is_active() -> bool:
            return False

    backends["cpu"] = SimpleNamespace(driver=Nowhere, compiler=None)  # type: ignore[assignment]
    if kernel:
        import torch

        from scone.inference.stores.memory import MemoryStore
        from scone.models import table_lookup

        MemoryStore.gpu_blocks = lambda self, device: [self._rows.view(torch.uint8)]  # type: ignore[method-assign]
        table_lookup.fits_on = lambda device, vocabulary: True
    if asynchronous:
        from vllm.platforms.cpu import CpuPlatform

        check = CpuPlatform.check_and_update_config

        def keep(config: Any) -> None:
            check(config)
            config.scheduler_config.async_scheduling = True

        CpuPlatform.check_and_update_config = staticmethod(keep)


def forget(kernel: bool) -> None:
    """Lose what was before each chunk: the law must not hold then. ``kernel``: of ours too."""
    import numpy as np

    from scone.vllm import lookups

    if kernel:
        from scone.kernels.table_lookup_triton import DeviceLookup

        on_device = DeviceLookup.look_up_ragged
        DeviceLookup.look_up_ragged = lambda self, *most: on_device(self, *most[:-1], most[-1] * 0)  # type: ignore[method-assign]

    look_up = lookups.looked_up_in_line
    lookups.looked_up_in_line = lambda find, tokens, starts, before, size: look_up(
        find, tokens, starts, np.full_like(before, -1), size
    )


def main(folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Run a plan. ``options``: of the engine; ``second_runner``: of that function; ``count``, ``longest``: of prompts;
    ``new``: tokens; ``ways``: sampling options of each round; ``forgets``: a last round that must fail; ``tolerance``:
    of log-probabilities; ``surface``: whatever else a request may ask for; ``adapter``: one of LoRA, for a round more;
    ``adapter_of_embeddings``: one to be refused;
    ``reference``: the folder that answers are compared with, if another.
    """
    checking.settings()
    if "second_runner" in plan:
        second_runner(**plan["second_runner"])
    llm = checking.engine(folder, **plan.get("options", {}))
    from scone.tests.vllm import models

    model = models.load(Path(plan.get("reference", folder)))
    prompts = models.prompts(plan.get("count", 16), plan.get("longest", 200))
    found: dict[str, Any] = {"compared": 0, "cached": 0}
    tolerance = plan.get("tolerance", checking.TOLERANCE)
    for way in plan.get("ways", [{}]):
        outputs = checking.answers(llm, prompts, **{"max_tokens": plan.get("new", 16)} | way)
        found["compared"] += checking.check(model, outputs, greedy="temperature" not in way, tolerance=tolerance)
        found["cached"] += sum(output.num_cached_tokens or 0 for output in outputs)
        if hasattr(model, "match"):
            found["share"] = checking.share_in_f_grams(model, outputs)
    if plan.get("surface"):
        checking.check_refusals(llm, model, prompts)
        checking.check_surface(llm, model, prompts[2])
    if plan.get("adapter"):
        outputs = checking.answers(llm, prompts, plan["adapter"], max_tokens=8)
        models.adapt(model, Path(plan["adapter"]))
        found["adapted"] = checking.check(model, outputs, tolerance=tolerance)
        try:
            checking.answers(llm, prompts, plan["adapter_of_embeddings"])
        except Exception as error:
            found["refused"] = str(error)
    for metric in llm.get_metrics():
        if metric.name in ("vllm:num_preemptions", "vllm:spec_decode_num_accepted_tokens"):
            found[metric.name.removeprefix("vllm:")] = metric.value
    if plan.get("forgets"):
        forget(plan.get("second_runner", {}).get("kernel", False))
        llm.reset_prefix_cache()
        try:
            checking.check(model, checking.answers(llm, prompts, max_tokens=4), tolerance=tolerance)
        except AssertionError:
            found["forgets"] = True
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), json.loads(sys.argv[2]))))
