"""The guard: what the UI sends passes, what another site could send does not."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from taprobe_dagster.guard import guarded

OURS = {"host": "127.0.0.1:3000"}
JSON = {**OURS, "content-type": "application/json"}


def _ask(
    method: str, path: str, headers: dict[str, str], kind: str = "http"
) -> tuple[bool, list[dict[str, Any]]]:
    """Whether the application was reached, and what was sent back."""
    reached, sent = [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])

    async def send(message: Any) -> None:
        sent.append(dict(message))

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    scope = {
        "type": kind,
        "method": method,
        "path": path,
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    asyncio.run(guarded(app, 3000)(scope, receive, send))
    return bool(reached), sent


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", "/", OURS),
        ("GET", "/asset-groups", {"host": "localhost:3000"}),
        ("POST", "/graphql", JSON),
        ("POST", "/graphql", {**JSON, "origin": "http://localhost:3000"}),
        ("GET", "/graphql", {**OURS, "accept": "text/html"}),
    ],
)
def test_what_the_ui_sends_passes(method: str, path: str, headers: dict[str, str]) -> None:
    assert _ask(method, path, headers) == (True, [])


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("POST", {**JSON, "host": "evil.example"}, 400),
        ("POST", {**JSON, "host": "127.0.0.1:3001"}, 400),
        ("POST", {**JSON, "origin": "http://evil.example"}, 400),
        ("POST", {**JSON, "origin": "null"}, 400),
        ("POST", {}, 400),
        ("GET", OURS, 405),
        ("POST", {**OURS, "content-type": "text/plain"}, 415),
        ("POST", OURS, 415),
    ],
)
def test_what_another_site_could_send_does_not(
    method: str, headers: dict[str, str], status: int
) -> None:
    reached, sent = _ask(method, "/graphql", headers)
    assert not reached
    assert sent[0]["status"] == status


def test_a_web_socket_of_another_site_is_closed() -> None:
    assert _ask("GET", "/graphql", {**OURS, "origin": "http://127.0.0.1:3000"}, "websocket")[0]
    reached, sent = _ask("GET", "/graphql", {**OURS, "origin": "http://x.example"}, "websocket")
    assert not reached
    assert sent == [{"type": "websocket.close", "code": 1008}]
