"""Who may ask the server what: its own page, under the names it knows, in requests of bounded size.

A page of another site, opened in the same browser, can reach a server on loopback. What keeps it out:

- the `Host` must be one that the server knows, so that a foreign name pointed at 127.0.0.1 (DNS rebinding) is refused;
- `Sec-Fetch-Site`, which browsers set and pages cannot, must not say that another site asks, except for opening the
  page itself; where an old browser does not send it, `Origin` must be the server's own;
- answers say that they are for the same origin alone, and the page may load nothing from elsewhere.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SAFE_FETCH_SITES = ("same-origin", "none")
_METHODS = ("GET", "HEAD", "POST")
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Guard:
    """ASGI middleware that refuses requests of other sites and sets the headers of every answer.

    Args:
        app: what is guarded.
        hosts: names and addresses under which the server is reached, without ports.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str]) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # neither web sockets nor start-up events are served

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        if problem := self._refusal(scope):
            status, text = problem
            await JSONResponse({"error": text}, status)(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        if scope["method"] not in _METHODS:
            return 405, f"method {scope['method']} is not served"
        hosts = headers.getlist("host")
        if len(hosts) != 1 or _name(hosts[0]) not in self._hosts:
            return 421, "this server is not known under that name; start it with allowed_hosts=[NAME]"
        site = headers.get("sec-fetch-site")
        # following a link to the page is harmless; nothing else may come from elsewhere
        opens_page = (
            scope["method"] in ("GET", "HEAD")
            and scope["path"] == "/"
            and headers.get("sec-fetch-mode", "navigate") == "navigate"
        )
        if site is not None and site not in _SAFE_FETCH_SITES and not opens_page:
            return 403, "requests of other sites are refused"
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != hosts[0].lower():
            return 403, "requests of other sites are refused"
        return None


def _name(host: str) -> str:
    """Name or address in a Host header, without the port."""
    name, _, port = host.rpartition(":")
    bare = name if name and port.isdigit() and not host.endswith("]") else host
    return bare.strip("[]").lower().rstrip(".")


def known_hosts(bound: str, more: Iterable[str] = ()) -> set[str]:
    """Names under which a server that listens on `bound` may be asked: that, loopback's, and `more`."""
    names = {"localhost", "127.0.0.1", "::1", *(host.strip("[]").lower() for host in more)}
    return names if bound in ("", "0.0.0.0", "::") else names | {bound.strip("[]").lower()}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
