"""The guard before Dagster's own web server: what the UI sends passes, all else does not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import dagster as dg
import pytest
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import EmptyWorkspaceTarget
from dagster_webserver.app import create_app_from_workspace_process_context
from starlette.applications import Starlette

from taprobe_dagster import guard
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


@contextmanager
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
