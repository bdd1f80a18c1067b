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
from scone.inference.serve_protocol import RequestError
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


def page_facts(engine: SconeInferenceEngine) -> dict[str, Any]:
    """What the page says of the model."""
    vocabulary, table = getattr(engine.model, "vocabulary", None), engine.loaded.table
    return {
        "f_grams": 0 if vocabulary is None else vocabulary.num_f_grams,
        "max_n": 1 if vocabulary is None else vocabulary.max_n,
        "table": None if table is None else table.describe(),
    }


def inspected(engine: SconeInferenceEngine, text: str) -> dict[str, Any]:
    """The tokens of ``text``, each with the f-gram that ends there. Raises SconeError for too long a text."""
    ids, matcher, decode = _ids(engine, text), getattr(engine.model, "matcher", None), engine.tokenizer.decode
    if matcher is None:
        return {"tokens": [{"text": decode([token]), "match_length": 1} for token in ids]}
    records = inspect_tokens(np.array(ids, np.int64), matcher)
    texts = [{"text": decode([one.token]), "f_gram_text": decode(list(one.f_gram))} for one in records]
    return {"tokens": [asdict(record) | shown for record, shown in zip(records, texts, strict=True)]}


@torch.inference_mode()
def next_tokens(engine: SconeInferenceEngine, text: str, model_lock: threading.Lock) -> list[dict[str, Any]]:
    """The likeliest tokens after ``text`` with their probabilities. Raises SconeError for none or too long a text."""
    if not (ids := _ids(engine, text)):
        raise RequestError("found an empty text; expected some text to continue; write some")
    tokens = torch.tensor([ids], device=device_of(engine.model))
    with model_lock:
        logits = engine.model(input_ids=tokens, use_cache=False).logits[0, -1]
    best = logits.float().softmax(-1).topk(min(NEXT_TOKENS, len(logits)))
    return [
        {"text": engine.tokenizer.decode([token]), "probability": probability}
        for probability, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _ids(engine: SconeInferenceEngine, text: str) -> list[int]:
    ids = list(engine.tokenizer(text, add_special_tokens=False).input_ids)
    if len(ids) > MAX_TEXT_TOKENS:
        raise RequestError(f"found {len(ids)} tokens; expected at most {MAX_TEXT_TOKENS}; shorten the text")
    return engine.prompt_ids(ids) if ids else []
