"""The token that opens the UI: one for each start, shown once, kept by the browser as a cookie.

A loopback port is open to every user of the machine. Who has the token may come in: a browser by
the printed URL, which leaves a cookie and goes on to the clean address, a program by
`Authorization: Bearer`. The cookie ends with the browser's session and is sent by no page of
another site. Its name has the port in it, because a browser keeps one set of cookies for all ports
of a host.

Source: https://cheatsheetseries.owasp.org/cheatsheets/Session_Management_Cheat_Sheet.html
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from urllib.parse import parse_qsl, quote, urlencode

from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from taprobe_core.errors import ConfigError

TOKEN_VARIABLE = "TAPROBE_UI_TOKEN"  # noqa: S105 - a variable's name
"""Environment variable that fixes the token; the web server's process is given it here, too."""

PRIVATE = {"cache-control": "no-store", "referrer-policy": "no-referrer"}
"""Headers of every answer of the guard's own."""

_TOKEN = re.compile(r"[A-Za-z0-9_-]{16,200}")


def new_token() -> str:
    """A token that nobody guesses: 256 random bits."""
    return secrets.token_urlsafe(32)


def checked_token(token: str) -> str:
    """Return a token that somebody chose.

    Raises:
        ConfigError: too short to be safe, or with characters that a URL or a cookie would change.
    """
    if not _TOKEN.fullmatch(token):
        raise ConfigError(
            f"a token of {len(token)} characters that is too short or cannot stand in a URL",
            f"--token or {TOKEN_VARIABLE}",
            "give 16 to 200 letters, digits, - or _, or leave it out: each start then makes one",
        )
    return token


def entry_url(port: int, token: str) -> str:
    """The address that opens the UI in a browser."""
    return f"http://127.0.0.1:{port}/?token={token}"


def is_known(headers: Mapping[str, str], token: str) -> bool:
    """Whether a request has the token, as a bearer or as the cookie of its `Host`."""
    if "authorization" in headers:
        scheme, _, found = headers["authorization"].partition(" ")
        return scheme.lower() == "bearer" and _is_equal(found.strip(), token)
    cookies = cookie_parser(headers.get("cookie", ""))
    return _is_equal(cookies.get(_cookie_name(headers["host"]), ""), token)


def entered(path: str, query: str, host: str, token: str) -> Response | None:
    """Answer a page's address with a token in it: the cookie, and the address without the token.

    Args:
        path: decoded, begins with one slash.
        query: as sent.
        host: the request's `Host`.
        token: that opens the UI.

    Returns:
        None where the address holds no token; a refusal where it is not the right one.
    """
    pairs = parse_qsl(query, keep_blank_values=True)
    given = [value for name, value in pairs if name == "token"]
    if not given:
        return None
    if len(given) > 1 or not _is_equal(given[0], token):
        return unknown()
    rest = urlencode([pair for pair in pairs if pair[0] != "token"])
    answer = RedirectResponse(quote(path) + (f"?{rest}" if rest else ""), 303, PRIVATE)
    answer.set_cookie(_cookie_name(host), token, httponly=True, samesite="strict")
    return answer


def unknown() -> Response:
    """The page for whoever has no token."""
    return PlainTextResponse(
        "This is taprobe's UI, and it does not know you.\n\n"
        "Open the address with ?token=... that `taprobe ui` printed where it was started; reload\n"
        "if you have just come from there. Each start makes a new token. A program sends\n"
        "Authorization: Bearer TOKEN.\n",
        401,
        {"www-authenticate": "Bearer", **PRIVATE},
    )


def _cookie_name(host: str) -> str:
    port = host.rpartition(":")[2]
    return f"taprobe_{port if port.isdecimal() else 80}"


def _is_equal(found: str, token: str) -> bool:
    return secrets.compare_digest(found.encode(), token.encode())
