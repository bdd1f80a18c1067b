"""The OpenAI-compatible form of requests and answers: JSON in, checked options out, and back."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from scone.inference.engine import GenerationOptions, SconeInferenceEngine
from scone.inference.streaming import GeneratedSequence
from scone.models.trunk import longest_sequence
from scone.utils.errors import SconeError

DEFAULT_NEW_TOKENS, MAX_PROMPTS = 16, 64
Stops = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    Field(max_length=8),
]


class RequestError(SconeError):
    """A request that cannot be answered, with the HTTP status and OpenAI's code for it."""

    def __init__(self, message: str, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def error_body(error: BaseException) -> dict[str, Any]:
    """The JSON of an error, in OpenAI's form."""
    kind = "server_error" if getattr(error, "status", 400) in (429, 500, 503) else "invalid_request_error"
    return {"error": {"message": str(error), "type": kind, "param": None, "code": getattr(error, "code", None)}}


class RequestPart(BaseModel):
    """An object of a request. Clients send null for what they leave to the server: it is as good as not there."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

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

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=10)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    n: int = Field(1, ge=1, le=32)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Stops = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None
    presence_penalty: float = Field(0, ge=0, le=0)  # accepted at the values that ask for nothing
    frequency_penalty: float = Field(0, ge=0, le=0)

    def generation_options(self) -> GenerationOptions:
        """The engine's options; lengths are each sequence's own, the seed the job's."""
        if self.temperature == 0:
            return GenerationOptions(repetition_penalty=self.repetition_penalty)
        names = ("temperature", "top_p", "top_k", "repetition_penalty")
        return GenerationOptions(do_sample=True, **{name: getattr(self, name) for name in names})

    def sequences(self, engine: SconeInferenceEngine, most: int) -> list[GeneratedSequence]:
        """``n`` sequences for each prompt. Raises SconeError for what the engine refuses and what is too long.

        Who asks for no length gets OpenAI's: 16 tokens of a completion, and of a chat all that there is room for, at
        ``most`` so many.
        """
        is_chat = isinstance(self, ChatRequest)
        wanted = (self.max_completion_tokens if isinstance(self, ChatRequest) else None) or self.max_tokens
        if wanted is not None and wanted > most:
            raise RequestError(f"found max_tokens {wanted}; expected at most {most}; ask for fewer")
        context, sequences = longest_sequence(engine.model.config), []
        for ids in self.prompts(engine):
            room = most if context is None else context - len(ids)
            if room < (wanted or 1):
                raise RequestError(
                    f"found a prompt of {len(ids)} tokens to be continued by {wanted or 1}; the model has {context} "
                    "positions; shorten the prompt or ask for fewer tokens",
                    code="context_length_exceeded",
                )
            length = wanted or min(room, most if is_chat else DEFAULT_NEW_TOKENS, most)
            stop = tuple(self.stop)
            sequences += [GeneratedSequence(ids, length, stop, wants_text=True) for _ in range(self.n)]
        return sequences

    def prompts(self, engine: SconeInferenceEngine) -> list[list[int]]:
        """The tokens of each prompt. Raises SconeError."""
        raise NotImplementedError


class Question(RequestPart):
    """What the page asks about."""

    text: str


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``: one or several prompts, as text or as token ids."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: Literal[False] = False

    def prompts(self, engine: SconeInferenceEngine) -> list[list[int]]:
        """The tokens of each prompt. Raises SconeError for none, too many, and what the engine refuses."""
        given: Any = self.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        if not 1 <= len(given) <= MAX_PROMPTS:
            found = f"{len(given)} prompts" if given else "no prompt"
            raise RequestError(f"found {found}; expected 1 to {MAX_PROMPTS}; give as many, or send them one by one")
        return [engine.prompt_ids(prompt) for prompt in given]


class ChatPart(RequestPart):
    """A piece of a message; only text is understood."""

    type: Literal["text"]
    text: str


class ChatMessage(RequestPart):
    """One message of a conversation. An assistant's may have no content (it called tools): as good as an empty one."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ChatPart] | None = None

    @model_validator(mode="after")
    def has_content(self) -> ChatMessage:
        """Refuse other messages without content."""
        if self.content is None and self.role != "assistant":
            raise ValueError(f"found a message of the {self.role} without content")
        return self

    def text(self) -> str:
        """The message's text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    def prompts(self, engine: SconeInferenceEngine) -> list[list[int]]:
        """The conversation in the words of the tokenizer's chat template. Raises RequestError when it has none."""
        tokenizer = engine.tokenizer
        if not tokenizer.chat_template:
            raise RequestError(
                "found a tokenizer without a chat template, which chat completions need; use /v1/completions, or save "
                "the model's tokenizer with a chat_template",
                code="no_chat_template",
            )
        messages = [{"role": message.role, "content": message.text()} for message in self.messages]
        try:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # the template is a program of the model's makers, which may refuse a conversation
            raise RequestError(f"the chat template refuses these messages: {error}") from error
        return [engine.prompt_ids(tokenizer(str(text), add_special_tokens=False).input_ids)]


Request = TypeVar("Request", bound=BaseModel)


def parse(kind: type[Request], body: bytes) -> Request:
    """The request in ``body``. Raises RequestError that names the first thing wrong with it."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        found = json.dumps(first.get("input"), default=str, ensure_ascii=False)[:100]
        raise RequestError(f"{where}: {first['msg']} (found {found})") from error


class Answer:
    """Builds the JSON of one answer, whole or in chunks."""

    def __init__(self, model: str, is_chat: bool) -> None:
        self._is_chat = is_chat
        name = ("chatcmpl-" if is_chat else "cmpl-") + uuid.uuid4().hex
        self._fixed = {"id": name, "created": int(time.time()), "model": model}

    def whole(self, sequences: Sequence[GeneratedSequence]) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        choices = []
        for index, sequence in enumerate(sequences):
            text = sequence.text
            content = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
            choices.append({"index": index, "finish_reason": finish_reason(sequence), "logprobs": None} | content)
        kind = "chat.completion" if self._is_chat else "text_completion"
        return self._fixed | {"object": kind, "choices": choices, "usage": usage(sequences)}

    def chunk(self, index: int, text: str, reason: str | None = None, first: bool = False) -> dict[str, Any]:
        """A piece of the text of sequence ``index``, or its end."""
        delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        content = {"delta": delta} if self._is_chat else {"text": text}
        return self.end(choices=[{"index": index, "finish_reason": reason, "logprobs": None} | content])

    def end(self, **more: Any) -> dict[str, Any]:
        """A chunk without text: the last one of a stream whose client asked for its usage."""
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return self._fixed | {"object": kind, "choices": []} | more


def finish_reason(sequence: GeneratedSequence) -> str:
    """OpenAI's word for why a sequence ended."""
    return "stop" if sequence.finish_reason == "stop" else "length"


def usage(sequences: Sequence[GeneratedSequence]) -> dict[str, int]:
    """Tokens read (each prompt once) and written."""
    prompt = sum(len(ids) for ids in {id(one.prompt_ids): one.prompt_ids for one in sequences}.values())
    written = sum(len(one.token_ids) for one in sequences)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
