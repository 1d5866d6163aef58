"""Fetching over HTTP from a local server: whole, resumed, cut off, wrong, refused."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from biscale_gym.traces import TraceError, read_trace
from biscale_gym.traces import catalogue as catalogue_module
from biscale_gym.traces.catalogue import catalogue, fetch, trace_source
from biscale_gym.traces.settings import TraceSource

CONTENT = b"arrival_s,prompt_tokens,output_tokens\n" + b"".join(b"%d,7,3\n" % i for i in range(100_000))


class Server(ThreadingHTTPServer):
    """Serves CONTENT under any name; ``cut_after`` closes the connection after so many bytes of a response."""

    daemon_threads = True
    cut_after: int | None = None
    ranges = True
    content = CONTENT

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/mirror/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        content, start = self.server.content, 0
        if "missing" in self.path:
            self.send_error(404)
            return
        if asked and self.server.ranges:
            match = re.fullmatch(r"bytes=(\d+)-", asked)
            assert match is not None
            start = int(match.group(1))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        body = content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.cut_after])

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def entry(monkeypatch: pytest.MonkeyPatch) -> TraceSource:
    source = TraceSource(
        description="Made up.",
        url="https://example.org/data/made-up.csv",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        format="azure",
        licence="CC-BY-4.0",
        attribution="Nobody",
    )
    monkeypatch.setattr(catalogue_module, "trace_source", lambda name: source)
    return source


def test_whole(server: Server, tmp_path: Path) -> None:
    said: list[str] = []
    seen: list[tuple[int, int | None]] = []
    path = fetch(
        "made-up",
        tmp_path / "new" / "folder",
        server.url,
        report=said.append,
        progress=lambda have, total: seen.append((have, total)),
    )
    assert path.read_bytes() == CONTENT
    assert len(read_trace(path)) == 100_000
    assert [file.name for file in path.parent.iterdir()] == ["made-up.csv"]
    assert "CC-BY-4.0; Nobody" in said[0]
    assert "checksum right" in said[-1]
    assert seen[-1] == (len(CONTENT), len(CONTENT))

    fetch("made-up", path.parent, server.url, report=said.append)
    assert "is there already, checksum right" in said[-1]
    assert len(server.asked) == 1


def test_cut_off_is_kept_and_resumed(server: Server, tmp_path: Path) -> None:
    server.cut_after = 300_000
    with pytest.raises(TraceError, match=r"cut off after 300,000 of [\d,]+ bytes.*run the same command again"):
        fetch("made-up", tmp_path, server.url, report=str)
    assert [file.name for file in tmp_path.iterdir()] == ["made-up.csv.part"]
    server.cut_after = None
    seen: list[int] = []
    path = fetch("made-up", tmp_path, server.url, report=str, progress=lambda have, total: seen.append(have))
    assert server.asked == [None, "bytes=300000-"]
    assert seen[0] > 300_000
    assert path.read_bytes() == CONTENT
    assert [file.name for file in tmp_path.iterdir()] == ["made-up.csv"]


def test_a_server_without_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "made-up.csv.part").write_bytes(CONTENT[:1000])
    server.ranges = False
    assert fetch("made-up", tmp_path, server.url, report=str).read_bytes() == CONTENT


def test_a_complete_part_only_gets_its_name(server: Server, tmp_path: Path) -> None:
    (tmp_path / "made-up.csv.part").write_bytes(CONTENT)
    assert fetch("made-up", tmp_path, server.url, report=str).read_bytes() == CONTENT
    assert server.asked == [f"bytes={len(CONTENT)}-"]


def test_a_part_longer_than_the_file_is_dropped(server: Server, tmp_path: Path) -> None:
    (tmp_path / "made-up.csv.part").write_bytes(CONTENT + b"more")
    assert fetch("made-up", tmp_path, server.url, report=str).read_bytes() == CONTENT


def test_wrong_checksum_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[:-2] + b"4\n"
    with pytest.raises(TraceError, match="wrong checksum, the download was deleted"):
        fetch("made-up", tmp_path, server.url, report=str)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_file_that_is_there_is_left_alone(server: Server, tmp_path: Path) -> None:
    (tmp_path / "made-up.csv").write_text("mine")
    with pytest.raises(TraceError, match=r"is there already with a wrong checksum.*move it away"):
        fetch("made-up", tmp_path, server.url, report=str)
    assert (tmp_path / "made-up.csv").read_text() == "mine"
    assert server.asked == []


def test_refusals_are_named(server: Server, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="the server answers 404"):
        fetch("made-up", tmp_path, server.url + "missing", report=str)
    with pytest.raises(TraceError, match="no connection"):
        fetch("made-up", tmp_path, "http://127.0.0.1:9/", report=str)
    with pytest.raises(TraceError, match="not an http or https address"):
        fetch("made-up", tmp_path, "file:///etc", report=str)
    (tmp_path / "file").write_text("")
    with pytest.raises(TraceError, match="cannot be written"):
        fetch("made-up", tmp_path / "file" / "below", server.url, report=str)


def test_every_entry_is_whole(shared_data: Path) -> None:
    for name, source in catalogue().items():
        assert re.search(r"/[0-9a-f]{40}/|/releases/download/", source.url), name
    copies = {"azure-2023-conv": "AzureLLMInferenceTrace_conv.csv"}
    copies["mooncake-conversation"] = "mooncake_conversation_trace.jsonl"
    for name, file in copies.items():
        found = hashlib.sha256((shared_data / "traces" / file).read_bytes()).hexdigest()
        assert found == catalogue()[name].sha256


def test_unknown_names_are_named() -> None:
    with pytest.raises(TraceError, match="no published trace 'azure-2023'; did you mean 'azure-2023-co"):
        trace_source("azure-2023")
