"""Sends files to a repository in one commit: large content first, then a commit that names it.

Large content is stored by its SHA-256, so sending it twice is the same as once and leaves nothing to see. The
commit is the only step that changes a branch.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from adapterhub_tools.errors import HubError, escape
from adapterhub_tools.hub import library
from adapterhub_tools.hub.patience import Deadline, patiently
from adapterhub_tools.hub.repository import Repository
from adapterhub_tools.hub.transport import Answer, bad_answer
from adapterhub_tools.store.files import LocalFile

LFS_MEDIA = "application/vnd.git-lfs+json"
_PIECE_BYTES = 1 << 20
_SAMPLE_BYTES = 512
_MAX_REGULAR_BYTES = 100 << 20
_MAX_PARTS = 10_000
_SENDERS = 3  # parts that are sent at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A file to send.

    Attributes:
        path: in the repository.
        size: bytes.
        sha256: of its content.
        blob_id: the git blob SHA-1 of its content; None for a file that is too large to be a regular one.
        content: the open file, or its content.
    """

    path: str
    size: int
    sha256: str
    blob_id: str | None
    content: LocalFile | bytes

    @property
    def identities(self) -> tuple[str, ...]:
        """What a commit may call this content: it is the server that decides what is large."""
        return (f"sha256:{self.sha256}",) + ((f"git:{self.blob_id}",) if self.blob_id else ())

    def read(self, offset: int, length: int) -> bytes:
        """Returns a part of the content."""
        if isinstance(self.content, bytes):
            return self.content[offset : offset + length]
        return self.content.read(offset, length)

    def pieces(self, offset: int, length: int, advance: Callable[[int], None] | None) -> Iterator[bytes]:
        """Yields a part of the content, piece by piece."""
        for begin in range(offset, offset + length, _PIECE_BYTES):
            piece = self.read(begin, min(_PIECE_BYTES, offset + length - begin))
            if advance is not None:
                advance(len(piece))
            yield piece

    def check_unchanged(self) -> None:
        """Raises StoreError if the file was changed since it was opened."""
        if isinstance(self.content, LocalFile):
            self.content.check_unchanged()


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitAnswer:
    """What the server says of a new commit.

    Attributes:
        id: the commit.
        pull_request: the URL or ref of the pull request; None without one.
    """

    id: str
    pull_request: str | None


def choose_modes(
    repository: Repository, branch: str, files: Sequence[Outgoing], *, create_pr: bool
) -> frozenset[str]:
    """Asks which files are large; returns their paths.

    Raises:
        HubError: the server refuses, or does not answer for every file.
    """
    if not files:
        return frozenset()
    body = {
        "files": [
            {
                "path": file.path,
                "size": file.size,
                "sample": base64.b64encode(file.read(0, min(_SAMPLE_BYTES, file.size))).decode("ascii"),
            }
            for file in files
        ]
    }
    url = f"/api/models/{repository.id}/preupload/{quote(branch, safe='')}{'?create_pr=1' * create_pr}"
    data, _ = repository.transport.json(
        "POST", url, what=f"preparing the upload to {escape(repository.id)}", body=json.dumps(body).encode()
    )
    entries = data.get("files") if isinstance(data, dict) else None
    modes = {e.get("path"): e.get("uploadMode") for e in entries or [] if isinstance(e, dict)}
    large = set()
    for file in files:
        mode = modes.get(file.path)
        if mode not in ("lfs", "regular"):
            raise bad_answer(f"it does not say how {escape(file.path)!r} is to be sent")
        if mode == "lfs" and file.size:
            large.add(file.path)
        elif file.blob_id is None or file.size > _MAX_REGULAR_BYTES:
            raise bad_answer(f"it wants {file.size:,} bytes of {escape(file.path)!r} inside the commit")
    return frozenset(large)


def send_large(
    repository: Repository,
    files: Sequence[Outgoing],
    *,
    branch: str,
    create_pr: bool,
    advance: Callable[[int], None] | None,
) -> None:
    """Stores the content of large files, where it is not stored already.

    Raises:
        StoreError: a file was changed meanwhile.
        HubError: it cannot be stored.
    """
    if not files:
        return
    endpoint = repository.transport.endpoint
    local = [(file.path, file.content.path) for file in files if isinstance(file.content, LocalFile)]
    if endpoint.is_default and len(local) == len(files) and library.xet_is_on():
        library.upload_by_xet(
            endpoint.url, endpoint.token, repository.id, local, revision=branch, pr=create_pr
        )
        return
    body = {
        "operation": "upload",
        "transfers": ["basic", "multipart"],
        "hash_algo": "sha256",
        "ref": {"name": branch},
        "objects": [{"oid": file.sha256, "size": file.size} for file in files],
    }
    data, _ = repository.transport.json(
        "POST",
        f"/{repository.id}.git/info/lfs/objects/batch",
        what=f"preparing the upload to {escape(repository.id)}",
        body=json.dumps(body).encode(),
        media=LFS_MEDIA,
    )
    entries = data.get("objects") if isinstance(data, dict) else None
    answers = {entry.get("oid"): entry for entry in entries or [] if isinstance(entry, dict)}
    for file in files:
        answer = answers.get(file.sha256)
        if answer is None or answer.get("error"):
            said = answer["error"].get("message", "") if answer and isinstance(answer["error"], dict) else ""
            raise HubError.of(
                "upload",
                f"the server does not take the content{': ' * bool(said)}{escape(said)}.",
                file=escape(file.path),
                remedy="Check that the token may write here, and the quota of the account.",
            )
        try:
            _store(repository, file, answer.get("actions"), advance)
        except HubError:
            file.check_unchanged()  # if it was, that is what is wrong
            raise


def commit(
    repository: Repository,
    branch: str,
    files: Sequence[Outgoing],
    large: frozenset[str],
    deleted: Sequence[str],
    *,
    message: str,
    parent: str,
    create_pr: bool,
) -> CommitAnswer:
    """Makes the commit; asks once, since a second one could be a second commit.

    Raises:
        HubError: it was refused, or no answer came: then it may have happened.
    """
    header: dict[str, Any] = {"summary": message, "description": ""}
    if parent:
        header["parentCommit"] = parent
    lines: list[dict[str, Any]] = [{"key": "header", "value": header}]
    for file in files:
        if file.path in large:
            value = {"path": file.path, "algo": "sha256", "oid": file.sha256, "size": file.size}
            lines.append({"key": "lfsFile", "value": value})
        else:
            encoded = base64.b64encode(file.read(0, file.size)).decode("ascii")
            lines.append(
                {"key": "file", "value": {"path": file.path, "encoding": "base64", "content": encoded}}
            )
    lines += [{"key": "deletedFile", "value": {"path": path}} for path in deleted]
    url = f"/api/models/{repository.id}/commit/{quote(branch, safe='')}{'?create_pr=1' * create_pr}"
    data, _ = repository.transport.json(
        "POST",
        url,
        what=f"committing to {escape(repository.id)}",
        body=b"".join(json.dumps(line).encode() + b"\n" for line in lines),
        content="application/x-ndjson",
        repeatable=False,
    )
    known = data if isinstance(data, dict) else {}
    id, request = known.get("commitOid"), known.get("pullRequestUrl")
    if not isinstance(id, str) or len(id) != 40:
        raise bad_answer("it does not name the commit that it made")
    return CommitAnswer(id=id, pull_request=escape(request) if isinstance(request, str) else None)


def _store(
    repository: Repository, file: Outgoing, actions: Any, advance: Callable[[int], None] | None
) -> None:
    """Does what the server asks for one file: nothing, one upload, or several parts; and a last check."""
    if actions is None:
        return
    upload = actions.get("upload") if isinstance(actions, dict) else None
    verify = actions.get("verify") if isinstance(actions, dict) else None
    if upload is not None:
        href, header = _action(upload)
        if header.get("chunk_size") is None:
            _put(repository, href, file, 0, file.size, advance)
        else:
            _put_parts(repository, href, header, file, advance)
    if verify is not None:
        href, _ = _action(verify)
        repository.transport.json(
            "POST",
            href,
            what=f"checking the upload of {escape(file.path)}",
            body=json.dumps({"oid": file.sha256, "size": file.size}).encode(),
            media=LFS_MEDIA,
            accept=(200, 201, 204),
        )


def _put_parts(
    repository: Repository,
    href: str,
    header: dict[str, Any],
    file: Outgoing,
    advance: Callable[[int], None] | None,
) -> None:
    text = str(header["chunk_size"])
    size = int(text) if text.isascii() and text.isdigit() and len(text) < 16 else 0
    urls = {int(key): value for key, value in header.items() if key.isascii() and key.isdigit()}
    count = -(-file.size // size) if size else 0
    wrong = sorted(urls) != list(range(1, count + 1)) or not all(isinstance(u, str) for u in urls.values())
    if wrong or not 0 < count <= _MAX_PARTS:
        raise bad_answer(f"the parts that it asks for do not make up {file.size:,} bytes")

    def send(number: int) -> dict[str, Any]:
        begin = (number - 1) * size
        answer = _put(repository, urls[number], file, begin, min(size, file.size - begin), advance)
        etag = answer.headers.get("etag", "")
        if not etag:
            raise bad_answer(f"it gives no ETag for part {number}")
        return {"partNumber": number, "etag": etag}

    with ThreadPoolExecutor(_SENDERS, thread_name_prefix="adaptertool-part") as pool:
        sent = [pool.submit(send, number) for number in range(1, count + 1)]
        try:
            parts = [part.result() for part in sent]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    repository.transport.json(
        "POST",
        href,
        what=f"completing the upload of {escape(file.path)}",
        body=json.dumps({"oid": file.sha256, "parts": parts}).encode(),
        media=LFS_MEDIA,
        accept=(200, 201, 204),
        signed=True,
    )


def _put(
    repository: Repository,
    href: str,
    file: Outgoing,
    offset: int,
    length: int,
    advance: Callable[[int], None] | None,
) -> Answer:
    """Sends a part of a file to a signed URL; it may be repeated, being the same content each time."""
    transport = repository.transport
    what = f"uploading {escape(file.path)}"
    deadline: Deadline = transport.patience.deadline(length)
    told = 0

    def counted(count: int) -> None:
        nonlocal told
        told += count
        if advance is not None:
            advance(count)

    def attempt() -> Answer:
        counted(-told)  # what an earlier try sent counts for nothing
        with transport.open(
            "PUT",
            href,
            what=what,
            deadline=deadline,
            headers={"content-length": str(length)},
            body=file.pieces(offset, length, counted),
            signed=True,
        ) as answer:
            if answer.status not in (200, 201, 204):
                raise transport.refusal(answer, what)
            answer.read(_PIECE_BYTES)
            return answer

    return patiently(attempt, transport.patience, deadline)


def _action(action: Any) -> tuple[str, dict[str, Any]]:
    href = action.get("href") if isinstance(action, dict) else None
    header = action.get("header") if isinstance(action, dict) else None
    if not isinstance(href, str) or not isinstance(header or {}, dict):
        raise bad_answer("what it asks for to upload a file has no URL")
    return href, header or {}
