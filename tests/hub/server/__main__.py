"""Runs the server: `python -m tests.hub.server --data DIR --hub PORT --cdn PORT --other PORT --control PORT`.

Prints READY when all ports listen. Ends when its standard input does, so it never outlives the tests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from tests.hub.server.control import control_app
from tests.hub.server.faults import Gate, Log
from tests.hub.server.hub import hub_app, storage_app
from tests.hub.server.store import Account, Store
from tests.hub.server.wire import App

# Longer than any pause of a test: an idle connection that closes would be a fault that nobody armed.
KEEP_ALIVE_SECONDS = 60


class QuietServer(uvicorn.Server):
    """A server among several in one process: signals are left alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    for name in ("hub", "cdn", "other", "control"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--token", action="append", default=[], help="token:user:role")
    return parser.parse_args()


def listen(port: int) -> socket.socket:
    """A listening loopback socket; the port may just have been left by a killed server."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(128)
    return listener


def leave_with_parent() -> None:
    """Ends the process when standard input does."""
    sys.stdin.buffer.read()
    os._exit(0)


async def serve() -> None:
    """Starts the four listeners and runs until the process ends."""
    args = arguments()
    store = Store(args.data)
    for text in args.token:
        token, user, role = text.split(":")
        store.add_token(token, Account(user=user, role=role))
    key_file = args.data / "signing.key"
    if not key_file.exists():
        key_file.write_bytes(os.urandom(32))
    key = key_file.read_bytes()
    origins = {
        "hub": f"http://127.0.0.1:{args.hub}",
        "cdn": f"http://localhost:{args.cdn}",
        "other": f"http://localhost:{args.other}",
    }
    log = Log()
    apps: dict[str, App] = {
        "hub": Gate(hub_app(store, origins, key), "hub", origins, log),
        "cdn": Gate(storage_app(store, origins, key), "cdn", origins, log),
        "other": Gate(hub_app(store, origins, key), "other", origins, log),
        "control": control_app(store, log),
    }
    running = []
    for name, app in apps.items():
        config = uvicorn.Config(
            app, http="h11", ws="none", lifespan="off", interface="asgi3", log_level="warning",
            access_log=False, proxy_headers=False, server_header=False, timeout_keep_alive=KEEP_ALIVE_SECONDS,
        )  # fmt: skip
        running.append(asyncio.create_task(QuietServer(config).serve(sockets=[listen(getattr(args, name))])))
    threading.Thread(target=leave_with_parent, daemon=True).start()
    print("READY", flush=True)
    await asyncio.gather(*running)


if __name__ == "__main__":
    asyncio.run(serve())
