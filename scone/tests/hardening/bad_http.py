"""What strangers may send to a server: requests with forged fields, any bytes as a body, any bytes as a connection."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request

from hypothesis import strategies as st

from scone.tests.hardening.hostile import damaged, forged

COMPLETION = {"model": "tiny", "prompt": "the cat", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "stop": ["x"]}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 2, "stream": False, "n": 1}
REQUEST = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 42\r\n"
    b'Connection: close\r\n\r\n{"model":"tiny","prompt":"a","max_tokens":1'
)
COMPLETIONS, CHATS, CONNECTION = "/v1/completions", "/v1/chat/completions", ""
SERVER_OPTIONS = ("--max_new_tokens", "4", "--max_seconds", "5")


def _sent(path: str, content: st.SearchStrategy[bytes]) -> st.SearchStrategy[tuple[str, bytes]]:
    return content.map(lambda body: (path, body))


KINDS: dict[str, st.SearchStrategy[tuple[str, bytes]]] = {
    "forged completions": _sent(COMPLETIONS, forged(COMPLETION).map(lambda body: json.dumps(body).encode())),
    "forged chats": _sent(CHATS, forged(CHAT).map(lambda body: json.dumps(body).encode())),
    "any bytes": _sent(COMPLETIONS, damaged(json.dumps(COMPLETION).encode()) | st.binary(max_size=200)),
    "any connection": _sent(CONNECTION, damaged(REQUEST) | st.binary(min_size=1, max_size=200)),
}
"""(path, body) by kind; a path "" stands for bytes that are sent as they are, head and all."""


def post(address: str, path: str, body: bytes) -> tuple[int, bytes]:
    """Status and body of the answer."""
    request = urllib.request.Request(address + path, body, {"Content-Type": "application/json"}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def connect(address: str, content: bytes) -> bytes:
    """The first bytes of what is answered to a connection that sends ``content`` and then nothing more."""
    host, _, port = address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(10)
        return connection.recv(65536)


def sent(address: str, path: str, content: bytes) -> int:
    """Send one input; the status of the answer, 400 where the connection is closed without one."""
    if path != CONNECTION:
        return post(address, path, content)[0]
    answer = connect(address, content)
    return int(answer.split(b" ", 2)[1]) if answer else 400


def assert_alive(address: str) -> None:
    """It answers an ordinary request."""
    assert post(address, COMPLETIONS, json.dumps(COMPLETION).encode())[0] == 200
