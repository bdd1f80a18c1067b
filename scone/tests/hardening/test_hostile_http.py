"""A server and what strangers may send it: any bytes, any JSON. It answers 4xx or closes, and goes on serving."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scone.tests.hardening import hostile
from scone.tests.hardening.hostile import damaged, forged
from scone.tests.inference.served import make_model, server

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
FUZZ = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
COMPLETION = {"model": "tiny", "prompt": "the cat", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "stop": ["x"]}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 2, "stream": False, "n": 1}
REQUEST = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 42\r\n"
    b'Connection: close\r\n\r\n{"model":"tiny","prompt":"a","max_tokens":1'
)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = make_model(tmp_path_factory.mktemp("served"))
    with server(folder, "--max_new_tokens", "4", "--max_seconds", "5") as (where, _):
        yield where.rstrip("/")


def post(address: str, path: str, body: bytes) -> int:
    """The status of the answer."""
    request = urllib.request.Request(address + path, body, {"Content-Type": "application/json"}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            answer.read()
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def assert_alive(address: str) -> None:
    assert post(address, "/v1/completions", json.dumps(COMPLETION).encode()) == 200


@pytest.mark.slow
@pytest.mark.parametrize(("path", "body"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)])
@FUZZ
@given(data=st.data())
def test_forged_requests_are_answered(address: str, path: str, body: dict, data: st.DataObject) -> None:
    status = post(address, path, json.dumps(data.draw(forged(body))).encode())
    assert status == 200 or 400 <= status < 500, status


@pytest.mark.slow
@FUZZ
@given(body=damaged(json.dumps(COMPLETION).encode()) | st.binary(max_size=200))
def test_bodies_of_any_bytes_are_answered(address: str, body: bytes) -> None:
    assert 200 <= post(address, "/v1/completions", body) < 500


@pytest.mark.slow
def test_bodies_that_are_bombs_are_refused(address: str) -> None:
    for body in (hostile.deep_json(), '{"prompt":' * 20_000, '{"max_tokens": ' + "9" * 5000 + "}"):
        assert 400 <= post(address, "/v1/completions", body.encode()) < 500
    assert_alive(address)


@pytest.mark.slow
@settings(FUZZ, max_examples=30)
@given(content=damaged(REQUEST) | st.binary(min_size=1, max_size=200))
def test_connections_of_any_bytes_do_no_harm(address: str, content: bytes) -> None:
    host, _, port = address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(10)
        answer = connection.recv(65536)
    assert not answer.startswith(b"HTTP/1.1 5"), answer[:100]


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", ["/../../etc/passwd", "/page/../../x", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/\0"]
)
def test_paths_do_not_leave_the_page(address: str, path: str) -> None:
    host, _, port = address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = connection.recv(65536)
    assert b" 200 " not in answer.split(b"\r\n")[0]
    assert b"root:" not in answer
    assert_alive(address)
