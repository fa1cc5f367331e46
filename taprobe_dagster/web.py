"""The web server's process: Dagster's application behind the guard, on the loopback address.

Usage: `python -m taprobe_dagster.web WORKSPACE PORT [--read-only]`, with the token in the
environment, where no other user reads it; the workspace's own processes are not given it.
"""

from __future__ import annotations

import os
import sys

import uvicorn
from dagster import DagsterInstance
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import WorkspaceFileTarget
from dagster_webserver.app import create_app_from_workspace_process_context
from starlette.applications import Starlette

from taprobe_dagster.access import TOKEN_VARIABLE, checked_token
from taprobe_dagster.guard import guarded

SOCKET_BYTES = 1_000_000
"""Largest message on a web socket."""


def configuration(app: Starlette, token: str, port: int) -> uvicorn.Config:
    """How the web server is run: on the loopback address, strict in what it reads, silent."""
    return uvicorn.Config(
        guarded(app, token),
        host="127.0.0.1",
        port=port,
        # h11 refuses what the faster parser lets pass: two lengths, line ends in headers.
        http="h11",
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
            instance, WorkspaceFileTarget([workspace]), read_only="--read-only" in options
        ) as context,
    ):
        app = create_app_from_workspace_process_context(context)
        server = uvicorn.Server(configuration(app, token, int(port)))
        server.run()
    if not server.started:
        sys.exit(3)


if __name__ == "__main__":
    main()
