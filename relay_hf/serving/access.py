"""Who may ask the server, and how much at once: checked before a request is read."""

import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import error_response

# Far more text than a model reads at once, and little enough to be parsed in a moment.
MOST_BYTES = 32 * 2**20


class AccessCheck:
    """Middleware that refuses foreign web pages, foreign host names, and bodies of absurd size.

    A page in a browser can send requests to a server on the reader's machine, and with a name that its owner lets
    resolve to that machine it can read the answers, too. Such requests carry a foreign `Origin` or a foreign `Host`.

    Args:
        app: application that answers all other requests.
        host: address that the server listens on.
        allow_hosts: further names under which it may be asked, "*" for any. Addresses in numbers, `localhost` and the
            machine's own name are always taken.
        allow_origins: web pages that may ask, as `https://example.org`, "*" for any. The server's own are always taken.
    """

    def __init__(self, app: ASGIApp, host: str, allow_hosts: Sequence[str], allow_origins: Sequence[str]) -> None:
        self.app = app
        self.hosts = {name.lower() for name in (host, "localhost", socket.gethostname(), *allow_hosts)}
        self.origins = {origin.lower().rstrip("/") for origin in allow_origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(headers)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        body = await _read_body(receive)
        if body is None:
            message = f"The request is longer than {MOST_BYTES} bytes: shorten it."
            await error_response(message, 400)(scope, receive, send)
            return
        await self.app(scope, _replay(body, receive), send)

    def _refusal(self, headers: Headers) -> ASGIApp | None:
        host = headers.get("host", "")
        if not self._is_known(host):
            return error_response(f"`Host: {host}` is not a name of this server: start it with `--allow_hosts`.", 403)
        origin = headers.get("origin")
        if origin is not None and not self._is_welcome(origin.lower(), host.lower()):
            return error_response(f"`Origin: {origin}` may not ask here: start the server with `--allow_origins`.", 403)
        return None

    def _is_known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return "*" in self.hosts or name in self.hosts or _is_address(name)

    def _is_welcome(self, origin: str, host: str) -> bool:
        return "*" in self.origins or origin in self.origins or origin in (f"http://{host}", f"https://{host}")


def _is_address(name: str) -> bool:
    """Whether the name is a numeric address, which no foreign name server resolves."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _read_body(receive: Receive) -> bytes | None:
    """The whole body, or None if it is too long."""
    parts, size = [], 0
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MOST_BYTES:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body that was read already, and then what else comes: the client going away."""
    given: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return given.pop() if given else await receive()

    return next_message
