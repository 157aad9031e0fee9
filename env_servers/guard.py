"""Admit requests by their token, their Host name and the page that they come from.

A web page in a browser on the same machine can reach loopback servers without a token in two ways.
*DNS rebinding*: the page's own name is made to point at 127.0.0.1; the Host header
then still contains that name. *Cross-site requests*: the page makes the browser post a form; the
Origin header then contains the page's site. A page can forge neither header.

Rules, in this order:

1. With a token, every request must carry it, as `Authorization: Bearer` or as the password of
   Basic. The token admits a request under every Host name.
2. Without a token, Host must be an IP address, `localhost` or a name below it, this machine's own
   name with or without its domain, or one of the allowed names. A page cannot have an IP address
   as its name unless it came from there. `*` allows every name.
3. Requests that change something (all but GET, HEAD and OPTIONS) are refused if a browser reports
   that they come from another site: Origin is neither the Host nor an allowed name, or
   Sec-Fetch-Site is neither `none` nor `same-origin`. Programs send neither header.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import socket
from collections.abc import Collection
from functools import cache

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from env_servers.service import ErrorResponder, ServiceError

ANY_HOST = "*"
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class Guard:
    """Middleware that refuses requests that are not admitted, and passes on all others."""

    def __init__(
        self,
        app: ASGIApp,
        token: str | None,
        allowed_hosts: Collection[str],
        errors: ErrorResponder,
    ) -> None:
        """Take arguments of `build_application`; `allowed_hosts` may contain `*`."""
        self._app = app
        self._token = None if token is None else token.encode()
        self._given = {name.lower().rstrip(".") for name in allowed_hosts}
        self._machine = socket.gethostname().lower()
        self._errors = errors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it with an error."""
        if scope["type"] == "http":
            headers: dict[bytes, bytes] = dict(scope["headers"])
            error = self._refusal(scope["method"], headers)
            if error is not None:
                response = self._errors.response(Request(scope), error)
                if error.status == 401:
                    response.headers["www-authenticate"] = 'Basic realm="token as password"'
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, method: str, headers: dict[bytes, bytes]) -> ServiceError | None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self._token is not None:
            given = _presented_token(headers.get(b"authorization", b""))
            if not hmac.compare_digest(given, self._token):
                message = "Send the header 'Authorization: Bearer <token>'."
                return ServiceError(401, "unauthorized", message)
        elif host and not self._is_known(_host_name(host)):
            message = (
                f"This server does not answer to the name {_host_name(host)[:100]!r}. Call it by"
                " its IP address, or start it with --allowed-host NAME."
            )
            return ServiceError(403, "unknown_host", message)
        if method not in _SAFE_METHODS and self._is_cross_site(host, headers):
            message = "Pages of another web site are refused, except that of --allowed-host NAME."
            return ServiceError(403, "cross_site", message)
        return None

    def _is_known(self, name: str) -> bool:
        machine = self._machine.partition(".")[0]
        return (
            not self._given.isdisjoint((ANY_HOST, name))
            or name in ("localhost", self._machine)
            or name.endswith(".localhost")
            or _is_address(name)
            or (name.startswith(f"{machine}.") and name == _full_name())
        )

    def _is_cross_site(self, host: str, headers: dict[bytes, bytes]) -> bool:
        origin = headers.get(b"origin")
        if origin is not None:
            site = origin.decode("latin-1").lower().partition("://")[2]
            if site != host and _host_name(site) not in self._given:
                return True
        return headers.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin")


def _host_name(host: str) -> str:
    """Return the name in a Host header, without port, brackets and the root's dot."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.rstrip(".")


@cache
def _full_name() -> str:
    """Return this machine's name with its domain; it is looked up on first use."""
    return socket.getfqdn().lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _presented_token(header: bytes) -> bytes:
    """Return the token of an Authorization header; browsers send it as a Basic password."""
    scheme, _, value = header.partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""
