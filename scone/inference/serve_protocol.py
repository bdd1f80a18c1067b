"""The OpenAI-compatible form of requests and answers: JSON in, checked options out, and back."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from scone.inference.engine import GenerationOptions, SconeInferenceEngine
from scone.inference.loading import position_limit
from scone.inference.streaming import Continuation
from scone.utils.errors import SconeError

DEFAULT_NEW_TOKENS = 16
MAX_STOPS = 8


class RequestError(Exception):
    """A request that cannot be answered, with the HTTP status and OpenAI's words for it."""

    def __init__(self, status: int, message: str, code: str | None = None, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.kind = status, message, code, kind

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        return {"error": {"message": self.message, "type": self.kind, "param": None, "code": self.code}}


class RequestPart(BaseModel):
    """An object of a request. Clients send null for what they leave to the server: it is as good as not there."""

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, value: Any) -> Any:
        """The object without its nulls."""
        return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


class StreamOptions(RequestPart):
    """What a stream ends with."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class GenerationRequest(RequestPart):
    """What completions and chat completions share. Options that are not here are refused, not ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=10)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    n: int = Field(1, ge=1, le=32)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    # accepted at the values that ask for nothing
    presence_penalty: Literal[0] | float | None = Field(None, ge=0, le=0)
    frequency_penalty: Literal[0] | float | None = Field(None, ge=0, le=0)

    def generation_options(self) -> GenerationOptions:
        """The engine's options; lengths are each row's own, the seed the job's."""
        if self.temperature == 0:
            return GenerationOptions(repetition_penalty=self.repetition_penalty)
        return GenerationOptions(
            do_sample=True,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
        )

    def stops(self) -> tuple[str, ...]:
        """The strings that end a text. Raises RequestError for too many or empty ones."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stops) > MAX_STOPS or not all(stops):
            raise RequestError(
                400, f"found {len(stops)} stop strings; expected at most {MAX_STOPS}, none of them empty"
            )
        return stops


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``: one or several prompts, as text or as token ids."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool = False

    def prompts(self) -> list[str | list[int]]:
        """Each prompt. Raises RequestError when there is none."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        if not self.prompt:
            raise RequestError(400, "found no prompt; expected at least one; give prompt")
        return list(self.prompt)  # type: ignore[arg-type]


class ChatPart(RequestPart):
    """A piece of a message; only text is understood."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class ChatMessage(RequestPart):
    """One message of a conversation."""

    model_config = ConfigDict(extra="ignore", strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ChatPart]

    def text(self) -> str:
        """The message's text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    def prompt_ids(self, engine: SconeInferenceEngine) -> list[int]:
        """The conversation in the words of the tokenizer's chat template. Raises RequestError when it has none."""
        tokenizer = engine.tokenizer
        if not tokenizer.chat_template:
            raise RequestError(
                400,
                "found a tokenizer without a chat template, which chat completions need; use /v1/completions, or save "
                "the model's tokenizer with a chat_template",
                "no_chat_template",
            )
        messages = [{"role": message.role, "content": message.text()} for message in self.messages]
        try:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # the template is a program of the model's makers, which may refuse a conversation
            raise RequestError(400, f"the chat template refuses these messages: {error}") from error
        return list(tokenizer(str(text), add_special_tokens=False).input_ids)


Request = TypeVar("Request", bound=BaseModel)


def parse(kind: type[Request], body: bytes) -> Request:
    """The request in ``body``. Raises RequestError that names the first thing wrong with it."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        found = json.dumps(first.get("input"), default=str, ensure_ascii=False)[:100]
        raise RequestError(400, f"{where}: {first['msg']} (found {found})") from error


def rows_of(
    engine: SconeInferenceEngine,
    request: GenerationRequest,
    prompts: Sequence[str | list[int]],
    max_prompt_tokens: int | None,
    max_new_tokens: int,
    deadline: float,
) -> list[Continuation]:
    """``n`` rows for each prompt. Raises RequestError for a prompt that the engine refuses or that is too long.

    Who asks for no length gets OpenAI's: 16 tokens of a completion, and of a chat all that there is room for.
    """
    wanted = request.max_tokens
    if isinstance(request, ChatRequest):
        wanted = request.max_completion_tokens or wanted
    if wanted is not None and wanted > max_new_tokens:
        raise RequestError(400, f"found max_tokens {wanted}; expected at most {max_new_tokens}; ask for fewer")
    unasked = max_new_tokens if isinstance(request, ChatRequest) else min(DEFAULT_NEW_TOKENS, max_new_tokens)
    context = position_limit(engine.model)
    rows = []
    for prompt in prompts:
        try:
            ids = engine.prompt_ids(prompt)
        except SconeError as error:
            raise RequestError(400, str(error)) from error
        if max_prompt_tokens is not None and len(ids) > max_prompt_tokens:
            raise _too_long(f"found a prompt of {len(ids)} tokens; expected at most {max_prompt_tokens}; shorten it")
        room = None if context is None else context - len(ids)
        if room is not None and room < (wanted or 1):
            raise _too_long(
                f"found a prompt of {len(ids)} tokens to be continued by {wanted or 1}; the model has {context} "
                "positions; shorten the prompt or ask for fewer tokens"
            )
        length = wanted or (unasked if room is None else min(unasked, room))
        rows += [
            Continuation(ids, length, stop=request.stops(), deadline=deadline, wants_text=True)
            for _ in range(request.n)
        ]
    return rows


def _too_long(message: str) -> RequestError:
    return RequestError(400, message, "context_length_exceeded")


class Answer:
    """Builds the JSON of one answer, whole or in chunks."""

    def __init__(self, model: str, is_chat: bool) -> None:
        self._is_chat = is_chat
        self._fixed = {
            "id": ("chatcmpl-" if is_chat else "cmpl-") + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, rows: Sequence[Continuation], echoed: Sequence[str]) -> dict[str, Any]:
        """The answer to a request that does not stream; ``echoed``: what precedes each row's text."""
        choices = []
        for index, (row, before) in enumerate(zip(rows, echoed, strict=True)):
            choice: dict[str, Any] = {"index": index, "finish_reason": finish_reason(row), "logprobs": None}
            if self._is_chat:
                choice["message"] = {"role": "assistant", "content": row.text}
            else:
                choice["text"] = before + row.text
            choices.append(choice)
        kind = "chat.completion" if self._is_chat else "text_completion"
        return self._fixed | {"object": kind, "choices": choices, "usage": usage(rows)}

    def chunk(self, index: int, text: str, reason: str | None = None, first: bool = False) -> dict[str, Any]:
        """A piece of row ``index``'s text, or its end."""
        choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": None}
        if self._is_chat:
            role = {"role": "assistant"} if first else {}
            choice["delta"] = role | ({"content": text} if text or first else {})
        else:
            choice["text"] = text
        return self._chunk([choice])

    def usage_chunk(self, rows: Sequence[Continuation]) -> dict[str, Any]:
        """The last chunk of a stream whose client asked for its usage."""
        return self._chunk([]) | {"usage": usage(rows)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return self._fixed | {"object": kind, "choices": choices}


def finish_reason(row: Continuation) -> str:
    """OpenAI's word for why a row ended: running out of time is running out of length."""
    return "stop" if row.finish_reason == "stop" else "length"


def usage(rows: Sequence[Continuation]) -> dict[str, int]:
    """Tokens read (each prompt once) and written."""
    prompt = sum(len(ids) for ids in {id(row.prompt_ids): row.prompt_ids for row in rows}.values())
    written = sum(len(row.token_ids) for row in rows)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
