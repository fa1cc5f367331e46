"""The guard before Dagster's own web server: what the UI sends passes, all else does not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import dagster as dg
import pytest
import uvicorn
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import EmptyWorkspaceTarget
from dagster_webserver.app import create_app_from_workspace_process_context
from starlette.applications import Starlette

from taprobe_dagster import guard, web
from taprobe_dagster.access import TOKEN_VARIABLE
from taprobe_dagster.guard import GRAPHQL, GRAPHQL_SOCKET, NOT_SERVED, READ, guarded

TOKEN = "a-token-of-our-own_0123456789"  # noqa: S105 - opens nothing
HOST = "127.0.0.1:3000"
COOKIE = f"taprobe_3000={TOKEN}"
OURS = {"host": HOST, "cookie": COOKIE}
JSON = {**OURS, "content-type": "application/json"}
VERSION = b'{"query":"{version}"}'
SEEN = b'{"query":"mutation{setNuxSeen}"}'
IN_URL = "query=mutation%7BsetNuxSeen%7D"
PAGE_LINK = {"sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}


class Spy(Starlette):
    """Dagster's application, and whether a request came through to it."""

    def __init__(self, app: Starlette) -> None:
        super().__init__(routes=app.routes)
        self.app = app
        self.n_reached = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.n_reached += 1
        await self.app(scope, receive, send)


@contextlib.contextmanager
def opened(folder: Path, *, is_read_only: bool = False) -> Iterator[Spy]:
    """Dagster's application on an empty workspace."""
    with (
        dg.DagsterInstance.local_temp(str(folder)) as instance,
        WorkspaceProcessContext(
            instance, EmptyWorkspaceTarget(), read_only=is_read_only
        ) as context,
    ):
        yield Spy(create_app_from_workspace_process_context(context))


@pytest.fixture(scope="module")
def spy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spy]:
    with opened(tmp_path_factory.mktemp("writable")) as spy:
        yield spy


@pytest.fixture(scope="module")
def read_only(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spy]:
    with opened(tmp_path_factory.mktemp("read-only"), is_read_only=True) as spy:
        yield spy


Headers = Mapping[str, str] | list[tuple[str | bytes, str | bytes]]


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()


def ask(
    app: Starlette,
    method: str,
    target: str,
    headers: Headers,
    body: bytes = VERSION,
    kind: str = "http",
) -> list[dict[str, Any]]:
    """What is sent back to a request, whose scope is made as uvicorn makes it."""
    sent: list[dict[str, Any]] = []
    pieces: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]
    if kind == "websocket":
        pieces = [{"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": 1000}]

    async def send(message: Any) -> None:
        sent.append(dict(message))

    async def receive() -> dict[str, Any]:
        return pieces.pop(0) if pieces else {"type": "http.disconnect"}

    path, _, query = target.partition("?")
    pairs = headers if isinstance(headers, list) else list(headers.items())
    scope = {
        "type": kind,
        "http_version": "1.1",
        "scheme": "http" if kind == "http" else "ws",
        "method": method,
        "path": unquote(path),
        "raw_path": path.encode("ascii"),
        "query_string": query.encode("ascii"),
        "root_path": "",
        "client": ("127.0.0.1", 50_000),
        "headers": [(_bytes(name), _bytes(value)) for name, value in pairs],
    }
    asyncio.run(guarded(app, TOKEN)(scope, receive, send))
    return sent


def without(headers: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name not in names}


def twice(headers: Mapping[str, str], name: str, value: str) -> list[tuple[str, str]]:
    return [*headers.items(), (name, value)]


ACCEPTED = {
    "root": ("GET", "/", OURS, 200),
    "page": ("GET", "/asset-groups?view=lineage", OURS, 200),
    "page of an asset": ("GET", "/assets/fits?partition=tiny%40L01%7Cx%40s00", OURS, 200),
    "page of a place": ("GET", "/locations/__repository__@taprobe.definitions/jobs/", OURS, 200),
    "name in capitals": ("GET", "/", {**OURS, "host": "LOCALHOST:3000"}, 200),
    "other loopback names": ("GET", "/", {**OURS, "host": "[::1]:3000"}, 200),
    "page with a query": ("GET", "/runs?query=x", OURS, 200),
    "head": ("HEAD", "/", OURS, 200),
    "tunnel": ("GET", "/", {"host": "localhost:4000", "cookie": f"taprobe_4000={TOKEN}"}, 200),
    "file": ("GET", "/favicon.svg", {**OURS, "sec-fetch-site": "same-origin"}, 200),
    "manifest": ("GET", "/manifest.json", OURS, 200),
    "versions": ("GET", "/server_info", OURS, 200),
    "log that is not there": ("GET", "/logs/run/compute_logs/step.err", OURS, 404),
    "typed": ("GET", "/runs", {**OURS, **PAGE_LINK, "sec-fetch-site": "none"}, 200),
    "download typed": ("GET", "/server_info", {**OURS, **PAGE_LINK, "sec-fetch-site": "none"}, 200),
    "link": ("GET", "/runs", {**OURS, **PAGE_LINK, "sec-fetch-site": "cross-site"}, 200),
    "bearer": ("GET", "/server_info", {"host": HOST, "authorization": f"Bearer {TOKEN}"}, 200),
    "graphql": ("POST", "/graphql", JSON, 200),
    "graphql, named": ("POST", "/graphql?op=SetNuxSeen", JSON, 200),
    "graphql, charset": (
        "POST",
        "/graphql",
        {**OURS, "content-type": "application/json; charset=utf-8"},
        200,
    ),
    "graphql, own page": (
        "POST",
        "/graphql",
        {**JSON, "origin": f"http://{HOST}", "sec-fetch-site": "same-origin"},
        200,
    ),
    "graphql, tunnel": (
        "POST",
        "/graphql",
        {
            **JSON,
            "host": "localhost:4000",
            "origin": "http://localhost:4000",
            "cookie": f"other=1; taprobe_4000={TOKEN}",
        },
        200,
    ),
}


@pytest.mark.parametrize(
    ("method", "target", "headers", "status"), ACCEPTED.values(), ids=ACCEPTED.keys()
)
def test_what_the_ui_sends_passes(
    spy: Spy, method: str, target: str, headers: Headers, status: int
) -> None:
    before = spy.n_reached
    assert ask(spy, method, target, headers)[0]["status"] == status
    assert spy.n_reached == before + 1


# A method, a target, headers, and the status that refuses them.
HOSTILE: list[tuple[str, str, Headers, int]] = [
    # GraphQL by a path that only looks like another one, and by GET.
    *(
        (method, f"/graphql{end}?{IN_URL}", JSON, 400)
        for method in ("GET", "POST")
        for end in ("%0a", "%0d", "%0d%0a", "%00", "%09", "%0b", "%0c", "%1c", "%1f", "%7f")
    ),
    *(
        ("GET", f"/graphql{end}?{IN_URL}", OURS, 400)
        for end in ("%c2%85", "%e2%80%a8", "%e2%80%a9", "%e2%80%ae", "%ff", "%c0%8a", "%ed%a0%80")
    ),
    ("GET", f"/%0agraphql?{IN_URL}", OURS, 400),
    ("GET", f"/./graphql?{IN_URL}", OURS, 400),
    ("GET", f"/x/../graphql?{IN_URL}", OURS, 400),
    ("GET", f"/x/%2e%2e/graphql?{IN_URL}", OURS, 400),
    ("GET", f"/x%2f..%2fgraphql?{IN_URL}", OURS, 400),
    ("GET", f"//graphql?{IN_URL}", OURS, 400),
    ("GET", f"/%2fgraphql?{IN_URL}", OURS, 400),
    ("GET", f"/\\graphql?{IN_URL}", OURS, 400),
    ("GET", f"/%5cgraphql?{IN_URL}", OURS, 400),
    ("GET", f"/graphql%250a?{IN_URL}", OURS, 400),
    ("GET", f"/%2567raphql?{IN_URL}", OURS, 400),
    ("GET", f"http://127.0.0.1:3000/graphql?{IN_URL}", OURS, 400),
    ("GET", f"graphql?{IN_URL}", OURS, 400),
    ("OPTIONS", "*", OURS, 400),
    ("GET", "/" + "a" * 3_000, OURS, 400),
    ("GET", f"/graphql?{IN_URL}", OURS, 405),
    ("GET", f"/%67raphql?{IN_URL}", OURS, 405),
    ("GET", f"/graphql?{IN_URL}", {**OURS, "accept": "text/html"}, 405),
    ("GET", "/graphql", {**OURS, "accept": "text/html"}, 405),
    ("HEAD", f"/graphql?{IN_URL}", JSON, 405),
    ("OPTIONS", "/graphql", JSON, 405),
    ("PUT", "/graphql", JSON, 405),
    ("post", "/graphql", JSON, 405),
    ("POST", f"/graphql?{IN_URL}", JSON, 400),
    ("POST", "/graphql?variables=%7B%7D", JSON, 400),
    ("POST", "/graphql?op=A&extensions=1", JSON, 400),
    # Content that a foreign page may send without being asked first, or that is not what it says.
    ("POST", "/graphql", OURS, 415),
    ("POST", "/graphql", {**OURS, "content-type": "text/plain"}, 415),
    ("POST", "/graphql", {**OURS, "content-type": "text/plain; application/json"}, 415),
    ("POST", "/graphql", {**OURS, "content-type": "application/json-patch"}, 415),
    ("POST", "/graphql", {**OURS, "content-type": "Application/JSON"}, 415),
    ("POST", "/graphql", {**OURS, "content-type": "application/graphql"}, 415),
    ("POST", "/graphql", {**OURS, "content-type": "application/x-www-form-urlencoded"}, 415),
    ("POST", "/graphql", {**OURS, "content-type": "multipart/form-data; boundary=x"}, 415),
    ("POST", "/graphql", {**JSON, "content-encoding": "gzip"}, 415),
    ("POST", "/graphql", {**JSON, "content-length": "10000001"}, 413),
    ("POST", "/graphql", {**JSON, "content-length": "-1"}, 413),
    ("POST", "/graphql", {**JSON, "content-length": "32", "transfer-encoding": "chunked"}, 400),
    # Other sites.
    ("GET", "/", {**OURS, "host": "evil.example"}, 400),
    ("GET", "/", {**OURS, "host": "evil.example:3000"}, 400),
    ("GET", "/", {**OURS, "host": "127.0.0.1.evil.example:3000"}, 400),
    ("GET", "/", {**OURS, "host": "localhost:3000@evil.example"}, 400),
    ("GET", "/", {**OURS, "host": "localhost.:3000"}, 400),
    ("GET", "/", {**OURS, "host": "0.0.0.0:3000"}, 400),
    ("GET", "/", {**OURS, "host": "127.1:3000"}, 400),
    ("GET", "/", {**OURS, "host": "127.0.0.1:3000 "}, 400),
    ("GET", "/", {**OURS, "host": "127.0.0.1:"}, 400),
    ("GET", "/", {**OURS, "host": "127.0.0.1:٣٠٠٠"}, 400),
    ("GET", "/", {**OURS, "host": ""}, 400),
    ("GET", "/", without(OURS, "host"), 400),
    ("POST", "/graphql", {**JSON, "origin": "http://evil.example"}, 403),
    ("POST", "/graphql", {**JSON, "origin": "http://127.0.0.1:3001"}, 403),
    ("POST", "/graphql", {**JSON, "origin": "http://localhost:3000"}, 403),
    ("POST", "/graphql", {**JSON, "origin": "https://127.0.0.1:3000"}, 403),
    ("POST", "/graphql", {**JSON, "origin": "null"}, 403),
    ("POST", "/graphql", {**JSON, "origin": ""}, 403),
    ("POST", "/graphql", {**JSON, "sec-fetch-site": "cross-site"}, 403),
    ("POST", "/graphql", {**JSON, "sec-fetch-site": "same-site"}, 403),
    ("POST", "/graphql", {**JSON, "sec-fetch-site": "none"}, 403),
    ("POST", "/graphql", {**JSON, **PAGE_LINK, "sec-fetch-site": "none"}, 403),
    ("POST", "/graphql", {**JSON, "sec-fetch-site": "Same-Origin"}, 403),
    ("GET", "/", {**OURS, "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
    ("GET", "/", {**OURS, **PAGE_LINK, "sec-fetch-site": "x"}, 403),
    (
        "GET",
        "/",
        {
            **OURS,
            "sec-fetch-site": "cross-site",
            "sec-fetch-mode": "navigate",
            "sec-fetch-dest": "iframe",
        },
        403,
    ),
    ("GET", "/server_info", {**OURS, **PAGE_LINK, "sec-fetch-site": "cross-site"}, 403),
    ("GET", "/logs/a/b/c.out", {**OURS, **PAGE_LINK, "sec-fetch-site": "same-site"}, 403),
    # The same header twice: which one holds depends on who reads.
    ("GET", "/", twice(OURS, "host", HOST), 400),
    ("GET", "/", twice(OURS, "HOST", "evil.example"), 400),
    ("GET", "/", [*OURS.items(), ("accept", "text/html"), ("Accept", "*/*")], 400),
    ("POST", "/graphql", twice(JSON, "content-type", "text/plain"), 400),
    ("POST", "/graphql", twice(JSON, "cookie", COOKIE), 400),
    ("POST", "/graphql", twice({**JSON, "origin": f"http://{HOST}"}, "origin", "null"), 400),
    (
        "POST",
        "/graphql",
        twice({**JSON, "sec-fetch-site": "same-origin"}, "sec-fetch-site", "none"),
        400,
    ),
    ("POST", "/graphql", twice({**JSON, "content-length": "32"}, "content-length", "3"), 400),
    ("GET", "/", twice({**OURS, "authorization": "Bearer x"}, "authorization", "Bearer y"), 400),
    # Headers that are no text.
    ("GET", "/", [*OURS.items(), (b"x-a", b"\xff\xfe")], 400),
    ("GET", "/", [*OURS.items(), (b"x-\xff", b"a")], 400),
    ("GET", "/", [*OURS.items(), (b"x-a", b"a\nb")], 400),
    ("GET", "/", [(b"host", b"127.0.0.1:3000\xe9"), (b"cookie", COOKIE.encode())], 400),
    # Ways in that the UI does not use.
    ("POST", "/", JSON, 405),
    ("DELETE", "/runs", OURS, 405),
    ("POST", "/server_info", JSON, 405),
    ("GET", "/notebook?path=x.ipynb&repoLocName=y", OURS, 403),
    ("GET", "/dagit/notebook?path=x.ipynb&repoLocName=y", OURS, 403),
    ("POST", "/report_asset_materialization/fits", JSON, 403),
    ("POST", "/report_asset_check/fits?check_name=a&passed=true", JSON, 403),
    ("POST", "/report_asset_observation/fits", JSON, 403),
    # No token, or another one.
    ("GET", "/", without(OURS, "cookie"), 401),
    ("GET", "/favicon.svg", without(OURS, "cookie"), 401),
    ("POST", "/graphql", without(JSON, "cookie"), 401),
    ("POST", "/graphql", {**JSON, "cookie": f"taprobe_3000={TOKEN}x"}, 401),
    ("POST", "/graphql", {**JSON, "cookie": "taprobe_3000="}, 401),
    ("POST", "/graphql", {**JSON, "cookie": f"taprobe_3001={TOKEN}"}, 401),
    ("POST", "/graphql", {**JSON, "cookie": f"taprobe_3000=é{TOKEN}"}, 401),
    ("POST", "/graphql", {**JSON, "authorization": "Bearer wrong"}, 401),
    ("POST", "/graphql", {**without(JSON, "cookie"), "authorization": f"Basic {TOKEN}"}, 401),
    ("POST", "/graphql", {**without(JSON, "cookie"), "authorization": TOKEN}, 401),
    ("GET", "/?token=wrong", OURS, 401),
    ("GET", f"/?token={TOKEN}&token={TOKEN}", OURS, 401),
    ("GET", f"/server_info?token={TOKEN}", without(OURS, "cookie"), 401),
    ("POST", f"/?token={TOKEN}", without(OURS, "cookie"), 405),
]


@pytest.mark.parametrize(
    ("method", "target", "headers", "status"),
    HOSTILE,
    ids=[f"{index}-{each[0]}-{each[1]:.40}" for index, each in enumerate(HOSTILE)],
)
def test_what_the_ui_does_not_send_stops_at_the_guard(
    spy: Spy, method: str, target: str, headers: Headers, status: int
) -> None:
    before = spy.n_reached
    sent = ask(spy, method, target, headers)
    assert sent[0]["status"] == status
    assert spy.n_reached == before
    assert dict(sent[0]["headers"])[b"referrer-policy"] == b"no-referrer"


ODD_BODIES = [
    b"",
    b"null",
    b"[]",
    b'[{"query":"{version}"}]',
    b"1e999",
    b'"mutation{setNuxSeen}"',
    b"{",
    b"\xff\xfe",
    '{"query":"{version}"}'.encode("utf-16"),
    b"\xef\xbb\xbf" + SEEN,
    b'{"query":null}',
    b'{"query":["{version}"]}',
    b'{"query":"{version}","variables":[]}',
    b'{"query":"{version}","variables":"{}"}',
    b'{"query":"{version}","variables":{"a":NaN}}',
    b'{"query":"{version}","operationName":7}',
    b'{"query":"{version}","a":"\\ud800"}',
    b'{"query":"{version}","a":' + b"9" * 5_000 + b"}",
    b"[" * 100_000,
    json.dumps({"query": "{a" * 5_000}).encode(),
    json.dumps({"query": "query($a: [[" + "[" * 200 + "Int"}).encode(),
    b'{"query":"' + b"x" * guard.BODY_BYTES + b'"}',
]


@pytest.mark.parametrize("body", ODD_BODIES, ids=[repr(body[:30]) for body in ODD_BODIES])
def test_an_odd_body_is_refused_with_a_reason(spy: Spy, body: bytes) -> None:
    before = spy.n_reached
    (start, rest) = ask(spy, "POST", "/graphql", JSON, body)
    assert start["status"] == (413 if len(body) > guard.BODY_BYTES else 400)
    assert len(rest["body"]) > 10
    assert spy.n_reached == before


def test_every_route_of_the_server_is_listed(spy: Spy) -> None:
    named = {getattr(route, "name", None) for route in spy.routes}
    assert named == READ | NOT_SERVED | {GRAPHQL, GRAPHQL_SOCKET}


@pytest.mark.parametrize(
    "target", ["/", "/asset-groups?view=lineage", "/assets/a%40b?x=%C3%A9&view=y"]
)
def test_the_printed_address_leaves_a_cookie_and_goes_on_without_the_token(
    spy: Spy, target: str
) -> None:
    path, _, query = target.partition("?")
    before = spy.n_reached
    with_token = f"{path}?token={TOKEN}" + (f"&{query}" if query else "")
    (start, _) = ask(spy, "GET", with_token, {"host": "localhost:4000"})
    assert start["status"] == 303
    headers = dict(start["headers"])
    assert unquote(headers[b"location"].decode()) == unquote(target)
    assert headers[b"referrer-policy"] == b"no-referrer"
    cookie, *attributes = headers[b"set-cookie"].decode().split("; ")
    assert cookie == f"taprobe_4000={TOKEN}"
    assert sorted(each.lower() for each in attributes) == ["httponly", "path=/", "samesite=strict"]
    assert spy.n_reached == before
    (start, _) = ask(spy, "GET", target, {"host": "localhost:4000", "cookie": cookie})
    assert start["status"] == 200


SOCKET = {**OURS, "origin": f"http://{HOST}"}


@pytest.mark.parametrize(
    ("target", "headers"),
    [
        ("/graphql", {**SOCKET, "origin": "http://evil.example"}),
        ("/graphql", {**SOCKET, "origin": "http://127.0.0.1:3001"}),
        ("/graphql", {**SOCKET, "sec-fetch-site": "same-site"}),
        ("/graphql", {**SOCKET, **PAGE_LINK, "sec-fetch-site": "cross-site"}),
        ("/graphql", without(SOCKET, "cookie")),
        ("/graphql", {**SOCKET, "host": "evil.example:3000"}),
        ("/graphql%0a", SOCKET),
        ("/runs", SOCKET),
    ],
)
def test_a_web_socket_of_another_site_is_closed(
    spy: Spy, target: str, headers: dict[str, str]
) -> None:
    assert ask(spy, "GET", "/graphql", SOCKET, kind="websocket")[0]["type"] == "websocket.accept"
    before = spy.n_reached
    sent = ask(spy, "GET", target, headers, kind="websocket")
    assert sent == [{"type": "websocket.close", "code": 1008}]
    assert spy.n_reached == before


KIND = "{ __typename }"
JOB = (
    '{mode: "default", selector: {repositoryLocationName: "x", repositoryName: "y", jobName: "z"}}'
)
MUTATIONS = {
    "launch": f"launchRun(executionParams: {JOB})",
    "launch several": f"launchMultipleRuns(executionParamsList: [{JOB}])",
    "backfill": 'launchPartitionBackfill(backfillParams: {assetSelection: [{path: ["fits"]}], '
    "allPartitions: true})",
    "wipe": 'wipeAssets(assetPartitionRanges: [{assetKey: {path: ["fits"]}}])',
    "report": "reportRunlessAssetEvents(eventParams: {eventType: ASSET_MATERIALIZATION, assetKey: "
    '{path: ["fits"]}})',
    "delete": 'deletePipelineRun(runId: "x")',
    "reload": "reloadWorkspace",
}


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_read_only_is_refused_by_the_server_itself(spy: Spy, read_only: Spy, mutation: str) -> None:
    inner = "launchMultipleRunsResult { __typename }" if "Multiple" in mutation else ""
    result = f"{{ __typename ... on LaunchMultipleRunsResult {{ {inner} }} }}" if inner else KIND
    body = json.dumps({"query": f"mutation {{ {mutation} {result} }}"}).encode()
    answers = [ask(app, "POST", "/graphql", JSON, body)[1]["body"] for app in (spy, read_only)]
    assert [b"UnauthorizedError" in answer for answer in answers] == [False, True]
    assert ask(read_only, "GET", "/runs", OURS)[0]["status"] == 200


@pytest.fixture(scope="module")
def port(spy: Spy) -> Iterator[int]:
    """The port of a server that is run as `taprobe ui` runs it, but has little patience."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard, "BODY_SECONDS", 1.0)
        patch.setattr(web, "HEAD_SECONDS", 1.0)
        server = uvicorn.Server(web.configuration(spy, TOKEN, 0))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        yield server.servers[0].sockets[0].getsockname()[1]
        server.should_exit = True
        thread.join(timeout=60)


def say(port: int, sent: bytes, rest: bytes = b"") -> bytes:
    """What comes back until the server is done, or closes; `rest` is sent when it has begun."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(sent)
        if rest:
            connection.sendall(rest)
        found = b""
        while piece := connection.recv(65_536):
            found += piece
        return found


def head(port: int, line: str, *headers: str) -> bytes:
    lines = [f"{line} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


BEARER = f"Authorization: Bearer {TOKEN}"
IS_JSON = "Content-Type: application/json"


def test_a_whole_request_is_answered_over_a_socket(port: int) -> None:
    request = head(port, "POST /graphql?op=V", BEARER, IS_JSON, f"Content-Length: {len(VERSION)}")
    answer = say(port, request + VERSION)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b'{"data":{"version"' in answer
    assert b"\r\nserver:" not in answer.lower()
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(VERSION), VERSION)
    chunked = head(port, "POST /graphql", BEARER, IS_JSON, "Transfer-Encoding: chunked")
    assert say(port, chunked, chunks).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("line", "headers", "status"),
    [
        (f"GET /graphql%0a?{IN_URL}", [BEARER], 400),
        (f"GET /graphql?{IN_URL}", [BEARER], 405),
        (f"GET http://127.0.0.1/graphql?{IN_URL}", [BEARER], 400),
        ("GET /\\graphql", [BEARER], 400),
        ("GET /caf\u00e9", [BEARER], 400),
        ("GET /", [BEARER, "Host: 127.0.0.1"], 400),
        ("GET /", [BEARER, "X-A: caf\u00e9"], 200),
        ("POST /graphql", [BEARER, IS_JSON, "Content-Length: 2", "Content-Length: 20"], 400),
        (
            "POST /graphql",
            [BEARER, IS_JSON, "Content-Length: 2", "Transfer-Encoding: chunked"],
            400,
        ),
        ("POST /graphql", [BEARER, IS_JSON, "Content-Length: +2"], 400),
        ("POST /graphql", [BEARER, IS_JSON, "Content-Length: 10000001"], 413),
        ("GET /", [BEARER, "Folded: a", " b"], 200),
        ("GET /", [BEARER, "Blank : a"], 400),
        ("GET /", [], 401),
    ],
)
def test_a_raw_request_has_its_status(
    port: int, line: str, headers: list[str], status: int
) -> None:
    answer = say(port, head(port, line, *headers))
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:200]
    assert b'"data"' not in answer


def test_a_body_of_chunks_without_end_is_too_large(port: int) -> None:
    chunk = b"f4240\r\n" + b"x" * 1_000_000 + b"\r\n"
    request = head(port, "POST /graphql", BEARER, IS_JSON, "Transfer-Encoding: chunked")
    # Without this line, because a connection closed with bytes unread would lose the answer.
    request = request.replace(b"Connection: close\r\n", b"")
    assert say(port, request, chunk * 11 + b"0\r\n\r\n").startswith(b"HTTP/1.1 413 ")


def test_a_head_too_long_reaches_nothing_and_the_server_lives(port: int, spy: Spy) -> None:
    before = spy.n_reached
    with contextlib.suppress(ConnectionResetError):
        answer = say(port, head(port, "GET /", BEARER, "Long: " + "x" * 1_000_000))
        assert answer.startswith(b"HTTP/1.1 400 ")
    assert spy.n_reached == before
    assert say(port, head(port, "GET /server_info", BEARER)).startswith(b"HTTP/1.1 200 ")


def test_a_slow_body_ends_with_a_reason_and_a_slow_head_with_the_connection(port: int) -> None:
    request = head(port, "POST /graphql", BEARER, IS_JSON, "Content-Length: 100")
    assert say(port, request + b"{").startswith(b"HTTP/1.1 408 ")
    start = time.monotonic()
    assert say(port, b"") == b""
    assert say(port, b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A") == b""
    # A second request on a connection has no more time than the first.
    first = head(port, "GET /server_info", BEARER).replace(b"Connection: close\r\n", b"")
    assert say(port, first, b"GET / HT").startswith(b"HTTP/1.1 200 ")
    assert 2.5 < time.monotonic() - start < 60


def test_the_token_is_not_logged(port: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert say(port, head(port, f"GET /?token={TOKEN}")).startswith(b"HTTP/1.1 303 ")
    assert say(port, head(port, "GET /?token=wrong")).startswith(b"HTTP/1.1 401 ")
    said = capfd.readouterr()
    assert "token" not in said.out + said.err


def test_the_server_gives_the_token_to_no_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    monkeypatch.setattr(sys, "argv", ["web", "workspace.yaml", "3000"])
    seen: list[object] = []
    monkeypatch.setattr(
        web.DagsterInstance, "get", lambda: seen.append(os.environ.get(TOKEN_VARIABLE, "none"))
    )
    with pytest.raises(TypeError):  # there is no instance to enter
        web.main()
    assert seen == ["none"]
