"""A process that has imported everything once, and forks a child for each merge that is asked for.

Run with the number of an inherited socket. Each message is a JSON request with two descriptors: one to report
on, one to wait for. The answer is the child's process id; ``{"wait": pid}`` is answered with its status.
"""

from __future__ import annotations

import json
import os
import resource
import select
import shutil
import socket
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

import adapterhub_tools as at
from adapterhub_tools.engine import run as engine
from adapterhub_tools.engine import workers
from adapterhub_tools.errors import AdapterError
from adapterhub_tools.ops import merge as op
from tests.faults import namespaces

MAX_MESSAGE = 1 << 20


def serve(connection: socket.socket) -> None:
    torch.set_num_threads(1)
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, MAX_MESSAGE, 2)
        if not message:
            return
        request = json.loads(message)
        if "warm" in request:  # a whole merge, so that no import is left for a child to do
            _call(request["warm"])
            answer = 0
        elif "wait" in request:
            answer = os.waitpid(request["wait"], 0)[1]
        else:
            answer = os.fork()
            if answer == 0:
                connection.close()
                _child(request, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        connection.sendall(json.dumps(answer).encode())


def _child(request: dict[str, Any], report: int, go: int) -> None:
    """Does what is asked, reports it, and ends this process whatever happens."""
    try:
        answer = _perform(request, report, go)
    except AdapterError as error:
        answer = error.to_json()
    except BaseException:  # noqa: BLE001 - whatever it is, the test has to see it
        answer = {"traceback": traceback.format_exc()}
    try:
        for folder in request.get("show", ()):
            answer.setdefault("shown", {})[folder] = namespaces.show(Path(folder))
        _say(report, answer)
    finally:
        os._exit(0)


def _perform(request: dict[str, Any], report: int, go: int) -> dict[str, Any]:
    if "mounts" in request:
        namespaces.enter_own_mounts()
        for mount in request["mounts"]:
            namespaces.mount(**mount)
    for source, target in request.get("copies", ()):
        shutil.copytree(source, target)
    if request.get("no_preflight"):
        op.check_space = lambda folder, needed: None  # type: ignore[assignment]
    if "file_size_limit" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size_limit"],) * 2)
    if request.get("wait_in") == "worker":
        once = partial(_wait, report, go)
        for module in (engine, workers):
            module.ThreadPoolExecutor = partial(  # type: ignore[attr-defined]
                ThreadPoolExecutor, initializer=once
            )
    else:
        _wait(report, go)
    done = _call(request["merge"])
    return {"digest": done.digest, "notes": list(done.notes)}


def _call(keywords: dict[str, Any]) -> Any:
    """Merges, or calls another function of the Python face if ``"call"`` names it."""
    return getattr(at, keywords.pop("call", "merge"))(**keywords)


def _wait(report: int, go: int) -> None:
    """Reports the id of this thread, and lets it go on when told.

    It waits by select and not by read, which is injected: strace sees a call in progress again, or not.
    """
    _say(report, {"thread": threading.get_native_id()})
    select.select([go], [], [])


def _say(report: int, what: dict[str, Any]) -> None:
    data = (json.dumps(what) + "\n").encode()
    while data:
        data = data[os.write(report, data) :]


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
