"""A server and what strangers may send it: any bytes, any JSON. It answers 4xx or closes, and goes on serving."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from scone.tests.hardening.bad_http import KINDS, SERVER_OPTIONS, assert_alive, sent
from scone.tests.inference.served import make_model, server

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
FUZZ = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = make_model(tmp_path_factory.mktemp("served"))
    with server(folder, *SERVER_OPTIONS) as (where, _):
        yield where.rstrip("/")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_bad_requests_are_answered(address: str, kind: str) -> None:
    @FUZZ
    @given(KINDS[kind])
    def law(request: tuple[str, bytes]) -> None:
        assert 200 <= sent(address, *request) < 500

    law()
    assert_alive(address)


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
