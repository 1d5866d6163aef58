"""A W&B server on this machine, for as much as a run asks of one; it can be ended in the middle of a run."""

from __future__ import annotations

import gzip
import http.server
import json
import re
import threading
from types import TracebackType
from typing import Any

import yaml


class WandbServer:
    """Answers the queries of wandb-core; ``lines`` are the history lines that arrived, ``operations`` the queries."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.operations: list[str] = []
        self.uploaded: list[str] = []
        self.sweep: dict[str, Any] = {}
        self.proposals: list[dict[str, Any]] = []
        """What agents are to try, one after the other."""
        self._connections: list[Any] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server._connections.append(self.connection)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                content = json.dumps(server.answer(self.path, body)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                """A client that hangs up is what these tests are about."""

        self._http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path.startswith("/uploads/"):
            self.uploaded.append(path.removeprefix("/uploads/"))
        if path.endswith("/file_stream"):
            self.operations.append("file_stream")
            chunk = json.loads(body).get("files", {}).get("wandb-history.jsonl", {})
            self.lines += [json.loads(line) for line in chunk.get("content", [])]
        if path != "/graphql":
            return {}
        query = json.loads(body)
        variables = query.get("variables") or {}
        named = re.search(r"(?:query|mutation)\s+(\w+)", query["query"])
        operation = named[1] if named else ""
        self.operations.append(operation)
        project = {"id": "p", "name": "testbed", "entity": {"id": "e", "name": "somebody"}}
        bucket = {
            "id": "b",
            "name": variables.get("name"),
            "displayName": "",
            "description": "",
            "config": "{}",
            "sweepName": "",
            "historyLineCount": 0,
            "project": project,
        }
        if operation == "UpsertSweep":
            self.sweep = yaml.safe_load(variables["config"])
        viewer = {"id": "v", "entity": "somebody", "username": "somebody", "email": "", "flags": "{}"}
        files = [{"name": name, "uploadUrl": f"{self.url}/uploads/{name}"} for name in variables.get("files") or []]
        return {
            "data": {
                "viewer": {**viewer, "teams": {"edges": []}},
                "serverInfo": {"features": [], "latestLocalVersionInfo": None, "cliVersionInfo": {}},
                "model": {"bucket": None},
                "upsertBucket": {"bucket": bucket, "inserted": True},
                "upsertSweep": {"sweep": {"name": "sweep1", "project": project}, "configValidationWarnings": []},
                "project": {
                    "sweep": {"id": "s", "name": "sweep1", "config": json.dumps(self.sweep), "runs": {"edges": []}}
                },
                "createAgent": {"agent": {"id": "a"}},
                "agentHeartbeat": {"agent": {"id": "a"}, "commands": json.dumps(self._commands(operation))},
                "createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files},
            }
        }

    def _commands(self, operation: str) -> list[dict[str, Any]]:
        if operation != "Heartbeat" or not self.proposals:
            return []
        values = self.proposals.pop(0)
        command = {"type": "run", "run_id": f"run{len(self.proposals)}", "program": self.sweep["program"]}
        return [{**command, "args": {name: {"value": value} for name, value in values.items()}}]

    def end(self) -> None:
        """Closes the door, and the connections that are inside."""
        self._http.shutdown()
        self._http.server_close()
        for connection in self._connections:
            connection.close()

    def __enter__(self) -> WandbServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
