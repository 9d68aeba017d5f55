"""Faults, armed by a test for the next matching requests, and the log of what each origin saw.

Kinds and their arguments (those left out are chosen by the seed):

==================  ======================================================================================
status              the answer is an error: ``status``, ``headers``, ``body``; nothing is done. 429 says
                    ``retry_after`` (seconds); 401, 403 and 404 carry ``error_code`` as X-Error-Code, unless
                    ``code=False``
fin, rst            the answer is cut after ``fraction`` of its body (0: after the headers), cleanly or by
                    reset; ``headers=False``: nothing of the answer is sent
upload_rst          the connection is reset when ``fraction`` of the request's body has arrived
header_stall        nothing for ``seconds``, then the connection ends
body_stall          the answer stops after ``fraction`` of its body for ``seconds``, then the connection ends
truncate            a shorter body (``fraction`` of it) with a Content-Length that agrees
extend              a body with ``extra`` more bytes and a Content-Length that agrees
flip                one bit of the body differs, at ``position``; length and headers stay
wrong_length        Content-Length says ``delta`` more than the body has; then the connection ends
headers             headers are replaced: ``set`` (a null value removes one)
stale_etag          ETag and X-Linked-Etag are those of other content; ``etag`` to say which
etag_change         the first match is cut at ``fraction`` (FIN); every later one (while ``times`` lasts)
                    answers with other content of the same length under another ETag
range_ignored       the Range header is ignored: 200 and everything
redirect_loop       302 to itself
redirect            302 (or ``status``) to ``location``, or to the same path at origin ``to``
listing             a JSON listing that lies: ``edit`` is "extra" (a file that is not there), "missing" (the
                    first file matching ``name`` is left out), "wrong_digest", "wrong_size" (of it) or
                    "hostile" (``name`` is added as a path); nothing changes on a page without a match
body                the body is ``text``, with a Content-Length that agrees and status 200
advance             before the request is looked at, someone else commits ``name`` to the branch main
lost_answer         everything is done, and the connection is cut (``how``: "fin" or "rst") before the answer
kill                the server kills itself (SIGKILL): ``phase`` "before" the request is looked at, "during"
                    (after ``fraction`` of its body), "handled" (done, not answered), "answer" (``fraction``
                    answered)
==================  ======================================================================================

The server as a whole, rather than one request, refuses connections while it is killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from tests.hub.server.store import Store
from tests.hub.server.wire import Answer, App, Message, Receive, Send, Wire, answer_of

ERROR_CODES = {401: "RepoNotFound", 403: "GatedRepo", 404: "RepoNotFound"}


@dataclass(slots=True, kw_only=True)
class Fault:
    """One armed fault."""

    kind: str
    path: str
    method: str
    origin: str
    times: int
    skip: int
    seed: int
    arguments: dict[str, Any]
    hits: int = 0

    def matches(self, origin: str, method: str, path: str) -> bool:
        methods = self.method.split("|") if self.method else [method]
        return self.origin == origin and method in methods and re.search(self.path, path) is not None

    def choose(self, name: str, low: float, high: float) -> float:
        """An argument, or a number between low and high that the seed and the name choose."""
        if name in self.arguments:
            return float(self.arguments[name])
        return random.Random(f"{self.seed}:{name}").uniform(low, high)


@dataclass(slots=True)
class Log:
    """What happened since the last reset."""

    requests: list[dict[str, Any]] = field(default_factory=list)
    fired: list[dict[str, Any]] = field(default_factory=list)
    armed: list[Fault] = field(default_factory=list)

    def take(self, origin: str, method: str, path: str) -> Fault | None:
        """The first armed fault that this request meets; counts it."""
        for fault in self.armed:
            if fault.times == 0 or not fault.matches(origin, method, path):
                continue
            if fault.skip > 0:
                fault.skip -= 1
                continue
            fault.times -= 1 if fault.times > 0 else 0
            fault.hits += 1
            self.fired.append({"kind": fault.kind, "origin": origin, "method": method, "path": path})
            return fault
        return None


class Gate:
    """In front of one origin's application: logs each request, plays the fault that is armed for it."""

    def __init__(self, app: App, origin: str, origins: dict[str, str], log: Log) -> None:
        """Stands before `app`."""
        self.app, self.origin, self.origins, self.log = app, origin, origins, log

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One request."""
        assert scope["type"] == "http", scope["type"]
        raw = scope["raw_path"].decode("ascii")
        scope = {**scope, "path": raw}  # routes match the raw path: a revision with %2F is one part
        headers = {k.decode().lower(): v.decode("latin-1") for k, v in scope["headers"]}
        query = scope["query_string"].decode("ascii")
        path = unquote(raw) + (f"?{query}" if query else "")
        record = {
            "origin": self.origin, "method": scope["method"], "path": unquote(raw), "query": query,
            "authorization": headers.get("authorization"), "range": headers.get("range"), "status": None,
            "fault": None,
        }  # fmt: skip
        self.log.requests.append(record)

        async def logged(message: Message) -> None:
            if message["type"] == "http.response.start":
                record["status"] = message["status"]
            await send(message)

        fault = self.log.take(self.origin, scope["method"], path)
        if fault is None:
            await self.app(scope, receive, logged)
            return
        record["fault"] = fault.kind
        play = Play(self, fault, scope, receive, Wire(send, receive), int(headers.get("content-length", "0")))
        await getattr(play, f"play_{fault.kind}")()


class Play:
    """One fault being played on one request."""

    def __init__(
        self,
        gate: Gate,
        fault: Fault,
        scope: MutableMapping[str, Any],
        receive: Receive,
        wire: Wire,
        length: int,
    ) -> None:
        """Takes the request before the application saw it; `length` is that of its body."""
        self.gate, self.fault, self.scope, self.receive, self.wire = gate, fault, scope, receive, wire
        self.arguments, self.length = fault.arguments, length

    async def answer(self) -> Answer:
        return await answer_of(self.gate.app, self.scope, self.receive)

    async def drain(self) -> None:
        """Reads the request's body, so that closing the connection is a FIN and not a reset."""
        while (message := await self.receive())["type"] == "http.request" and message.get("more_body"):
            pass

    async def reply(
        self, answer: Answer, *, content_length: int | None = -1, body: bytes | None = None
    ) -> None:
        """Sends a whole answer. Content-Length: the body's (-1), the application's (None) or a number."""
        sent = answer.body if body is None else body
        head = self.scope["method"] == "HEAD"
        length = len(sent) if content_length == -1 and not head else content_length
        self.wire.write(answer.head(None if length == -1 else length) + (b"" if head else sent))
        await self.wire.fin()

    def cut(self, answer: Answer) -> int:
        """Where a body is cut: never at its end."""
        return min(
            int(self.fault.choose("fraction", 0.05, 0.95) * len(answer.body)), max(0, len(answer.body) - 1)
        )

    async def play_status(self) -> None:
        status = int(self.arguments["status"])
        await self.drain()
        text = self.arguments.get("body", json.dumps({"error": f"armed {status}"}))
        answer = Answer(status=status, headers=[(b"content-type", b"application/json")], body=text.encode())
        if status in ERROR_CODES and self.arguments.get("code", True):
            answer.set({"X-Error-Code": str(self.arguments.get("error_code", ERROR_CODES[status]))})
        if "retry_after" in self.arguments:
            answer.set({"Retry-After": str(self.arguments["retry_after"])})
        answer.set(self.arguments.get("headers", {}))
        await self.reply(answer)

    async def _cut_answer(self, how: str) -> None:
        answer = await self.answer()
        if self.arguments.get("headers", True):
            self.wire.write(answer.head(None) + answer.body[: self.cut(answer)])
        await self.wire.end(how)

    async def play_fin(self) -> None:
        await self._cut_answer("fin")

    async def play_rst(self) -> None:
        await self._cut_answer("rst")

    async def _receive_part(self) -> None:
        wanted = self.fault.choose("fraction", 0.05, 0.95) * self.length
        arrived = 0
        while arrived < wanted:
            message = await self.receive()
            if message["type"] == "http.disconnect" or not message.get("more_body"):
                return
            arrived += len(message.get("body", b""))

    async def play_upload_rst(self) -> None:
        await self._receive_part()
        await self.wire.rst()

    async def play_header_stall(self) -> None:
        await self.drain()
        await self.wire.stall(float(self.arguments["seconds"]))
        await self.wire.fin()

    async def play_body_stall(self) -> None:
        answer = await self.answer()
        self.wire.write(answer.head(None) + answer.body[: self.cut(answer)])
        await self.wire.stall(float(self.arguments["seconds"]))
        await self.wire.fin()

    async def play_truncate(self) -> None:
        answer = await self.answer()
        await self.reply(answer, body=answer.body[: self.cut(answer)])

    async def play_extend(self) -> None:
        answer = await self.answer()
        extra = int(self.fault.choose("extra", 1, 5000))
        await self.reply(answer, body=answer.body + random.Random(self.fault.seed).randbytes(extra))

    async def play_flip(self) -> None:
        answer = await self.answer()
        body = bytearray(answer.body)
        if body:
            position = int(self.fault.choose("position", 0, len(body) - 1))
            body[position] ^= 1 << int(self.fault.choose("bit", 0, 7.99))
        await self.reply(answer, body=bytes(body), content_length=None)

    async def play_wrong_length(self) -> None:
        answer = await self.answer()
        delta = int(self.fault.choose("delta", 1, 4000))
        await self.reply(answer, content_length=max(0, len(answer.body) + delta))

    async def play_headers(self) -> None:
        answer = await self.answer()
        answer.set(self.arguments["set"])
        await self.reply(answer, content_length=None)

    def _other_etag(self, answer: Answer) -> str:
        old = (answer.header("X-Linked-Etag") or answer.header("ETag") or '"' + "0" * 40 + '"').strip('"')
        made = f"{random.Random(self.fault.seed).getrandbits(256):064x}"[: len(old)]
        return str(self.arguments.get("etag", made))

    def _set_etag(self, answer: Answer) -> None:
        etag = f'"{self._other_etag(answer)}"'
        answer.set({name: etag for name in ("ETag", "X-Linked-Etag") if answer.header(name) is not None})

    async def play_stale_etag(self) -> None:
        answer = await self.answer()
        self._set_etag(answer)
        await self.reply(answer, content_length=None)

    async def play_etag_change(self) -> None:
        answer = await self.answer()
        if self.fault.hits == 1:
            self.wire.write(answer.head(None) + answer.body[: self.cut(answer)])
            await self.wire.fin()
            return
        self._set_etag(answer)
        await self.reply(answer, body=bytes(b ^ 0xFF for b in answer.body))

    async def play_range_ignored(self) -> None:
        self.scope["headers"] = [(k, v) for k, v in self.scope["headers"] if k.lower() != b"range"]
        await self.reply(await self.answer(), content_length=None)

    async def _redirect(self, location: str) -> None:
        await self.drain()
        status = int(self.arguments.get("status", 302))
        await self.reply(Answer(status=status, headers=[(b"location", location.encode())], body=b""))

    def _path_at(self, origin: str) -> str:
        query = self.scope["query_string"].decode("ascii")
        return (
            self.gate.origins[origin]
            + self.scope["raw_path"].decode("ascii")
            + (f"?{query}" if query else "")
        )

    async def play_redirect_loop(self) -> None:
        await self._redirect(self._path_at(self.gate.origin))

    async def play_redirect(self) -> None:
        await self._redirect(
            str(self.arguments.get("location") or self._path_at(self.arguments.get("to", "other")))
        )

    async def play_listing(self) -> None:
        answer = await self.answer()
        data = json.loads(answer.body)
        edit_listing(data, self.arguments["edit"], str(self.arguments.get("name", "")))
        await self.reply(answer, body=json.dumps(data).encode())

    async def play_body(self) -> None:
        await self.drain()
        kind = [(b"content-type", b"application/json")]
        await self.reply(Answer(status=200, headers=kind, body=str(self.arguments["text"]).encode()))

    async def play_advance(self) -> None:
        app: Any = self.gate.app
        store: Store = app.state.store
        repo = "/".join(unquote(part) for part in self.scope["path"].split("/")[3:5])
        entry = store.regular_entry(b"by someone else\n")
        name = str(self.arguments.get("name", "notes.txt"))
        store.add_commit(repo, "refs/heads/main", changes={name: entry}, title="meanwhile", author="bob")
        await self.reply(await self.answer(), content_length=None)

    async def play_lost_answer(self) -> None:
        await self.answer()
        await self.wire.end(str(self.arguments.get("how", "fin")))

    async def play_kill(self) -> None:
        phase = self.arguments["phase"]
        if phase == "during":
            await self._receive_part()
        elif phase in {"handled", "answer"}:
            answer = await self.answer()
            if phase == "answer":
                self.wire.write(answer.head(None) + answer.body[: self.cut(answer)])
                await asyncio.sleep(0)
        os.kill(os.getpid(), signal.SIGKILL)


def edit_listing(data: Any, edit: str, name: str) -> None:
    """Makes a listing lie, in place: a list of tree items, or the siblings of a repository."""
    tree_form = isinstance(data, list)
    items: list[dict[str, Any]] = data if tree_form else data["siblings"]
    key = "path" if tree_form else "rfilename"
    index = next((i for i, item in enumerate(items) if name in item[key]), None)
    if edit in {"extra", "hostile"}:
        path = name if edit == "hostile" else (name or "tokenizer.json")
        item = (
            {"type": "file", "path": path, "oid": "0" * 40, "size": 3} if tree_form else {"rfilename": path}
        )
        items.append(item)
    elif index is None:
        return  # it is on another page
    elif edit == "missing":
        del items[index]
    elif edit == "wrong_digest":
        item = items[index]
        if "lfs" in item:
            item["lfs"]["oid" if tree_form else "sha256"] = "ab" * 32
        item["oid" if tree_form else "blobId"] = "ab" * 20
    elif edit == "wrong_size":
        items[index]["size"] = int(items[index]["size"]) + 1
        if "lfs" in items[index]:
            items[index]["lfs"]["size"] = items[index]["size"]
    else:
        raise ValueError(edit)
