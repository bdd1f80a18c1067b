"""The server as its clients see it: a real process, the `openai` package, a browser, bad requests, who leaves."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from scone.inference.engine import GenerationOptions, SconeInferenceEngine
from scone.scripts import serve as serve_script
from scone.tests import tiny
from scone.tests.inference.chromium import Browser
from scone.tests.inference.served import TEMPLATE, make_model, server, server_process

pytest.importorskip("fastapi", reason="the extra serve is not installed")
openai = pytest.importorskip("openai", reason="the openai client is not installed")

from scone.inference.serve import GenerationJob, Scheduler  # noqa: E402 (needs the extra)
from scone.inference.serve_protocol import ChatRequest, RequestError  # noqa: E402

ORIGIN, CHAT = "https://chat.example:8080", "/v1/chat/completions"
PROMPTS = ["the cat", "a dog ran under the hill and then", "it slept", "é \U0001f600", "mat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> SconeInferenceEngine:
    return SconeInferenceEngine.from_pretrained(folder, folder / "embeddings.cache", device="cpu")


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with server(folder, "--max_new_tokens", "200", "--cors_origin", ORIGIN) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0) as client:
        yield client


def expected(engine: SconeInferenceEngine, prompt: str, new_tokens: int) -> str:
    """What the engine adds to the prompt, greedily."""
    return "".join(engine.stream(prompt, GenerationOptions(max_new_tokens=new_tokens)))


def post(address: str, path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"} | headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def metrics(address: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def completion(prompt: Any = "the cat", **options: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0} | options


def chat(*messages: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": 5, "temperature": 0, "messages": list(messages)} | options


def job(engine: SconeInferenceEngine, new_tokens: int, copies: int = 1) -> GenerationJob:
    options = GenerationOptions(max_new_tokens=new_tokens)
    return GenerationJob([engine.sequence("mat", options) for _ in range(copies)], options)


BAD = {
    "empty prompt": (completion(""), 400, "found an empty prompt"),
    "no prompt": (completion([]), 400, "found no prompt"),
    "beyond the context": (completion("the cat " * 200), 400, "the model has 256 positions"),
    "too little room": (completion("the cat " * 76, max_tokens=200), 400, "the model has 256 positions"),
    "a chat beyond the context": (chat({"role": "user", "content": "the cat " * 300}), 400, "256 positions", CHAT),
    **{
        f"a silent {role}": (chat({"role": role, "content": None}), 400, f"message of the {role} without content", CHAT)
        for role in ("user", "system", "tool")
    },
    "another path": (completion(), 404, "found no POST /nowhere here", "/nowhere"),
    "another method": (completion(), 405, "found no POST /v1/models here", "/v1/models"),
    "outside the vocabulary": (completion([5, 300]), 400, "found token 300"),
    "negative token": (completion([-1]), 400, "found token -1"),
    "too many tokens": (completion(max_tokens=201), 400, "expected at most 200"),
    "another model": (completion(model="other"), 404, "this server has 'tiny'"),
    "unknown option": (completion(logit_bias={}), 400, "logit_bias"),
    "what is not offered": (completion(logprobs=3), 400, "logprobs"),
    "an echo": (completion(echo=True), 400, "echo"),
    "wrong type": (completion(temperature="hot"), 400, "temperature"),
    "not a number": (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', 400, ""),
    "not JSON": (b"{", 400, "the body"),
    "not UTF-8": (b'{"model": "\xff"}', 400, ""),
    "not an object": (b"[]", 400, "the body"),
    "empty stop": (completion(stop=[""]), 400, "stop"),
    "too many stops": (completion(stop=list("abcdefghi")), 400, "stop"),
    "too large": (b" " * (5 << 20), 413, "bytes"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_requests_get_one_clear_line(address: str, name: str) -> None:
    body, status, message, *path = BAD[name]
    found, answer = post(address, *(path or ["/v1/completions"]), body)
    assert found == status
    assert message in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]
    assert "--" not in answer["error"]["message"]
    assert (answer["error"]["code"] == "context_length_exceeded") == ("positions" in message)


def test_32_clients_at_once_get_the_engines_answers(address: str, client: Any, engine: SconeInferenceEngine) -> None:
    """Every fourth request is a bad one; the others are batched together and differ in length."""

    def ask(number: int) -> tuple[int, str]:
        if number % 4 == 3:
            body, status, *_ = list(BAD.values())[number // 4]
            assert post(address, "/v1/completions", body)[0] == status
            return number, ""
        prompt, length = PROMPTS[number % len(PROMPTS)], 5 + number
        arguments = completion(prompt, max_tokens=length)
        if number % 2:
            pieces = client.completions.create(**arguments, stream=True)
            return number, "".join(piece.choices[0].text for piece in pieces)
        return number, client.completions.create(**arguments).choices[0].text

    with ThreadPoolExecutor(32) as clients:
        answers = dict(clients.map(ask, range(32)))
    for number, text in answers.items():
        if number % 4 != 3:
            assert text == expected(engine, PROMPTS[number % len(PROMPTS)], 5 + number), number
    found = metrics(address)
    assert found["scone_batch_sequences_total"] > found["scone_batches_total"], "some requests shared a batch"
    assert found['scone_requests_total{status="200"}'] >= 24
    assert found["scone_waiting_requests"] == found["scone_running_sequences"] == 0


def test_completions_know_the_options_that_clients_use(client: Any, engine: SconeInferenceEngine) -> None:
    whole = expected(engine, "the cat", 20)
    stop = whole[6:9]
    stopped = client.completions.create(**completion(max_tokens=20, stop=[stop]))
    assert stopped.choices[0].text == whole.partition(stop)[0]
    assert stopped.choices[0].finish_reason == "stop"
    several = client.completions.create(**completion(["mat", "the cat"], max_tokens=4, n=2))
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[2].text == several.choices[3].text == expected(engine, "the cat", 4)
    assert several.usage.completion_tokens == 16
    ids = engine.tokenizer("the cat").input_ids
    by_ids = client.completions.create(**completion(ids, max_tokens=4))
    assert by_ids.choices[0].text == expected(engine, "the cat", 4)
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_seed_decides_its_sample_whoever_else_asks(client: Any) -> None:
    arguments = completion(max_tokens=12, temperature=1.5)
    alone = client.completions.create(**arguments, seed=3).choices[0].text
    with ThreadPoolExecutor(8) as clients:
        crowd = [clients.submit(client.completions.create, **arguments, seed=seed) for seed in (3, 4, 3, 5)]
        texts = [one.result().choices[0].text for one in crowd]
    assert texts[0] == texts[2] == alone
    assert len(set(texts)) == 3


def test_chat(client: Any, engine: SconeInferenceEngine) -> None:
    messages = [{"role": "user", "content": "the cat"}, {"role": "user", "content": [{"type": "text", "text": "sat"}]}]
    arguments = {"model": "tiny", "messages": messages, "max_completion_tokens": 9, "temperature": 0}
    text = expected(engine, "user: the cat\nuser: sat\nassistant:", 9)
    assert client.chat.completions.create(**arguments).choices[0].message.content == text
    chunks = list(client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == 9


def test_an_assistant_that_called_tools_may_say_nothing(address: str) -> None:
    user, tool = {"role": "user", "content": "the cat"}, {"role": "tool", "content": "mat", "tool_call_id": "1"}
    calls = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function"}]}
    answers = [
        post(address, CHAT, chat(user, each, tool))
        for each in (calls, calls | {"content": None}, calls | {"content": ""})
    ]
    assert [status for status, _ in answers] == [200] * 3, answers
    assert answers[0][1]["choices"] == answers[1][1]["choices"] == answers[2][1]["choices"]


def test_chat_without_a_template_is_refused(engine: SconeInferenceEngine) -> None:
    asked = ChatRequest(model="tiny", messages=[{"role": "user", "content": "x"}])
    engine.tokenizer.chat_template = None
    try:
        with pytest.raises(RequestError, match="without a chat template"):
            asked.prompts(engine)
    finally:
        engine.tokenizer.chat_template = TEMPLATE


@pytest.mark.parametrize(("stream", "reads"), [(True, True), (False, False)])
def test_clients_that_leave_free_their_work(address: str, stream: bool, reads: bool) -> None:
    before = metrics(address)
    # at random, so that not all of them end early
    wanted = completion(["the cat"] * 16, max_tokens=200, stream=stream, temperature=10)
    body = json.dumps(wanted).encode()
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        if reads:
            connection.recv(100)
    for _ in range(600):
        found = metrics(address)
        if (
            found["scone_running_sequences"] == 0
            and found["scone_disconnects_total"] > before["scone_disconnects_total"]
        ):
            break
        time.sleep(0.05)
    assert found["scone_disconnects_total"] == before["scone_disconnects_total"] + 1
    assert found["scone_running_sequences"] == 0
    # left to themselves, 16 sequences of up to 200 tokens write 2,300 on average
    assert found["scone_generated_tokens_total"] - before["scone_generated_tokens_total"] < 1400
    assert post(address, "/v1/completions", completion())[0] == 200


def test_strangers_are_kept_out(address: str) -> None:
    """A web page elsewhere can neither send JSON without being asked first, nor use a name of its own for us."""
    assert post(address, "/v1/completions", completion(), **{"Content-Type": "text/plain"})[0] == 415
    for method in ("HEAD", "GET"):
        assert urllib.request.urlopen(urllib.request.Request(f"{address}/health", method=method)).status == 200
    request = urllib.request.Request(f"{address}/health", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request, timeout=60)


def test_pages_that_may_call_are_told_so_and_others_are_not(address: str) -> None:
    def allowed(origin: str, method: str, **headers: str) -> str | None:
        url, head = f"{address}/v1/completions", {"Origin": origin} | headers
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=head, method=method), timeout=60) as answer:
                return answer.headers["access-control-allow-origin"]
        except urllib.error.HTTPError as error:
            with error:
                return error.headers["access-control-allow-origin"]

    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    assert allowed(ORIGIN, "OPTIONS", **asked) == ORIGIN
    assert allowed(ORIGIN, "GET") == ORIGIN  # a refusal is for the page to read
    assert allowed("https://evil.example", "OPTIONS", **asked) is None
    assert allowed("https://evil.example", "GET") is None


@pytest.mark.parametrize("origin", ["chat.example", "https://chat.example/page", "null", ""])
def test_an_origin_that_no_browser_sends_is_refused(folder: Path, origin: str) -> None:
    argv = ["--model_path", str(folder), "--cors_origin", origin]
    assert "expected a web page's origin" in tiny.refusal(serve_script.main, argv)


NULLS = {
    "/v1/completions": "temperature top_p n stream echo logprobs logit_bias suffix best_of max_tokens seed stop "
    "stream_options user presence_penalty top_k repetition_penalty",
    CHAT: "temperature n stream tools response_format max_completion_tokens stop",
}


@pytest.mark.parametrize("path", NULLS)
def test_null_is_as_good_as_not_there(address: str, path: str) -> None:
    given = {"prompt": "the cat"}
    if path == CHAT:
        given = {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "the cat", "x": None}], "name": None}]
        }  # type: ignore[dict-item]
    body = {"model": "tiny", "seed": 7, "max_tokens": 5} | given
    status, plain = post(address, path, body)
    assert status == 200, plain
    nulls = {name: None for name in NULLS[path].split() if name not in body}
    status, answer = post(address, path, body | nulls | {"stream_options": {"include_usage": None}})
    assert status == 200, answer
    assert answer["choices"] == plain["choices"]
    assert post(address, path, body | {"model": None})[0] == 400  # what must be there is asked for


def test_who_asks_for_no_length_gets_16_tokens_of_a_completion_and_all_of_a_chat(address: str) -> None:
    """The model's own end, or the context's (256 positions), or the server's limit (200)."""
    body = {"model": "tiny", "temperature": 0}
    _, answer = post(address, "/v1/completions", body | {"prompt": "the cat"})
    assert answer["usage"]["completion_tokens"] <= 16
    short, long = "the cat", "the cat sat on the mat " * 12
    for text in (short, long):
        _, answer = post(address, CHAT, body | {"messages": [{"role": "user", "content": text}]})
        used, end = answer["usage"], answer["choices"][0]["finish_reason"]
        assert end == "stop" or used["completion_tokens"] == min(200, 256 - used["prompt_tokens"])
        assert end == "length" or used["completion_tokens"] > 0


TEXT = "the cat sat on the mat"
HOSTILE = '<b>bold</b> & <script>document.title="owned"</script><img src=x onerror=document.title="owned">'
TOKENS = "[...document.querySelectorAll('#tokens .token')]"


def type_text(browser: Browser, text: str) -> None:
    browser.evaluate(f"(() => {{ const t = $('text'); t.value = {json.dumps(text)}; "
                     "t.dispatchEvent(new Event('input')); })()")  # fmt: skip
    browser.wait_for(f"{TOKENS}.map((one) => one.textContent).join('') === {json.dumps(text)}")


def test_the_page_shows_what_the_model_sees(address: str, engine: SconeInferenceEngine, tmp_path: Path) -> None:
    """In a real browser: tokens with their f-grams, generating, hostile text."""
    with Browser(tmp_path / "profile") as browser:
        browser.open(f"{address}/")
        type_text(browser, TEXT)

        # tokens are coloured by the length of their match
        ids = engine.tokenizer(TEXT).input_ids
        vocabulary = engine.model.vocabulary
        nodes = engine.model.matcher.match(ids).tolist()
        lengths = [len(vocabulary.tokens(node)) for node in nodes]
        assert max(lengths) > 2
        classes = browser.evaluate(f"{TOKENS}.map((one) => one.className)")
        assert [f"length-{length}" in name for length, name in zip(lengths, classes, strict=True)] == [True] * len(ids)
        for scheme, color in {"light": "rgb(251, 227, 200)", "dark": "rgb(74, 53, 36)"}.items():
            browser.prefer(scheme)
            legend = "getComputedStyle(document.querySelector('#legend .length-2')).backgroundColor"
            assert browser.evaluate(legend) == color

        # pointing at one shows its f-gram, rank and count
        place = lengths.index(max(lengths))
        browser.point_at(f"{TOKENS}[{place}]")
        rank = nodes[place] - vocabulary.vocab_size
        browser.wait_for(f"$('f-gram').innerText.includes('rank {rank} · {vocabulary.counts[rank]} times')")
        assert browser.evaluate(f"{TOKENS}.filter((one) => one.classList.contains('part')).length") == lengths[place]

        # generating
        browser.evaluate("$('generate').click()")
        continued = "".join(engine.stream(TEXT, GenerationOptions(max_new_tokens=40)))
        browser.wait_for(f"$('written')?.textContent === {json.dumps(continued)} && !$('take').disabled")

        # text is text, whatever it looks like
        type_text(browser, HOSTILE)
        assert browser.evaluate("document.querySelectorAll('main img, main script, main b').length") == 0
        assert browser.evaluate("document.title") == "SCONE"
        assert browser.evaluate("$('error').hidden")


def test_key_and_shutdown_while_a_client_is_served(folder: Path) -> None:
    with server_process(folder, "secret") as (address, process):
        assert post(address, "/v1/completions", completion())[0] == 401
        assert post(address, "/page/inspect", {"text": "x"})[0] == 401
        authorized = {"Authorization": "Bearer secret"}
        assert post(address, "/v1/completions", completion(), **authorized)[0] == 200
        with openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0) as client:
            stream = client.completions.create(model="tiny", prompt="the cat", max_tokens=240, stream=True)
            next(iter(stream))
            process.send_signal(signal.SIGTERM)
            for _ in stream:
                pass
        assert process.wait(timeout=60) == 0


def test_a_full_queue_is_refused_and_closing_tells_those_who_wait(engine: SconeInferenceEngine) -> None:
    async def law() -> None:
        scheduler = Scheduler(engine, max_batch=1, max_waiting=1)
        running, waiting = job(engine, 200), job(engine, 3)
        begun = threading.Event()
        running.sequences[0].on_text = lambda text: begun.set()
        scheduler.submit(running)
        await asyncio.to_thread(begun.wait)
        scheduler.submit(waiting)
        with pytest.raises(RequestError, match="queue full"):
            scheduler.submit(job(engine, 3))
        scheduler.close()
        with pytest.raises(RequestError, match="shutting down"):
            await waiting.done
        await running.done
        assert [one.finish_reason for one in running.sequences] == ["cancelled"]
        with pytest.raises(RequestError, match="shutting down"):
            scheduler.submit(job(engine, 3))

    asyncio.run(law())


def test_a_failing_batch_is_told_and_the_next_one_runs(engine: SconeInferenceEngine) -> None:
    async def law() -> None:
        scheduler = Scheduler(engine, max_batch=4, max_waiting=9)
        broken, fine = job(engine, 3), job(engine, 3)
        broken.options = GenerationOptions(do_sample=True, temperature=-1.0)
        scheduler.submit(broken)
        scheduler.submit(fine)
        with pytest.raises(ValueError):
            await broken.done
        await fine.done
        assert len(fine.sequences[0].token_ids) == 3

    asyncio.run(law())


def test_mistakes_are_told_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    arguments = ["--model_path", str(folder)]
    assert "--max_batch: found 0" in tiny.refusal(serve_script.main, [*arguments, "--max_batch", "0"])
    assert "found an empty API key" in tiny.refusal(serve_script.main, [*arguments, "--api_key", ""])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert "cannot listen on" in tiny.refusal(serve_script.main, ["--model_path", "missing", "--port", port])
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "scone.inference.serve")
    assert 'pip install "scone-lm[serve]"' in tiny.refusal(serve_script.main, ["--model_path", "missing"])
