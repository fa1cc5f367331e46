"""The guard in front of Dagster's web server: who may ask, and how a run may be launched.

Dagster 1.13's server answers any `Host`, and takes mutations by GET and by POST of any type, so a
page in the user's browser that guesses the port can launch runs. The guard lets through only what
the UI itself sends: the server's own name as `Host`, no foreign `Origin`, GraphQL by POST of
JSON (which a foreign page cannot send without being asked first) or by web socket.

Source: https://cheatsheetseries.owasp.org/cheatsheets/Cross-Site_Request_Forgery_Prevention_Cheat_Sheet.html
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


def guarded(app: Application, port: int) -> Application:
    """Wrap an ASGI application so that only this machine's own pages reach it.

    Args:
        app: Dagster's web server.
        port: the port it is served on, at the loopback address.

    Returns:
        An application that answers 400 to a foreign host or origin, 405 to GraphQL by GET and 415
        to GraphQL in anything but JSON, and passes everything else on.
    """
    hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")}

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        refusal = _refusal(scope, hosts) if scope["type"] in {"http", "websocket"} else None
        if refusal is None:
            await app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            status, reason = refusal
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": reason.encode()})

    return answer


def _refusal(scope: Scope, hosts: set[str]) -> tuple[int, str] | None:
    headers = {name.decode().lower(): value.decode() for name, value in scope["headers"]}
    if headers.get("host", "") not in hosts:
        return 400, f"unknown host; use one of {', '.join(sorted(hosts))}"
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] not in hosts:
        return 400, "requests from other sites are refused"
    if scope["type"] == "http" and scope["path"].endswith("/graphql"):
        return _graphql_refusal(scope["method"], headers)
    return None


def _graphql_refusal(method: str, headers: dict[str, str]) -> tuple[int, str] | None:
    if method == "GET" and "text/html" not in headers.get("accept", ""):
        return 405, "send GraphQL by POST"
    if method == "POST" and not headers.get("content-type", "").startswith("application/json"):
        return 415, "send GraphQL as application/json"
    return None


def main() -> None:
    """Serve the workspace file and the port given as arguments, on the loopback address."""
    import uvicorn
    from dagster import DagsterInstance
    from dagster._core.workspace.context import WorkspaceProcessContext
    from dagster._core.workspace.load_target import WorkspaceFileTarget
    from dagster_webserver.app import create_app_from_workspace_process_context

    workspace, port = sys.argv[1], int(sys.argv[2])
    with (
        DagsterInstance.get() as instance,
        WorkspaceProcessContext(instance, WorkspaceFileTarget([workspace])) as context,
    ):
        app = create_app_from_workspace_process_context(context)
        uvicorn.run(guarded(app, port), host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main()
