"""What the page asks: a text's tokens with their f-grams, the f-grams nearest to one, the likeliest next tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scone.inference.engine import SconeInferenceEngine
from scone.inference.loading import device_of
from scone.inference.serve_batching import Batcher
from scone.tokenization.inspection import InspectedToken, inspect_tokens
from scone.utils.errors import SconeError

MAX_TEXT_TOKENS = 2048
NEIGHBOURS, NEXT_TOKENS = 12, 12
COMPARED_ROWS = 20_000
"""Neighbours are looked for among so many of the most frequent f-grams (live, without a table: a tenth of them)."""

_FILES = {
    "": ("index.html", "text/html"),
    "page.css": ("page.css", "text/css"),
    "page.js": ("page.js", "text/javascript"),
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class PageFile:
    """A file of the page, as it is sent."""

    content: bytes
    media_type: str
    headers: dict[str, str]


class Page:
    """Answers the page's questions; what needs the model runs on the batcher's thread."""

    def __init__(self, engine: SconeInferenceEngine, batcher: Batcher, baseline: SconeInferenceEngine | None) -> None:
        self._engine, self._batcher, self._baseline = engine, batcher, baseline
        self._lock = threading.Lock()

    def file(self, path: str) -> PageFile | None:
        """The page's file of that path; None where there is none."""
        if path not in _FILES:
            return None
        name, media_type = _FILES[path]
        return PageFile(files("scone.inference.page").joinpath(name).read_bytes(), media_type, _HEADERS)

    def answer(self, question: str, asked: Any) -> dict[str, Any]:
        """The answer to ``about``, ``inspect``, ``neighbours`` or ``next``. Raises SconeError; QueueFullError."""
        answers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "about": self._about,
            "inspect": self._inspect,
            "neighbours": self._neighbours,
            "next": self._next,
        }
        if question not in answers or not isinstance(asked, dict):
            raise SconeError(f"found the question {question!r}; expected one of {', '.join(answers)}, with an object")
        return answers[question](asked)

    def _about(self, _: dict[str, Any]) -> dict[str, Any]:
        vocabulary, table = self._vocabulary, self._engine.loaded.table
        return {
            "f_grams": 0 if vocabulary is None else vocabulary.num_f_grams,
            "max_n": 1 if vocabulary is None else vocabulary.max_n,
            "table": None if table is None else table.describe(),
            "baseline": self._baseline is not None,
        }

    # ------------------------------------------------------------------ tokens and f-grams

    @property
    def _vocabulary(self) -> Any:
        return getattr(self._engine.model, "vocabulary", None)

    def _inspect(self, asked: dict[str, Any]) -> dict[str, Any]:
        ids = self._ids(self._engine, asked)
        matcher = getattr(self._engine.model, "matcher", None)
        if matcher is None:
            return {"tokens": [{"text": self._text([token]), "length": 1} for token in ids]}
        return {"tokens": [self._described(record) for record in inspect_tokens(np.array(ids, np.int64), matcher)]}

    def _described(self, record: InspectedToken) -> dict[str, Any]:
        return {
            "text": self._text([record.token]),
            "length": record.match_length,
            "node": record.node,
            "f_gram": self._text(record.f_gram),
            "rank": record.rank,
            "count": record.count,
        }

    def _neighbours(self, asked: dict[str, Any]) -> dict[str, Any]:
        vocabulary = self._vocabulary
        node = asked.get("node")
        if vocabulary is None or not isinstance(node, int) or not 0 <= node < vocabulary.num_nodes:
            raise SconeError(f"found node {node!r}; expected a token or an f-gram of the model")
        with self._lock:  # the first question builds what all use
            directions = self._directions
        vector = self._batcher.call(partial(self._vectors, np.array([node]))).result()[0]
        cosines = directions @ torch.nn.functional.normalize(vector, dim=0)
        best = cosines.topk(min(NEIGHBOURS + 1, len(cosines)))
        found = [
            {"f_gram": self._text(vocabulary.tokens(vocabulary.vocab_size + rank)), "rank": rank, "cosine": cosine}
            for cosine, rank in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            if vocabulary.vocab_size + rank != node
        ]
        return {"compared": len(directions), "neighbours": found[:NEIGHBOURS]}

    @cached_property
    def _directions(self) -> Tensor:
        """The first rows at length one, [≤ COMPARED_ROWS, D]."""
        vocabulary = self._vocabulary
        count = COMPARED_ROWS if self._engine.loaded.table is not None else COMPARED_ROWS // 10
        nodes = np.arange(vocabulary.vocab_size, vocabulary.vocab_size + min(count, vocabulary.num_f_grams))
        parts = [
            self._batcher.call(partial(self._vectors, part)).result()
            for part in np.array_split(nodes, max(1, len(nodes) // 1024))  # other requests get in between
        ]
        return torch.nn.functional.normalize(torch.cat(parts), dim=1)

    def _vectors(self, nodes: np.ndarray) -> Tensor:
        """The input embeddings of nodes, fp32 [n, D] on the host: rows of the table, or computed live."""
        model: Any = self._engine.model
        table, size = self._engine.loaded.table, model.config.vocab_size
        if table is None:
            return model.embed_nodes(torch.from_numpy(nodes)).cpu()
        if nodes.min() < size:
            return model.get_input_embeddings().weight[torch.from_numpy(nodes).to(device_of(model))].float().cpu()
        return table.rows(torch.from_numpy(nodes - size)).float().cpu()

    # ------------------------------------------------------------------ next tokens

    def _next(self, asked: dict[str, Any]) -> dict[str, Any]:
        models = {"scone": self._engine} | ({"baseline": self._baseline} if self._baseline is not None else {})
        prompts = {name: self._ids(engine, asked) for name, engine in models.items()}
        if not all(prompts.values()):
            raise SconeError("found an empty text; expected some text to continue; write some")
        return {
            name: self._batcher.call(partial(_next_tokens, engine, prompts[name])).result()
            for name, engine in models.items()
        }

    def _ids(self, engine: SconeInferenceEngine, asked: dict[str, Any]) -> list[int]:
        text = asked.get("text")
        if not isinstance(text, str):
            raise SconeError("found no text; expected a string; give text")
        ids = list(engine.tokenizer(text, add_special_tokens=False).input_ids)
        if len(ids) > MAX_TEXT_TOKENS:
            raise SconeError(f"found {len(ids)} tokens; expected at most {MAX_TEXT_TOKENS}; shorten the text")
        return engine.prompt_ids(ids) if ids else []

    def _text(self, ids: Any) -> str:
        return str(self._engine.tokenizer.decode(list(ids)))


@torch.inference_mode()
def _next_tokens(engine: SconeInferenceEngine, ids: list[int]) -> list[dict[str, Any]]:
    """The likeliest tokens after ``ids`` with their probabilities."""
    model = engine.model
    logits = model(input_ids=torch.tensor([ids], device=device_of(model)), use_cache=False).logits[0, -1]
    best = logits.float().softmax(-1).topk(min(NEXT_TOKENS, len(logits)))
    return [
        {"text": str(engine.tokenizer.decode([token])), "probability": probability}
        for probability, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
