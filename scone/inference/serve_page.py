"""What the page asks: a text's tokens with their f-grams, the f-grams nearest to one, the likeliest next tokens."""

from __future__ import annotations

import threading
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastapi import Request
from fastapi.responses import FileResponse
from pydantic import BaseModel
from torch import Tensor

from scone.inference.engine import SconeInferenceEngine
from scone.inference.loading import device_of
from scone.inference.serve_protocol import RequestError, parse
from scone.tokenization.inspection import inspect_tokens

MAX_TEXT_TOKENS = 2048
NEIGHBOURS, NEXT_TOKENS = 12, 12
COMPARED_ROWS = 20_000
"""Neighbours are looked for among so many of the most frequent f-grams (live, without a table: a tenth of them)."""

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


class Question(BaseModel):
    """What a question is about: a text, an f-gram's rank, or nothing."""

    text: str = ""
    rank: int = -1


class Page:
    """The page's files and the answers to its questions."""

    FILES = ("/", "/page.css", "/page.js")

    def __init__(
        self, engine: SconeInferenceEngine, model_lock: threading.Lock, baseline: SconeInferenceEngine | None
    ) -> None:
        self._engine, self._model_lock, self._baseline = engine, model_lock, baseline
        self._model: Any = engine.model
        self._vocabulary: Any = getattr(engine.model, "vocabulary", None)
        self._lock = threading.Lock()

    async def file(self, request: Request) -> FileResponse:
        """One of `FILES`."""
        name = request.url.path.strip("/") or "index.html"
        return FileResponse(Path(__file__).parent / "page" / name, headers=_HEADERS)

    def answer(self, question: str, body: bytes) -> dict[str, Any]:
        """The answer to ``about``, ``inspect``, ``neighbours`` or ``next``. Raises SconeError."""
        answers = {"about": self._about, "inspect": self._inspect, "neighbours": self._neighbours, "next": self._next}
        if question not in answers:
            raise RequestError(f"found the question {question!r}; expected one of {', '.join(answers)}", 404)
        return answers[question](parse(Question, body))

    def _about(self, _: Question) -> dict[str, Any]:
        vocabulary, table = self._vocabulary, self._engine.loaded.table
        return {
            "f_grams": 0 if vocabulary is None else vocabulary.num_f_grams,
            "max_n": 1 if vocabulary is None else vocabulary.max_n,
            "table": None if table is None else table.describe(),
        }

    def _inspect(self, asked: Question) -> dict[str, Any]:
        ids, matcher = self._ids(self._engine, asked), getattr(self._model, "matcher", None)
        if matcher is None:
            return {"tokens": [{"text": self._text([token]), "match_length": 1} for token in ids]}
        records = inspect_tokens(np.array(ids, np.int64), matcher)
        texts = [{"text": self._text([one.token]), "f_gram_text": self._text(one.f_gram)} for one in records]
        return {"tokens": [asdict(record) | text for record, text in zip(records, texts, strict=True)]}

    def _neighbours(self, asked: Question) -> dict[str, Any]:
        vocabulary, rank = self._vocabulary, asked.rank
        if vocabulary is None or not 0 <= rank < vocabulary.num_f_grams:
            raise RequestError(f"found rank {rank}; expected the rank of an f-gram of the model")
        with self._lock:  # the first question reads what all are compared with
            directions = self._directions
        cosines = directions @ torch.nn.functional.normalize(self._rows(range(rank, rank + 1))[0], dim=0)
        best = cosines.topk(min(NEIGHBOURS + 1, len(cosines)))
        found = [
            {"f_gram": self._text(vocabulary.tokens(vocabulary.vocab_size + other)), "rank": other, "cosine": cosine}
            for cosine, other in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            if other != rank
        ]
        return {"compared": len(directions), "neighbours": found[:NEIGHBOURS]}

    @cached_property
    def _directions(self) -> Tensor:
        """The first rows at length one, [≤ COMPARED_ROWS, D]."""
        count = COMPARED_ROWS if self._engine.loaded.table is not None else COMPARED_ROWS // 10
        return torch.nn.functional.normalize(self._rows(range(min(count, self._vocabulary.num_f_grams))), dim=1)

    @torch.inference_mode()
    def _rows(self, ranks: range) -> Tensor:
        """The rows of f-grams, fp32 [n, D] on the host: of the table, or computed live."""
        table, wanted = self._engine.loaded.table, torch.arange(ranks.start, ranks.stop)
        with self._model_lock:
            rows = (
                self._model.embed_nodes(wanted + self._vocabulary.vocab_size) if table is None else table.rows(wanted)
            )
        return rows.float().cpu()

    # ------------------------------------------------------------------ next tokens

    def _next(self, asked: Question) -> dict[str, Any]:
        engines = {"scone": self._engine} | ({"baseline": self._baseline} if self._baseline is not None else {})
        return {name: self._next_tokens(engine, self._ids(engine, asked)) for name, engine in engines.items()}

    @torch.inference_mode()
    def _next_tokens(self, engine: SconeInferenceEngine, ids: list[int]) -> list[dict[str, Any]]:
        """The likeliest tokens after ``ids`` with their probabilities."""
        if not ids:
            raise RequestError("found an empty text; expected some text to continue; write some")
        model = engine.model
        with self._model_lock:
            logits = model(input_ids=torch.tensor([ids], device=device_of(model)), use_cache=False).logits[0, -1]
        best = logits.float().softmax(-1).topk(min(NEXT_TOKENS, len(logits)))
        return [
            {"text": str(engine.tokenizer.decode([token])), "probability": probability}
            for probability, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    def _ids(self, engine: SconeInferenceEngine, asked: Question) -> list[int]:
        ids = list(engine.tokenizer(asked.text, add_special_tokens=False).input_ids)
        if len(ids) > MAX_TEXT_TOKENS:
            raise RequestError(f"found {len(ids)} tokens; expected at most {MAX_TEXT_TOKENS}; shorten the text")
        return engine.prompt_ids(ids) if ids else []

    def _text(self, ids: Any) -> str:
        return str(self._engine.tokenizer.decode(list(ids)))
