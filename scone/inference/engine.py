"""Text in, text out: a model with its tokenizer, generating in batches of prompts of any length."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scone.inference.loading import LoadedModel, device_of, load_model, position_limit
from scone.inference.quantization import model_bytes
from scone.utils.errors import SconeError
from scone.utils.text import human_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


DEFAULT_MAX_LENGTH = 100


@dataclass(frozen=True)
class GenerationOptions:
    """How to continue a prompt. ``max_length`` and ``min_length`` count the prompt's tokens too, as in transformers.

    ``max_length`` None means 100, or the model's positions where these are fewer. ``max_new_tokens``, where given,
    wins over ``max_length``. Temperature, ``top_k`` and ``top_p`` only act with ``do_sample``.
    """

    max_length: int | None = None
    min_length: int = 0
    max_new_tokens: int | None = None
    do_sample: bool = False
    num_beams: int = 1
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    num_return_sequences: int = 1
    seed: int = 42


@dataclass(frozen=True)
class Generation:
    """One prompt's continuations. ``texts`` contain the prompt; ``token_ids`` the prompt's ids and the new ones, no
    padding.
    """

    prompt: str
    texts: list[str]
    token_ids: list[list[int]]
    num_prompt_tokens: int


@dataclass(frozen=True)
class GenerationStats:
    """What a call of `generate` took."""

    num_sequences: int
    num_prompt_tokens: int
    num_new_tokens: int
    seconds: float
    model_bytes: int
    table_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second, prefill included."""
        return self.num_new_tokens / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        return (
            f"{self.num_sequences} sequence(s), {self.num_prompt_tokens} prompt tokens, "
            f"{self.num_new_tokens} new tokens in {self.seconds:.2f} s: {self.tokens_per_second:.1f} tokens/s; "
            f"model {human_bytes(self.model_bytes)}, table {human_bytes(self.table_bytes)}"
        )


class SconeInferenceEngine:
    """A model with its tokenizer, for generating text.

    ``loaded.model`` is an ordinary Hugging Face model: everything that takes one takes it.
    """

    def __init__(self, loaded: LoadedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.loaded = loaded
        self.model = loaded.model
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls,
        model_path: str | Path,
        embedding_cache_path: str | Path | None = None,
        placement: str = "ram",
        quantization: str | None = None,
        device: str | torch.device | None = None,
        tokenizer_path: str | Path | None = None,
    ) -> SconeInferenceEngine:
        """Load model, table and tokenizer (by default the one saved with the model). Raises SconeError as
        `load_model` does.
        """
        from scone.tokenization.tokenizers import load_tokenizer

        loaded = load_model(model_path, embedding_cache_path, placement, device, quantization)
        return cls(loaded, load_tokenizer(str(tokenizer_path or model_path)))

    def generate(
        self, prompts: str | Sequence[str], options: GenerationOptions | None = None
    ) -> tuple[list[Generation], GenerationStats]:
        """Continue each prompt; prompts of different lengths run in one batch, padded on the left.

        Raises SconeError: no or empty prompt, prompt beyond ``max_length`` or the model's positions, tokens outside
        the vocabulary.
        """
        options = options or GenerationOptions()
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts:
            raise SconeError("found no prompt; expected at least one; give --prompt")
        encoded = [self._encode(text) for text in texts]
        totals = [self._total_length(ids, options) for ids in encoded]
        started = time.perf_counter()
        produced: dict[int, list[list[int]]] = {}
        for group in self._groups(encoded, totals):
            for index, sequences in zip(group, self._generate_group(group, encoded, totals, options), strict=True):
                produced[index] = sequences
        seconds = time.perf_counter() - started
        generations = [
            Generation(
                text,
                [self._text(ids) for ids in produced[index]],
                produced[index],
                len(encoded[index]),
            )
            for index, text in enumerate(texts)
        ]
        return generations, self._stats(generations, seconds)

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt. Our training puts no special tokens into documents, so our models get none either."""
        if not prompt:
            raise SconeError("found an empty prompt; expected some text to continue; give --prompt")
        bare: list[int] = self.tokenizer(prompt, add_special_tokens=False).input_ids
        ids: list[int] = bare if self.model.config.model_type == "scone" else self.tokenizer(prompt).input_ids
        while (
            len(ids) > len(bare) and ids[-1] != bare[-1]
        ):  # a closing token ([SEP], </s>) would end the text to continue
            ids = ids[:-1]
        if not ids:
            raise SconeError(
                f"found the prompt {prompt!r}, which the tokenizer turns into no tokens; give another prompt"
            )
        vocab_size = self.model.config.get_text_config().vocab_size
        if max(ids) >= vocab_size:
            raise SconeError(
                f"found token {max(ids)} in the prompt; the model's vocabulary has {vocab_size} tokens; "
                "use the tokenizer that the model was trained with (--tokenizer_path)"
            )
        return ids

    def _total_length(self, ids: list[int], options: GenerationOptions) -> int:
        """How long prompt and continuation together may get; see `generate` for what is refused."""
        limit = position_limit(self.model)
        if options.max_new_tokens is not None:
            total = len(ids) + options.max_new_tokens
        else:
            default = DEFAULT_MAX_LENGTH if limit is None else min(DEFAULT_MAX_LENGTH, limit)
            total = default if options.max_length is None else options.max_length
            if len(ids) >= total:
                raise SconeError(
                    f"found a prompt of {len(ids)} tokens with --max_length {total}, which counts the prompt too; "
                    f"set --max_length above {len(ids)}"
                )
        if limit is not None and total > limit:
            raise SconeError(
                f"found {len(ids)} prompt tokens to be continued to {total}; the model has {limit} positions; "
                "shorten the prompt or lower --max_length"
            )
        return total

    def _groups(self, encoded: list[list[int]], totals: list[int]) -> list[list[int]]:
        """Prompts that run together: all, unless the padded batch would walk past the model's positions; then by
        length.
        """
        limit = position_limit(self.model)
        longest_run = max(total - len(ids) for ids, total in zip(encoded, totals, strict=True))
        if limit is None or max(map(len, encoded)) + longest_run <= limit:
            return [list(range(len(encoded)))]
        by_shape: dict[tuple[int, int], list[int]] = {}
        for index, (ids, total) in enumerate(zip(encoded, totals, strict=True)):
            by_shape.setdefault((len(ids), total), []).append(index)
        return list(by_shape.values())

    def _generate_group(
        self, group: list[int], encoded: list[list[int]], totals: list[int], options: GenerationOptions
    ) -> list[list[list[int]]]:
        """Sequences of each prompt: [prompts][num_return_sequences][tokens], cut to each prompt's own total."""
        pad = self._pad_token_id()
        width = max(len(encoded[index]) for index in group)
        rows = [[pad] * (width - len(encoded[index])) + encoded[index] for index in group]
        mask = [[0] * (width - len(encoded[index])) + [1] * len(encoded[index]) for index in group]
        device = device_of(self.model)
        shortest = min(len(encoded[index]) for index in group)
        new_tokens = max(totals[index] - len(encoded[index]) for index in group)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(options.seed)
            output: Tensor = self.model.generate(  # type: ignore[operator]
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=self._generation_config(options, new_tokens, shortest),
            )
        sequences: list[list[list[int]]] = []
        for position, index in enumerate(group):
            own = output[position * options.num_return_sequences : (position + 1) * options.num_return_sequences]
            padding = width - len(encoded[index])
            sequences.append([self._trim(row[padding:].tolist(), len(encoded[index]), totals[index]) for row in own])
        return sequences

    def _trim(self, ids: list[int], num_prompt_tokens: int, total: int) -> list[int]:
        """Cut to ``total`` tokens and at the first end-of-text after the prompt, which is kept."""
        ids = ids[:total]
        ends = self._eos_token_ids()
        for position in range(num_prompt_tokens, len(ids)):
            if ids[position] in ends:
                return ids[: position + 1]
        return ids

    def _generation_config(self, options: GenerationOptions, new_tokens: int, shortest: int) -> Any:
        from transformers import GenerationConfig

        sampling = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
        return GenerationConfig(
            max_new_tokens=new_tokens,
            min_new_tokens=max(options.min_length - shortest, 0) or None,
            do_sample=options.do_sample,
            num_beams=options.num_beams,
            repetition_penalty=options.repetition_penalty,
            num_return_sequences=options.num_return_sequences,
            pad_token_id=self._pad_token_id(),
            eos_token_id=sorted(self._eos_token_ids()) or None,
            **(sampling if options.do_sample else {}),
        )

    def _eos_token_ids(self) -> set[int]:
        configured = self.model.generation_config.eos_token_id if self.model.generation_config else None
        if configured is None:
            configured = self.tokenizer.eos_token_id
        ids = configured if isinstance(configured, list) else [configured]
        vocab_size = self.model.config.get_text_config().vocab_size
        return {int(i) for i in ids if i is not None and int(i) < vocab_size}

    def _pad_token_id(self) -> int:
        """Any valid id will do: padded positions are masked out."""
        vocab_size = self.model.config.get_text_config().vocab_size
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(int(i) for i in candidates if i is not None and int(i) < vocab_size)

    def _stats(self, generations: list[Generation], seconds: float) -> GenerationStats:
        table = self.loaded.table
        return GenerationStats(
            num_sequences=sum(len(generation.token_ids) for generation in generations),
            num_prompt_tokens=sum(generation.num_prompt_tokens for generation in generations),
            num_new_tokens=sum(
                len(ids) - generation.num_prompt_tokens for generation in generations for ids in generation.token_ids
            ),
            seconds=seconds,
            model_bytes=model_bytes(self.model),
            table_bytes=0 if table is None else table.num_rows * table.row_bytes,
        )
