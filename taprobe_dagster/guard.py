"""The guard in front of Dagster's web server: who may ask, and what may be asked.

Dagster 1.13's server answers any `Host`, and takes mutations by GET and by POST of any type, so a
page in the user's browser that guesses the port could launch runs, and so could every other user of
the machine. The guard decides on the route that the server itself would take, never on the text of
an address, and lets through only what it lists: pages and files by GET, GraphQL by POST of JSON or
by web socket. All of it needs a loopback `Host`, no foreign `Origin` or `Sec-Fetch-Site`, and the
token (access). What reports events from outside, and notebooks, which nothing here uses, are not
served.

Source: https://cheatsheetseries.owasp.org/cheatsheets/Cross-
Site_Request_Forgery_Prevention_Cheat_Sheet.html
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, unquote_to_bytes

from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import BaseRoute, Match

from taprobe_dagster.access import PRIVATE, entered, is_known, unknown

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

BODY_BYTES = 10_000_000
"""Largest body of a request; the UI's own have some kilobytes."""
BODY_SECONDS = 30.0
"""Time for a body to arrive in."""
PATH_CHARACTERS = 2_000
"""Longest path."""
NESTING = 100
"""Deepest GraphQL document; the UI's own nest some twenty levels."""

PAGE = "index_html_endpoint"
GRAPHQL = "graphql-http"
GRAPHQL_SOCKET = "graphql-ws"
READ = frozenset(
    {PAGE, "root_static", "_next_static", "vendor_static"}
    | {"webserver_info_endpoint", "download_captured_logs_endpoint", "download_debug_file_endpoint"}
)
"""Routes of Dagster's web server that are served by GET and HEAD, by their names."""
NOT_SERVED = frozenset(
    {"download_notebook", "report_asset_materialization_endpoint"}
    | {"report_asset_check_endpoint", "report_asset_observation_endpoint"}
)
"""Routes that the server has and the guard refuses, like all others that stand in no list."""

_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?")


class _RefusedError(Exception):
    """A request that is not let through."""

    def __init__(self, status: int, reason: str) -> None:
        self.status = status
        self.reason = reason
        super().__init__(reason)


def guarded(app: Starlette, token: str) -> Application:
    """Wrap Dagster's web server so that only who has the token reaches it, by the UI's own ways.

    Args:
        app: the web server; its routes decide.
        token: that opens it.

    Returns:
        An application that answers 401 without the token, another status of the 4xx with a reason
        to what the UI does not send, and passes everything else on.
    """

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await app(scope, receive, send)
            return
        try:
            headers = checked_headers(scope)
            route = checked_route(app.routes, scope, headers)
            opened = None
            if route == PAGE and scope["method"] == "GET":
                query = scope["query_string"].decode("latin-1")
                opened = entered(scope["path"], query, headers["host"], token)
            if opened is None and not is_known(headers, token):
                opened = unknown()
            if opened is None and route == GRAPHQL:
                receive = await _operation(receive)
        except _RefusedError as refused:
            opened = PlainTextResponse(f"{refused.reason}\n", refused.status, PRIVATE)
        if opened is None:
            await app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await opened(scope, receive, send)

    return answer


def checked_headers(scope: Scope) -> dict[str, str]:
    """Return a request's headers by lower-case name, sent to this machine by one of its own pages.

    Raises:
        _RefusedError: twice the same header, of which the server might read the other one; bytes
            that are no text; a `Host` that is no name of this machine, which is how another site's
            name leads here; an `Origin` that is not the `Host`.
    """
    headers: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        try:
            name, value = raw_name.decode("ascii").lower(), raw_value.decode()
        except UnicodeDecodeError:
            raise _RefusedError(400, "a header that is not UTF-8") from None
        if name in headers:
            raise _RefusedError(400, f"header {name} twice")
        if any(ord(character) < 32 or ord(character) == 127 for character in value):
            raise _RefusedError(400, f"control characters in header {name}")
        headers[name] = value
    host = headers.get("host", "").lower()
    if not _HOST.fullmatch(host):
        raise _RefusedError(400, "unknown host; use localhost or 127.0.0.1")
    headers["host"] = host
    if headers.get("origin", f"http://{host}").lower() != f"http://{host}":
        raise _RefusedError(403, "requests from other sites are refused")
    return headers


def checked_route(routes: Sequence[BaseRoute], scope: Scope, headers: Mapping[str, str]) -> str:
    """Return the name of the route that the server takes, if a request may take it this way.

    Args:
        routes: of the server, in its order.
        scope: of the request.
        headers: from `checked_headers`.

    Raises:
        _RefusedError: a path that could be read in two ways, a route that is not served, a method
            or a type of content that the UI does not use there, or another site's page.
    """
    _check_path(scope)
    route = _taken(routes, scope)
    if scope["type"] == "websocket":
        if route != GRAPHQL_SOCKET:
            raise _RefusedError(404, "no web socket here")
        _check_site(headers, is_navigable=False, is_page=False)
        return route
    method = scope["method"]
    if route == GRAPHQL:
        _check_graphql(scope, headers)
    elif route not in READ:
        raise _RefusedError(403, "not served here")
    elif method not in {"GET", "HEAD"}:
        raise _RefusedError(405, "only GET and HEAD here")
    _check_site(headers, is_navigable=route != GRAPHQL, is_page=route == PAGE)
    return route


def _check_path(scope: Scope) -> None:
    path = scope["path"]
    try:
        is_sent = unquote_to_bytes(scope["raw_path"]).decode() == path
    except UnicodeDecodeError:
        is_sent = False
    if not is_sent or len(path) > PATH_CHARACTERS or not path.isprintable():
        raise _RefusedError(400, "a path that is too long, or not of printable UTF-8")
    parts = path.split("/")
    # An empty last part is a slash at the end; an empty other one could begin a host's name.
    if parts[0] or "" in parts[1:-1] or not {".", ".."}.isdisjoint(parts):
        raise _RefusedError(400, "a path with empty or dotted parts")
    if "\\" in path or "%" in path:
        raise _RefusedError(400, "a path with backslashes, or percent signs after decoding")


def _taken(routes: Sequence[BaseRoute], scope: Scope) -> str:
    """The name of the first route that takes a path, as the server's own router goes."""
    for wanted in (Match.FULL, Match.PARTIAL):
        for route in routes:
            if route.matches(scope)[0] is wanted:
                return str(getattr(route, "name", ""))
    raise _RefusedError(404, "nothing is served here")


def _check_graphql(scope: Scope, headers: Mapping[str, str]) -> None:
    if scope["method"] != "POST":
        raise _RefusedError(405, "send GraphQL by POST")
    # In this spelling only: the server reads another one as none, and then the address.
    media_type = headers.get("content-type", "").partition(";")[0].strip()
    if media_type != "application/json" or "content-encoding" in headers:
        raise _RefusedError(415, "send GraphQL as application/json, not compressed")
    names = {name for name, _ in parse_qsl(scope["query_string"], keep_blank_values=True)}
    if names - {b"op"}:
        raise _RefusedError(400, "send GraphQL in the body, not in the address")
    if {"content-length", "transfer-encoding"} <= headers.keys():
        raise _RefusedError(400, "a length and chunks at once")
    length = headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 12 or int(length) > BODY_BYTES:
        raise _RefusedError(413, f"a body of more than {BODY_BYTES:,} bytes")


def _check_site(headers: Mapping[str, str], *, is_navigable: bool, is_page: bool) -> None:
    """Refuse what a browser says another site's page has asked for, but for a link to a page."""
    site = headers.get("sec-fetch-site", "same-origin")
    is_navigation = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == (
        "navigate",
        "document",
    )
    is_typed = site == "none" and is_navigable and is_navigation
    is_link = site in {"cross-site", "same-site"} and is_page and is_navigation
    if not (site == "same-origin" or is_typed or is_link):
        raise _RefusedError(403, "requests from other sites are refused")


async def _operation(receive: Receive) -> Receive:
    """Read a GraphQL request to its end, check it, and give it again."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            is_more = True
            while is_more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _RefusedError(400, "a body that was not sent to its end")
                body += message.get("body", b"")
                if len(body) > BODY_BYTES:
                    raise _RefusedError(413, f"a body of more than {BODY_BYTES:,} bytes")
                is_more = message.get("more_body", False)
    except TimeoutError:
        raise _RefusedError(408, f"a body that took more than {BODY_SECONDS:.0f} s") from None
    _check_operation(bytes(body))
    left = [{"type": "http.request", "body": bytes(body), "more_body": False}]

    async def again() -> Message:
        return left.pop() if left else await receive()

    return again


def _check_operation(body: bytes) -> None:
    try:
        found = json.loads(body.decode(), parse_constant=_refuse_constant)
        # Half of a pair of code units is JSON and no text; no answer could repeat it.
        json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise _RefusedError(400, "a body that is not JSON in UTF-8") from None
    if not isinstance(found, dict) or not isinstance(found.get("query"), str):
        raise _RefusedError(400, "no text `query` in an object of JSON")
    if not isinstance(found.get("variables"), dict | None):
        raise _RefusedError(400, "`variables` that are no object")
    if not isinstance(found.get("operationName"), str | None):
        raise _RefusedError(400, "an `operationName` that is no text")
    depth = 0
    for character in found["query"]:
        depth += (character in "{[(") - (character in "}])")
        if depth > NESTING:
            raise _RefusedError(400, f"GraphQL nested deeper than {NESTING}")


def _refuse_constant(name: str) -> None:
    raise ValueError(name)
