"""What a model costs to run: tokens a second, latency, FLOPs a token, and the parameters that only training needs."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scone.models.accounting import RunCost, without_memory
from scone.models.configuration import F_GRAM_WEIGHTS, SconeConfig
from scone.models.language_model import SconeForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEW_TOKENS = 32
"""Decoding is measured over this many tokens after the prompt."""
PERCENTILES = (50, 90, 99)


def measure_speed(model: PreTrainedModel, tokens: np.ndarray, num_runs: int, warmup_runs: int) -> dict[str, float]:
    """Speeds on prompts ``tokens`` [B, T], over ``num_runs`` runs after ``warmup_runs`` that do not count.

    Prefill is the forward pass that fills the cache, over B · T tokens. Decoding is greedy, up to `NEW_TOKENS` steps
    that still fit the model's positions (the prompt is shortened by as many), as `generate` does it, all its own work
    included; ``first_token`` is the time until the first of them.

    Returns median tokens a second, and percentiles 50, 90 and 99 of the seconds of a prefill and of the first token
    (over runs: with few runs the upper ones are the slowest run) and of one decoding step of all B sequences (over all
    steps of all runs).
    """
    device = model.device
    input_ids = torch.from_numpy(tokens).to(device)
    new_tokens = min(NEW_TOKENS, max(1, tokens.shape[1] // 2))
    prompt = input_ids[:, : max(1, tokens.shape[1] - new_tokens)]

    def prefill() -> None:
        with torch.inference_mode():
            model(input_ids=input_ids, use_cache=True, logits_to_keep=1)

    found: dict[str, list[float]] = {"prefill": [], "first_token": [], "decode_step": []}
    for run in range(warmup_runs + num_runs):
        seconds = timed(prefill, device)
        until_each = _generation_times(model, prompt, new_tokens)
        if run >= warmup_runs:
            found["prefill"].append(seconds)
            found["first_token"].append(until_each[0])
            found["decode_step"] += np.diff(until_each).tolist()
    result = {"prefill_tokens_per_second": tokens.size / float(np.median(found["prefill"]))}
    if steps := found["decode_step"]:
        per_run = np.asarray(steps).reshape(num_runs, -1).sum(axis=1)
        result["decode_tokens_per_second"] = tokens.shape[0] * (new_tokens - 1) / float(np.median(per_run))
    for name, sample in found.items():
        for p in PERCENTILES if sample else ():
            result[f"{name}_seconds_p{p}"] = float(np.percentile(sample, p))
    return result


def _generation_times(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> list[float]:
    """Seconds from the start until each new token's forward pass was done."""
    device = model.device
    times: list[float] = []

    def note(*_: Any) -> None:
        wait(device)
        times.append(time.perf_counter())

    hook = model.register_forward_hook(note)
    wait(device)
    started = time.perf_counter()
    model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    hook.remove()
    return [moment - started for moment in times]


def timed(work: Callable[[], None], device: torch.device) -> float:
    """Seconds that ``work`` takes, until the device is done with it."""
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flops_per_token(model: PreTrainedModel, tokens: np.ndarray, frozen_trunk: bool = False) -> dict[str, Any]:
    """What ``model`` computes per token of a batch like ``tokens`` [B, T], by the formulas of `models.accounting`.

    ``inference_flops_per_token``: as the model is served here (the f-gram model counts only where it runs live).
    ``training_flops_per_token``: forward and backward of trunk and input embedding, with all of it trained or all but
    the trunk (``frozen_trunk``); of a SCONE model also ``nodes_per_position`` and ``match_rate``. Both depend on
    ``tokens``: f-grams share their prefixes within a batch. Works for a model served from a table too: what training
    costs follows from its configuration and vocabulary. FLOPs are None where they cannot be counted.
    """
    config = copy.deepcopy(model.config)
    if isinstance(config, SconeConfig):
        config.requires_table = False
    trained = without_memory(config)
    if frozen_trunk:
        trained.trunk.requires_grad_(False)
    cost = RunCost(trained)
    input_ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64))
    inputs: dict[str, Any] = {"input_ids": input_ids}
    if isinstance(model, SconeForCausalLM):
        inputs["trie"] = model.trie_of(model.match(input_ids))
    cost.count(inputs)
    figures = cost.to_dict()
    inference = figures["inference_flops_per_token"]
    if inference is not None and getattr(model, "f_gram_embedding", None) is not None:
        inference += figures["f_gram_flops_per_token"]
    kept = ("training_flops_per_token", "nodes_per_position", "match_rate")
    return {"inference_flops_per_token": inference} | {name: figures[name] for name in kept if name in figures}


def training_only_parameters(folder: str | Path) -> int | None:
    """Values of the f-gram model, gain and learned rows in a model folder's weights, read from the files' headers.

    None where there are no weights (a hub name), 0 for a plain model.
    """
    from safetensors import safe_open

    paths = sorted(Path(folder).glob("model*.safetensors"))
    if not paths:
        return None
    total = 0
    for path in paths:
        with safe_open(path, framework="np") as file:
            names = [name for name in file.keys() if name.startswith(F_GRAM_WEIGHTS)]  # noqa: SIM118 (no mapping)
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    return total
