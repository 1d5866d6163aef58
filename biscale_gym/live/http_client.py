"""As much of an HTTP/1.1 client as talking to a vLLM server takes: one request per connection, answers as they come."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from biscale_gym.live.errors import LiveError

LINE_LIMIT = 1 << 20
"""Bytes of a line: an event with the token ids of its prompt fits."""


class ServerGone(OSError):
    """The connection was refused, broke, or ended before the answer did."""


class ServerRefused(LiveError):
    """The server answered with an error of its own."""


@dataclass(frozen=True)
class Url:
    """A server's address.

    Attributes:
        text: as it was given.
        host, port: to connect to.
        path: before every path of a request.
        secure: whether by TLS.
    """

    text: str
    host: str
    port: int
    path: str
    secure: bool

    @classmethod
    def parsed(cls, text: str) -> Url:
        """Of ``http://HOST:PORT`` or ``https://``.

        Raises:
            LiveError: it is none.
        """
        try:
            parts = urlsplit(text)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise LiveError(f"{text}: not a URL of a server ({error})") from None
        if parts.scheme not in ("http", "https") or not host:
            raise LiveError(f"{text}: not a URL of a server; expected http://HOST:PORT")
        secure = parts.scheme == "https"
        return cls(text.rstrip("/"), host, port or (443 if secure else 80), parts.path.rstrip("/"), secure)


async def _chunks(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    """The body as it comes."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readuntil(b"\r\n")
    elif "content-length" in headers:
        left = int(headers["content-length"])
        while left:
            piece = await reader.read(left)
            if not piece:
                raise ServerGone("the answer was cut off")
            left -= len(piece)
            yield piece
    else:
        while piece := await reader.read(LINE_LIMIT):
            yield piece


@asynccontextmanager
async def _answer(url: Url, path: str, body: Any | None, headers: Mapping[str, str]) -> AsyncIterator[Any]:
    """Status and an iterator of the body; the connection is closed at the end of the block, whatever ended it.

    Raises:
        ServerGone: there is no answer, or no whole one.
    """
    content = b"" if body is None else json.dumps(body).encode()
    lines = [
        f"{'GET' if body is None else 'POST'} {url.path}{path} HTTP/1.1",
        f"Host: {url.host}:{url.port}",
        "Connection: close",
        "Accept: */*",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    writer = None
    try:
        context = ssl.create_default_context() if url.secure else None
        reader, writer = await asyncio.open_connection(url.host, url.port, ssl=context, limit=LINE_LIMIT)
        writer.write("\r\n".join([*lines, "", ""]).encode() + content)
        await writer.drain()
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        received = dict(line.lower().split(": ", 1) for line in head[1:] if ": " in line)
        yield int(head[0].split()[1]), _chunks(reader, received)
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, IndexError) as error:
        if isinstance(error, LiveError):
            raise
        raise ServerGone(f"{url.text}: {error or type(error).__name__}") from error
    finally:
        if writer is not None:
            writer.close()


def _refuse(url: Url, path: str, status: int, text: bytes) -> None:
    if status >= 400:
        raise ServerRefused(f"{url.text}{path} answered {status}: {text[:500].decode('utf-8', 'replace')}")


async def fetch(url: Url, path: str, body: Any | None = None, headers: Mapping[str, str] | None = None) -> bytes:
    """The whole answer to a GET, or with a body to a POST of it as JSON.

    Raises:
        ServerGone: there is no whole answer.
        ServerRefused: it is an error.
    """
    async with _answer(url, path, body, headers or {}) as (status, chunks):
        text = b"".join([chunk async for chunk in chunks])
        _refuse(url, path, status, text)
        return text


async def events(
    url: Url, path: str, body: Any, headers: Mapping[str, str] | None = None
) -> AsyncGenerator[dict[str, Any], None]:
    """The server-sent events that answer a POST, each as soon as it is there, up to ``[DONE]``.

    Raises:
        ServerGone: they ended without ``[DONE]``.
        ServerRefused: the answer is an error, or an event tells of one.
    """
    async with _answer(url, path, body, headers or {}) as (status, chunks):
        if status >= 400:
            _refuse(url, path, status, b"".join([chunk async for chunk in chunks]))
        left = b""
        async for chunk in chunks:
            *lines, left = (left + chunk).split(b"\n")
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                text = line[5:].strip()
                if text == b"[DONE]":
                    return
                event = json.loads(text)
                if "error" in event:
                    raise ServerRefused(f"{url.text}{path}: {event['error']}")
                yield event
        raise ServerGone(f"{url.text}: the answer was cut off")
