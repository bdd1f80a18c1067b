"""What the page asks: a text's tokens with their f-grams, and the likeliest next tokens."""

from __future__ import annotations

import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastapi import Request
from fastapi.responses import FileResponse
from pydantic import BaseModel

from scone.inference.engine import SconeInferenceEngine
from scone.inference.loading import device_of
from scone.inference.serve_protocol import RequestError, parse
from scone.tokenization.inspection import inspect_tokens

MAX_TEXT_TOKENS, NEXT_TOKENS = 2048, 12
FILES = ("/", "/page.css", "/page.js")
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
    """What the page asks about."""

    text: str


async def page_file(request: Request) -> FileResponse:
    """One of `FILES`."""
    name = request.url.path.strip("/") or "index.html"
    return FileResponse(Path(__file__).parent / "page" / name, headers=_HEADERS)


class Page:
    """Answers the page's questions; ``model_lock`` keeps other users of the model out meanwhile."""

    def __init__(
        self, engine: SconeInferenceEngine, model_lock: threading.Lock, baseline: SconeInferenceEngine | None
    ) -> None:
        self._engine, self._model_lock = engine, model_lock
        self._engines = {"scone": engine} | ({"baseline": baseline} if baseline is not None else {})

    def facts(self) -> dict[str, Any]:
        """What the page says of the model."""
        vocabulary, table = getattr(self._engine.model, "vocabulary", None), self._engine.loaded.table
        return {
            "f_grams": 0 if vocabulary is None else vocabulary.num_f_grams,
            "max_n": 1 if vocabulary is None else vocabulary.max_n,
            "table": None if table is None else table.describe(),
        }

    def answer(self, question: str, body: bytes) -> dict[str, Any]:
        """The answer to ``inspect`` or ``next``. Raises SconeError."""
        answers = {"inspect": self._inspect, "next": self._next}
        if question not in answers:
            raise RequestError(f"found the question {question!r}; expected one of {', '.join(answers)}", 404)
        return answers[question](parse(Question, body).text)

    def _inspect(self, text: str) -> dict[str, Any]:
        ids, matcher = self._ids(self._engine, text), getattr(self._engine.model, "matcher", None)
        if matcher is None:
            return {"tokens": [{"text": self._text([token]), "match_length": 1} for token in ids]}
        records = inspect_tokens(np.array(ids, np.int64), matcher)
        texts = [{"text": self._text([one.token]), "f_gram_text": self._text(one.f_gram)} for one in records]
        return {"tokens": [asdict(record) | shown for record, shown in zip(records, texts, strict=True)]}

    def _next(self, text: str) -> dict[str, Any]:
        return {name: self._next_tokens(engine, self._ids(engine, text)) for name, engine in self._engines.items()}

    @torch.inference_mode()
    def _next_tokens(self, engine: SconeInferenceEngine, ids: list[int]) -> list[dict[str, Any]]:
        """The likeliest tokens after ``ids`` with their probabilities."""
        if not ids:
            raise RequestError("found an empty text; expected some text to continue; write some")
        tokens = torch.tensor([ids], device=device_of(engine.model))
        with self._model_lock:
            logits = engine.model(input_ids=tokens, use_cache=False).logits[0, -1]
        best = logits.float().softmax(-1).topk(min(NEXT_TOKENS, len(logits)))
        return [
            {"text": str(engine.tokenizer.decode([token])), "probability": probability}
            for probability, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    def _ids(self, engine: SconeInferenceEngine, text: str) -> list[int]:
        ids = list(engine.tokenizer(text, add_special_tokens=False).input_ids)
        if len(ids) > MAX_TEXT_TOKENS:
            raise RequestError(f"found {len(ids)} tokens; expected at most {MAX_TEXT_TOKENS}; shorten the text")
        return engine.prompt_ids(ids) if ids else []

    def _text(self, ids: Any) -> str:
        return str(self._engine.tokenizer.decode(list(ids)))
