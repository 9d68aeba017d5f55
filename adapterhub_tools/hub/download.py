"""Content of a commit's files: streamed once, resumed where it broke off, and checked before it counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Protocol

from adapterhub_tools.errors import HubError, IntegrityError, Problem, escape
from adapterhub_tools.hub.patience import Deadline, TransientError, patiently
from adapterhub_tools.hub.repository import Repository
from adapterhub_tools.hub.transport import Answer, bad_answer
from adapterhub_tools.hub.trees import ContentCheck, RemoteFile

_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")
_TRIES_FOR_CONTENT = 2  # other bytes than the commit names: once more, past a cache, and no oftener


class Sink(Protocol):
    """Where content goes."""

    def write(self, data: bytes) -> None:
        """Takes the next bytes."""
        ...

    def restart(self) -> None:
        """Forgets everything that was written."""
        ...


class MemorySink:
    """Keeps content in memory."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Takes the next bytes."""
        self._parts.append(data)

    def restart(self) -> None:
        """Forgets everything that was written."""
        self._parts.clear()

    def value(self) -> bytes:
        """Returns all of it."""
        return b"".join(self._parts)


def fetch(
    repository: Repository,
    commit: str,
    file: RemoteFile,
    sink: Sink,
    *,
    advance: Callable[[int], None] | None = None,
) -> str:
    """Brings a file's content, and returns its SHA-256.

    Args:
        repository: where it is.
        commit: of which it is part.
        file: what the commit says of it.
        sink: where it goes; what it holds counts only once this returns.
        advance: told of the bytes that came.

    Raises:
        IntegrityError: the content is not what the commit names, twice.
        HubError: it cannot be had.
    """
    deadline = repository.transport.patience.deadline(file.size)
    for left in reversed(range(_TRIES_FOR_CONTENT)):
        check = ContentCheck(file)
        _stream(repository, commit, file, sink, check, deadline, advance)
        try:
            check.raise_if_other()
        except IntegrityError:
            if left == 0:
                raise
            if advance is not None:
                advance(-check.size)
            sink.restart()
        else:
            return check.sha256
    raise AssertionError("unreachable")


def _stream(
    repository: Repository,
    commit: str,
    file: RemoteFile,
    sink: Sink,
    check: ContentCheck,
    deadline: Deadline,
    advance: Callable[[int], None] | None,
) -> None:
    """Takes all of the content, over as many connections as it needs."""
    transport = repository.transport
    what = f"downloading {escape(file.path)}"
    url = repository.content_url(commit, file.path)
    etag = ""

    def attempt() -> None:
        nonlocal etag
        begin = check.size
        headers = {"range": f"bytes={begin}-"} if begin else {}
        with transport.open(
            "GET", url, what=what, deadline=deadline, headers=headers, other_hosts=True, raw=True
        ) as answer:
            skip = begin if answer.status == 200 else 0
            if answer.status not in (200, 206):
                raise transport.refusal(answer, what)
            check_headers(answer, commit, file, begin - skip)
            now = answer.headers.get("etag", "")
            if begin and etag and now and now != etag:
                raise bad_answer(f"{escape(file.path)!r} changed while it was being downloaded", answer.url)
            etag = now
            for piece in answer.pieces:
                data = piece[skip:]
                skip = max(0, skip - len(piece))
                if check.size + len(data) > file.size:
                    raise IntegrityError.of(
                        "content",
                        f"more than the {file.size:,} bytes that the commit says were received.",
                        file=escape(file.path),
                        remedy="Try again; if it stays so, the server gives damaged content.",
                    )
                check.update(data)
                sink.write(data)
                if advance is not None:
                    advance(len(data))
        if check.size < file.size:
            message = f"{what}: the connection ended after {check.size:,} of {file.size:,} bytes."
            problem = Problem(kind="connection-lost", message=message, remedy="Try again.")
            raise TransientError(problem)

    if file.size == 0:
        return
    patiently(attempt, transport.patience, deadline, progress=lambda: check.size)


def check_headers(
    answer: Answer, commit: str, file: RemoteFile, begin: int, length: int | None = None
) -> None:
    """Checks that an answer with content is about this file of this commit.

    Args:
        answer: the answer, 200 or 206.
        commit: the commit asked for.
        file: the file asked for.
        begin: the first byte asked for; with status 200 it is 0.
        length: how many bytes were asked for; None for all that follow.

    Raises:
        HubError: it is about something else.
    """
    headers = answer.headers
    path = escape(file.path)
    named = headers.get("x-repo-commit")
    if named is not None and named != commit:
        raise bad_answer(f"asked for {path!r} of commit {commit}, it answered with {escape(named)}")
    _check_linked(headers, file)
    if answer.status == 206:
        found = _RANGE.fullmatch(headers.get("content-range", ""))
        end = file.size if length is None else begin + length
        if found is None or (int(found[1]), int(found[2]) + 1, int(found[3])) != (begin, end, file.size):
            said = escape(headers.get("content-range", "nothing"))
            raise bad_answer(f"asked for bytes {begin} to {end} of {path!r}, it answered with {said!r}")


def _check_linked(headers: Mapping[str, str], file: RemoteFile) -> None:
    """Checks what the Hub says of a large file before it redirects to its content."""
    linked = headers.get("x-linked-etag", "").strip().removeprefix("W/").strip('"')
    if linked and file.sha256 is not None and len(linked) == 64 and linked != file.sha256:
        raise bad_answer(f"its headers name other content for {escape(file.path)!r} than the commit")


def require_partial(answer: Answer, file: RemoteFile) -> None:
    """Checks that a server heeds the Range header: else reading a header would download all of the file.

    Raises:
        HubError: it does not.
    """
    if answer.status == 200:
        raise HubError.of(
            "range-ignored",
            f"the server sends all {file.size:,} bytes where a part was asked for.",
            file=escape(file.path),
            remedy="Pull it first, then give the local folder.",
        )
