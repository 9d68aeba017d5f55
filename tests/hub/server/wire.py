"""The connection below HTTP: raw bytes, a clean end (FIN), a reset (RST).

uvicorn hands an application the bound method of its request cycle as `send`; the cycle knows the transport.
That is how a fault can answer what no HTTP server would.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

SETTLE_SECONDS = 0.03  # so that the peer has read what was written before a reset reaches it


@dataclass(slots=True, kw_only=True)
class Answer:
    """A complete response of the application, kept back."""

    status: int
    headers: Headers
    body: bytes

    def header(self, name: str) -> str | None:
        wanted = name.lower().encode()
        return next((value.decode("latin-1") for key, value in self.headers if key.lower() == wanted), None)

    def set(self, values: Mapping[str, str | None]) -> None:
        """Replaces headers; None removes."""
        names = {name.lower().encode() for name in values}
        self.headers = [(k, v) for k, v in self.headers if k.lower() not in names]
        self.headers += [(k.encode(), v.encode("latin-1")) for k, v in values.items() if v is not None]

    def head(self, content_length: int | None) -> bytes:
        """Status line and headers, with any Content-Length one likes; None keeps the application's."""
        try:
            phrase = HTTPStatus(self.status).phrase
        except ValueError:
            phrase = "Unknown"
        lines: Iterable[tuple[bytes, bytes]] = self.headers
        if content_length is not None:
            lines = [
                (k, v) for k, v in self.headers if k.lower() not in {b"content-length", b"transfer-encoding"}
            ]
            lines = [*lines, (b"content-length", str(content_length).encode())]
        rows = [k + b": " + v for k, v in lines if k.lower() != b"connection"]
        return b"\r\n".join(
            [f"HTTP/1.1 {self.status} {phrase}".encode(), *rows, b"connection: close", b"", b""]
        )


async def answer_of(app: App, scope: MutableMapping[str, Any], receive: Receive) -> Answer:
    """Runs the application and keeps its whole answer."""
    answer = Answer(status=500, headers=[], body=b"")
    pieces: list[bytes] = []

    async def keep(message: Message) -> None:
        if message["type"] == "http.response.start":
            answer.status, answer.headers = message["status"], list(message.get("headers", []))
        else:
            pieces.append(message.get("body", b""))

    await app(scope, receive, keep)
    answer.body = b"".join(pieces)
    return answer


class Wire:
    """One connection. After raw bytes it ends with `fin` or `rst`; uvicorn then has nothing left to say."""

    def __init__(self, send: Send, receive: Receive) -> None:
        """Takes uvicorn's own `send` and `receive`."""
        self._transport = cast("asyncio.Transport", cast("Any", send).__self__.transport)
        self._receive = receive

    def write(self, data: bytes) -> None:
        """Sends bytes as they are."""
        self._transport.write(data)

    async def fin(self) -> None:
        """Ends the connection cleanly, after all that was written."""
        self._transport.close()
        await self._gone()

    async def rst(self) -> None:
        """Resets the connection."""
        await asyncio.sleep(SETTLE_SECONDS)
        raw = self._transport.get_extra_info("socket")
        with contextlib.suppress(OSError):  # the peer may have left already
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()
        await self._gone()

    async def end(self, how: str) -> None:
        """`fin` or `rst` by name."""
        await (self.rst() if how == "rst" else self.fin())

    async def stall(self, seconds: float) -> None:
        """Says nothing for a while, or until the peer leaves."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._gone(), seconds)

    async def _gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
