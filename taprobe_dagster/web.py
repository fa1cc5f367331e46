"""The web server's process: Dagster's application behind the guard, on the loopback address.

Usage: `python -m taprobe_dagster.web WORKSPACE PORT [--read-only]`, with the token in the
environment, where no other user reads it; the workspace's own processes are not given it.
"""

from __future__ import annotations

import asyncio
import os
import sys

import h11
import uvicorn
from dagster import DagsterInstance
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import WorkspaceFileTarget
from dagster_webserver.app import create_app_from_workspace_process_context
from dagster_webserver.version import __version__
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from taprobe_dagster.access import TOKEN_VARIABLE, checked_token
from taprobe_dagster.guard import guarded

SOCKET_BYTES = 1_000_000
"""Largest message on a web socket."""
HEAD_SECONDS = 10.0
"""Time for a request's head to arrive in, from the connection or the first byte of it on."""


class PromptProtocol(H11Protocol):
    """HTTP for clients that say what they want: a head that does not come ends the connection."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Go on waiting while the head is in parts; the next one is waited for from its start."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._deadline is None:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the wait with the connection."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._deadline = self.loop.call_later(HEAD_SECONDS, self.timeout_keep_alive_handler)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def configuration(app: Starlette, token: str, port: int) -> uvicorn.Config:
    """How the web server is run: on the loopback address, strict in what it reads, silent."""
    return uvicorn.Config(
        guarded(app, token),
        host="127.0.0.1",
        port=port,
        # h11 refuses what the faster parser lets pass: two lengths, line ends in headers.
        http=PromptProtocol,
        ws_max_size=SOCKET_BYTES,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
    )


def main() -> None:
    """Serve the workspace file and the port given as arguments."""
    workspace, port, *options = sys.argv[1:]
    token = checked_token(os.environ.pop(TOKEN_VARIABLE, ""))
    with (
        DagsterInstance.get() as instance,
        WorkspaceProcessContext(
            instance,
            WorkspaceFileTarget([workspace]),
            version=__version__,
            read_only="--read-only" in options,
        ) as context,
    ):
        app = create_app_from_workspace_process_context(context)
        server = uvicorn.Server(configuration(app, token, int(port)))
        server.run()
    if not server.started:
        sys.exit(3)


if __name__ == "__main__":
    main()
