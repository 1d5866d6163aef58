"""The HTTP client against a real socket: answers whole, in pieces, cut off, and errors."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import pytest

from biscale_gym.live.errors import LiveError
from biscale_gym.live.http_client import ServerGone, ServerRefused, Url, events, fetch

HEAD = b"HTTP/1.1 200 OK\r\n"


def answered(answer: bytes, streamed: bool = False, body: Any = None, pieces: int = 0) -> tuple[Any, bytes]:
    """What the client makes of a server's answer, and what the server was sent.

    Args:
        answer: the server's, after which it hangs up.
        streamed: whether events are asked for.
        body: of the request.
        pieces: the answer comes in so many bytes at a time; 0: at once.
    """
    received = b""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        received = await reader.readuntil(b"\r\n\r\n")
        if body is not None:
            received += await reader.readexactly(len(json.dumps(body).encode()))
        for at in range(0, len(answer), pieces or len(answer) or 1):
            writer.write(answer[at : at + (pieces or len(answer))])
            await writer.drain()
        writer.close()

    async def ask() -> Any:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            url = Url.parsed(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/at/")
            if not streamed:
                return await fetch(url, "/it", body, {"X-Request-Id": "7"})
            async with contextlib.aclosing(events(url, "/it", body)) as answers:
                return [event async for event in answers]

    return asyncio.run(ask()), received


def chunked(*parts: bytes) -> bytes:
    lines = [b"%x\r\n%s\r\n" % (len(part), part) for part in (*parts, b"")]
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(lines)


@pytest.mark.parametrize("pieces", [0, 1, 7])
@pytest.mark.parametrize(
    "answer", [HEAD + b"content-length: 11\r\n\r\nhello world", chunked(b"hello", b" world"), HEAD + b"\r\nhello world"]
)
def test_a_whole_answer(answer: bytes, pieces: int) -> None:
    said, received = answered(answer, pieces=pieces)
    assert said == b"hello world"
    assert received.startswith(b"GET /at/it HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nX-Request-Id: 7\r\n" in received


def test_a_body_is_sent_as_json() -> None:
    _, received = answered(HEAD + b"Content-Length: 0\r\n\r\n", body={"prompt": [5, 6]})
    assert received.startswith(b"POST /at/it HTTP/1.1\r\n")
    assert received.endswith(b'\r\n\r\n{"prompt": [5, 6]}')


@pytest.mark.parametrize("pieces", [0, 1])
def test_events_come_one_by_one(pieces: int) -> None:
    answer = chunked(b'data: {"a": 1}\n\ndata: {"a"', b": 2}\n\n: a comment\n", b"data: [DONE]\n\n")
    assert answered(answer, True, {}, pieces)[0] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    "answer",
    [b"", HEAD, HEAD + b"Content-Length: 20\r\n\r\nhello", chunked(b"hello")[:-9], b"no HTTP at all\r\n\r\n"],
    ids=["nothing", "half a head", "short", "half chunks", "nonsense"],
)
def test_an_answer_that_is_cut_off_is_a_server_that_is_gone(answer: bytes) -> None:
    with pytest.raises(ServerGone, match=r"http://127\.0\.0\.1"):
        answered(answer)


def test_events_without_an_end_are_a_server_that_is_gone() -> None:
    with pytest.raises(ServerGone, match="cut off"):
        answered(chunked(b'data: {"a": 1}\n\n'), True, {})


def test_errors_of_the_server_are_told() -> None:
    refusal = b"HTTP/1.1 404 Not Found\r\nContent-Length: 8\r\n\r\nno model"
    for streamed in (False, True):
        with pytest.raises(ServerRefused, match="/it answered 404: no model"):
            answered(refusal, streamed, {})
    with pytest.raises(ServerRefused, match="KV could not be fetched"):
        answered(chunked(b'data: {"error": {"message": "KV could not be fetched"}}\n\n'), True, {})


def test_a_refused_connection_is_a_server_that_is_gone(unused_port: int) -> None:
    with pytest.raises(ServerGone, match=f"http://127.0.0.1:{unused_port}: .*[Cc]onnect"):
        asyncio.run(fetch(Url.parsed(f"http://127.0.0.1:{unused_port}"), "/"))


@pytest.fixture
def unused_port() -> int:
    from biscale_gym.live.pool import free_port

    return free_port()


def test_addresses() -> None:
    assert Url.parsed("https://host/v/").secure
    assert Url.parsed("https://host/v/").port == 443
    assert Url.parsed("http://[::1]:8100").host == "::1"
    for wrong in ("host:8100", "ftp://host", "http://", "http://host:http", "http://host:99999"):
        with pytest.raises(LiveError, match="not a URL of a server"):
            Url.parsed(wrong)
