"""Text in, text out: a model with its tokenizer, generating in batches of prompts of any length."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scone.inference.loading import LoadedModel, load_model
from scone.inference.quantization import model_bytes
from scone.inference.streaming import GeneratedSequence, GenerationStats, SequenceStoppingCriteria, decode, table_reads
from scone.models.trunk import longest_sequence
from scone.utils.environment import process_bytes
from scone.utils.errors import SconeError

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


class SconeInferenceEngine:
    """A model with its tokenizer, for generating text.

    ``loaded.model`` is an ordinary Hugging Face model: everything that takes one takes it.
    """

    def __init__(self, loaded: LoadedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.loaded = loaded
        self.model = loaded.model
        self.tokenizer = tokenizer
        self._vocab_size = int(loaded.model.config.get_text_config().vocab_size)

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
        started = time.perf_counter()
        copies = options.num_return_sequences
        sequences = [self.sequence(text, options) for text in texts for _ in range(copies)]
        before = table_reads(self.model)
        num_padding = self.run(sequences, options)
        positions, rows = (table_reads(self.model) - before).tolist()
        generations = []
        for index, text in enumerate(texts):
            own = sequences[index * copies : (index + 1) * copies]
            token_ids = [one.prompt_ids + one.token_ids for one in own]
            written = [self.text_of(ids) for ids in token_ids]
            generations.append(Generation(text, written, token_ids, len(own[0].prompt_ids)))
        num_prompt_tokens = sum(one.num_prompt_tokens for one in generations)
        table, device = self.loaded.table, self.model.device
        firsts = [one.first_token_at for one in sequences if one.first_token_at is not None]
        return generations, GenerationStats(
            num_prompt_tokens,
            sum(len(one.token_ids) for one in sequences),
            max(firsts) - started if firsts and options.num_beams == 1 else None,
            seconds=time.perf_counter() - started,
            model_bytes=model_bytes(self.model),
            table_bytes=0 if table is None else table.num_rows * table.row_bytes,
            reads=None if table is None else (positions - num_padding, rows),
            process_bytes=process_bytes(),
            accelerator_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        )

    def stream(self, prompt: str, options: GenerationOptions | None = None) -> Iterator[str]:
        """The continuation's text (without the prompt), piece by piece as it comes; giving up the iterator ends it.

        The pieces together are what `generate` adds to the prompt. Raises SconeError as `generate` does, and for beam
        search or several sequences, which have no text before they are finished.
        """
        options = options or GenerationOptions()
        if options.num_beams > 1 or options.num_return_sequences > 1:
            raise SconeError(
                f"found {options.num_beams} beams and {options.num_return_sequences} sequences to stream; expected one "
                "of each; leave --stream out"
            )
        return self._stream(self.sequence(prompt, options), options)

    def _stream(self, sequence: GeneratedSequence, options: GenerationOptions) -> Iterator[str]:
        pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        sequence.on_text = pieces.put

        def work() -> None:
            try:
                self.run([sequence], options)
                pieces.put(None)
            except BaseException as error:  # whatever it is, it belongs to the reader
                pieces.put(error)

        worker = threading.Thread(target=work, name="scone-stream", daemon=True)
        worker.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            sequence.cancel()
            worker.join()

    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """The tokens that a text, or token ids, give the model. Raises SconeError for none or unknown ones.

        Our training puts no special tokens into documents, so our models get none either.
        """
        if not prompt:
            raise SconeError("found an empty prompt; expected some text to continue; give a prompt")
        ids = self._encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise SconeError(
                f"found the prompt {prompt!r}, which the tokenizer turns into no tokens; give another prompt"
            )
        wrong = next((token for token in ids if not 0 <= token < self._vocab_size), None)
        if wrong is not None:
            raise SconeError(
                f"found token {wrong} in the prompt; the model's vocabulary has {self._vocab_size} tokens; "
                "use the tokenizer that the model was trained with"
            )
        return ids

    def _encode(self, prompt: str) -> list[int]:
        bare: list[int] = self.tokenizer(prompt, add_special_tokens=False).input_ids
        ids: list[int] = bare if self.model.config.model_type.startswith("scone") else self.tokenizer(prompt).input_ids
        while len(ids) > len(bare) and ids[-1] != bare[-1]:  # a closing token ([SEP], </s>) would end the text
            ids = ids[:-1]
        return ids

    def sequence(self, prompt: str | Sequence[int], options: GenerationOptions) -> GeneratedSequence:
        """What `run` takes, of a text or of token ids. Raises SconeError as `generate` does."""
        ids = self.prompt_ids(prompt)
        return GeneratedSequence(ids, self._total_length(ids, options) - len(ids))

    def run(self, sequences: Sequence[GeneratedSequence], options: GenerationOptions) -> int:
        """Continue all ``sequences``, in as few batches as the model's positions allow; returns how many positions of
        padding that took.

        Lengths in ``options`` are not looked at: each sequence has its own. With beams, the ``num_return_sequences``
        sequences of a prompt are neighbours.
        """
        return sum(self._run_group(group, options) for group in self._groups(sequences, options))

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return decode(self.tokenizer, ids)

    def _total_length(self, ids: list[int], options: GenerationOptions) -> int:
        """How long prompt and continuation together may get; see `generate` for what is refused."""
        limit = longest_sequence(self.model.config)
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

    def _groups(
        self, sequences: Sequence[GeneratedSequence], options: GenerationOptions
    ) -> list[list[GeneratedSequence]]:
        """Sequences that run together: all, unless padding would walk past the model's positions, or be punished as
        repeated text; then by length.
        """
        limit, lengths = longest_sequence(self.model.config), {len(sequence.prompt_ids) for sequence in sequences}
        fits = limit is None or max(lengths) + max(sequence.max_new_tokens for sequence in sequences) <= limit
        if fits and (options.repetition_penalty == 1 or len(lengths) == 1):
            return [list(sequences)]
        by_shape: dict[tuple[int, int], list[GeneratedSequence]] = {}
        for sequence in sequences:
            by_shape.setdefault((len(sequence.prompt_ids), sequence.max_new_tokens), []).append(sequence)
        return list(by_shape.values())

    def _prefetch(self, tokens: Tensor, mask: Tensor) -> None:
        """Let a mapped table begin to read what the prompts of one batch will ask for."""
        table, model = self.loaded.table, self.model
        if table is not None and table.memory.mapped:
            ranks = model.match(tokens, mask) - model.config.vocab_size  # type: ignore[operator]
            table.prefetch(torch.from_numpy(ranks[ranks >= 0]))

    def _run_group(self, sequences: Sequence[GeneratedSequence], options: GenerationOptions) -> int:
        """Continue one batch; with beams, the copies of a prompt in ``sequences`` are one search. See `run`."""
        copies = options.num_return_sequences if options.num_beams > 1 else 1
        prompts = [sequence.prompt_ids for sequence in sequences[::copies]]
        width, pad = max(map(len, prompts)), self._pad_token_id()
        tokens = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts])  # on the left
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
        self._prefetch(tokens, mask)
        ends, device = self._eos_token_ids(), self.model.device
        for sequence in sequences:
            sequence.begin(self.tokenizer)
        # beams change places, and have no text before they are finished
        criteria = [] if options.num_beams > 1 else [SequenceStoppingCriteria(sequences, ends, width)]
        shortest = min(map(len, prompts))
        new_tokens = max(sequence.max_new_tokens for sequence in sequences)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(options.seed)
            output: Tensor = self.model.generate(  # type: ignore[operator]
                input_ids=tokens.to(device),
                attention_mask=mask.to(device),
                generation_config=self._generation_config(options, new_tokens, shortest),
                stopping_criteria=criteria,
            )
        now = time.perf_counter()
        if not criteria:
            for sequence, ids in zip(sequences, output[:, width:].tolist(), strict=True):
                for token in ids:
                    sequence.add(token, ends, now)
        for sequence in sequences:
            sequence.finish("length")
        return (mask.numel() - int(mask.sum())) * options.num_beams

    def _generation_config(self, options: GenerationOptions, new_tokens: int, shortest: int) -> Any:
        from transformers import GenerationConfig

        sampling = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
        return GenerationConfig(
            max_new_tokens=new_tokens,
            min_new_tokens=max(options.min_length - shortest, 0) or None,
            do_sample=options.do_sample,
            num_beams=options.num_beams,
            repetition_penalty=options.repetition_penalty,
            num_return_sequences=options.num_return_sequences if options.num_beams > 1 else 1,
            pad_token_id=self._pad_token_id(),
            eos_token_id=sorted(self._eos_token_ids()) or None,
            use_cache=True,  # a model saved for training with checkpointing may say otherwise
            **(sampling if options.do_sample else {}),
        )

    def _eos_token_ids(self) -> set[int]:
        configured = self.model.generation_config.eos_token_id if self.model.generation_config else None
        found = self.tokenizer.eos_token_id if configured is None else configured
        ids = found if isinstance(found, list) else [found]
        return {int(i) for i in ids if i is not None and int(i) < self._vocab_size}

    def _pad_token_id(self) -> int:
        """Any valid id will do: padded positions are masked out."""
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(int(i) for i in candidates if i is not None and int(i) < self._vocab_size)
