"""The law vllm_equals_full_forward: whatever vLLM did to get there, its answers are those of a full forward pass."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

# what imports numba comes after vLLM's worker, which in the tests is this process: see scone/vllm/__init__.py
TOLERANCE = 3e-5
"""Of a log-probability in fp32."""


def engine(folder: Path, **changes: Any) -> Any:
    """vLLM with a model, at a size for tests."""
    from vllm import LLM

    options: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 512,
        "skip_tokenizer_init": True,
        "block_size": 32,
        "max_num_seqs": 16,
        "disable_log_stats": False,
        "enforce_eager": True,
        "num_gpu_blocks_override": 400,
        "seed": 0,
        "distributed_executor_backend": "uni",
    }
    return LLM(str(folder), **options | changes)


def sampling(**changes: Any) -> Any:
    """Greedy, with log-probabilities."""
    from vllm import SamplingParams

    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24, "logprobs": 0, "detokenize": False}
    return SamplingParams(**options | {"ignore_eos": True} | changes)


def answers(llm: Any, prompts: list[list[int]], adapter: str = "", **options: Any) -> list[Any]:
    """vLLM's outputs for prompts of token ids, all at once; ``adapter``: the folder of one of LoRA."""
    from vllm.lora.request import LoRARequest

    request = LoRARequest(adapter, zlib.crc32(adapter.encode()), adapter) if adapter else None
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(inputs, sampling(**options), use_tqdm=False, lora_request=request)


def check(model: Any, outputs: list[Any], greedy: bool = True, tolerance: float = TOLERANCE) -> int:
    """That every answer is what ``model`` says in one pass over the whole text; how many tokens were compared."""
    import torch

    from scone.tests.vllm import models

    compared = 0
    for output in outputs:
        prompt = list(output.prompt_token_ids)
        for answer in output.outputs:
            tokens = list(answer.token_ids)
            expected = models.log_probabilities(model, prompt + tokens)
            new = expected[len(prompt) - 1 : -1]
            found = torch.tensor([at[token].logprob for at, token in zip(answer.logprobs, tokens, strict=True)])
            its = new.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            worst = float((found - its).abs().max())
            assert worst < tolerance, f"log-probabilities differ by {worst} after a prompt of {len(prompt)} tokens"
            if greedy:
                assert float((new.max(1).values - its).max()) < tolerance, "another token than the best"
            compared += len(tokens)
        if output.prompt_logprobs is not None:
            pairs = list(zip(output.prompt_logprobs, prompt, strict=True))[1:]
            found = torch.tensor([at[token].logprob for at, token in pairs])
            its = expected[: len(prompt) - 1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
            assert not pairs or float((found - its).abs().max()) < tolerance, "log-probabilities of the prompt differ"
            compared += len(pairs)
    return compared


def check_surface(llm: Any, model: Any, prompt: list[int]) -> None:
    """What else a request may ask for: words to stop at, seeds, several log-probabilities, beams."""
    from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

    from scone.tests.vllm import models

    warm: dict[str, Any] = {"temperature": 1.0}
    drawn = [answers(llm, [prompt], seed=seed, logprobs=5, **warm)[0].outputs[0] for seed in (1, 1, 2)]
    whole, tokens = drawn[0], list(drawn[0].token_ids)
    assert tokens == list(drawn[1].token_ids) != list(drawn[2].token_ids)
    ours = models.log_probabilities(model, prompt + tokens)[len(prompt) - 1 : -1]
    for at, row in zip(whole.logprobs, ours, strict=True):
        for token in row.topk(5).indices.tolist():
            assert abs(at[token].logprob - float(row[token])) < TOLERANCE
    end = next(n for n, token in enumerate(tokens) if token != tokens[0])
    stopped = answers(llm, [prompt], seed=1, detokenize=True, stop=[f"w{tokens[end]:02}"], **warm)[0].outputs[0]
    assert (stopped.finish_reason, list(stopped.token_ids)) == ("stop", tokens[: end + 1])
    allowed = [f"w{token:02}" for token in (7, 33)]
    choice = {"structured_outputs": StructuredOutputsParams(choice=allowed), "detokenize": True, "ignore_eos": False}
    assert answers(llm, [prompt], **choice)[0].outputs[0].text.strip() in allowed
    beams = llm.beam_search([{"prompt_token_ids": prompt}], BeamSearchParams(3, 8, ignore_eos=True))[0].sequences
    for beam in beams:
        new = list(beam.tokens)[len(prompt) :]
        its = models.log_probabilities(model, prompt + new)[len(prompt) - 1 : -1]
        assert abs(beam.cum_logprob - sum(float(row[token]) for row, token in zip(its, new, strict=True))) < 1e-3
    assert len(beams) == 3
    assert [beam.cum_logprob for beam in beams] == sorted((beam.cum_logprob for beam in beams), reverse=True)


def check_refusals(llm: Any, model: Any, prompts: list[list[int]]) -> None:
    """Requests that are refused or leave early, also amid their prompts, harm no other; salt keeps prefixes apart."""
    import pytest
    import torch

    from scone.tests.vllm import models

    foreign = [{"prompt_token_ids": tokens} for tokens in ([], [models.VOCAB_SIZE], [-1], [1] * models.POSITIONS)]
    for bad in [*foreign, {"prompt_embeds": torch.zeros(3, models.WIDTH)}]:
        with pytest.raises(Exception, match=r"prompt|vocabulary"):  # of what kind they are differs by release
            llm.generate(bad, sampling(), use_tqdm=False)
    names = [f"leaves {number}" for number in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, sampling())
    for _ in range(3):
        llm.llm_engine.step()
    llm.llm_engine.abort_request(names)
    assert not llm.llm_engine.has_unfinished_requests()
    salted = [{"prompt_token_ids": prompt, "cache_salt": salt} for prompt in prompts for salt in "ab"]
    check(model, llm.generate(salted, sampling(max_tokens=4), use_tqdm=False))


def share_in_f_grams(model: Any, outputs: list[Any]) -> float:
    """Of all positions, how many end an f-gram: where it is small, the law says little."""
    import torch

    from scone.tests.vllm import models

    texts = [[*output.prompt_token_ids, *answer.token_ids] for output in outputs for answer in output.outputs]
    matched = [model.match(torch.tensor([tokens])) >= models.VOCAB_SIZE for tokens in texts]
    return sum(int(part.sum()) for part in matched) / sum(part.size for part in matched)


def settings() -> None:
    """What vLLM reads from the environment, before it is imported."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # all in one process starts soonest
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
