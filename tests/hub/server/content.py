"""Content in and out: resolve, LFS upload instructions, and the storage host that both point to.

The storage ("CDN") is another origin. Its addresses are signed, and like S3 it refuses a request that carries
an Authorization header beside the signature.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import re
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse

from tests.hub.server.access import commit_of, readable_repo, refuse, writable_repo
from tests.hub.server.store import Store

if TYPE_CHECKING:
    from starlette.requests import Request

CHUNK = 1 << 18
SHA256 = re.compile(r"[0-9a-f]{64}")
RANGE = re.compile(r"bytes=(\d*)-(\d*)")


def _signature(request: Request, text: str) -> str:
    return hmac.new(request.app.state.key, text.encode(), hashlib.sha256).hexdigest()[:32]


def signed(request: Request, path: str, method: str = "GET") -> str:
    """An address at the storage, allowed for one method."""
    origins: dict[str, str] = request.app.state.origins
    return f"{origins['cdn']}{path}?X-Signature={_signature(request, f'{method} {path}')}"


def check_signature(request: Request) -> None:
    """Refuses a request at the storage that is not signed, or that also carries a token."""
    method = "GET" if request.method == "HEAD" else request.method
    path = request.scope["raw_path"].decode("ascii")
    expected = _signature(request, f"{method} {path}")
    if request.headers.get("authorization") is not None:
        raise refuse(400, "Only one auth mechanism allowed")
    if not hmac.compare_digest(request.query_params.get("X-Signature", ""), expected):
        raise refuse(403, "SignatureDoesNotMatch")


# -- out ------------------------------------------------------------------------------------------------
def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and end of a single byte range; None for no range.

    Raises:
        HTTPException: 416 where the range lies outside.
    """
    match = RANGE.fullmatch(header or "")
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(size, int(last) + 1) if last else size
    if start >= end:
        error = refuse(416, "Range Not Satisfiable")
        assert error.headers is not None
        raise type(error)(416, detail="Range Not Satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return start, end


def _pieces(path: Path, start: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while start < end:
            piece = file.read(min(CHUNK, end - start))
            start += len(piece)
            yield piece


def file_answer(request: Request, path: Path, headers: dict[str, str]) -> Response:
    """Content of a file, whole or a range of it."""
    size = path.stat().st_size
    span = parse_range(request.headers.get("range"), size)
    start, end = span or (0, size)
    headers = {"Accept-Ranges": "bytes", "Content-Length": str(end - start), **headers}
    if span is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    status = 200 if span is None else 206
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers)

    async def body() -> AsyncIterator[bytes]:
        for piece in _pieces(path, start, end):
            yield piece

    return StreamingResponse(
        body(), status_code=status, headers=headers, media_type="application/octet-stream"
    )


async def resolve(request: Request) -> Response:
    """HEAD and GET /{id}/resolve/{revision}/{path}: LFS content is elsewhere, and so is the rest."""
    repo = readable_repo(request)
    oid = commit_of(request, repo)
    store: Store = request.app.state.store
    path = request.path_params["path"]
    entry = store.tree(repo.name, oid).get(path)
    if entry is None:
        error = refuse(404, "Entry not found", "EntryNotFound")
        assert error.headers is not None
        raise type(error)(404, detail="Entry not found", headers={**error.headers, "X-Repo-Commit": oid})
    headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
    if entry.lfs:
        headers |= {
            "ETag": f'"{entry.blob_id}"',
            "X-Linked-Etag": f'"{entry.sha256}"',
            "X-Linked-Size": str(entry.size),
        }
        return RedirectResponse(signed(request, f"/blobs/{entry.sha256}"), status_code=302, headers=headers)
    headers |= {
        "ETag": f'"{entry.blob_id}"',
        "X-Linked-Etag": f'"{entry.blob_id}"',
        "X-Linked-Size": str(entry.size),
    }
    target = f"/api/resolve-cache/models/{repo.name}/{oid}/{quote(path, safe='')}"
    return RedirectResponse(target, status_code=307, headers=headers)


async def resolve_cache(request: Request) -> Response:
    """Where `resolve` sends for a regular file: the same origin, the commit in the path."""
    repo = readable_repo(request)
    store: Store = request.app.state.store
    oid = commit_of(request, repo)
    entry = store.tree(repo.name, oid).get(request.path_params["path"])
    if entry is None or entry.lfs:
        raise refuse(404, "Entry not found", "EntryNotFound")
    headers = {"X-Repo-Commit": oid, "ETag": f'"{entry.blob_id}"'}
    return file_answer(request, store.blob_path(entry.sha256), headers)


async def storage_get(request: Request) -> Response:
    """GET /blobs/{sha256} at the storage."""
    check_signature(request)
    store: Store = request.app.state.store
    sha256 = request.path_params["sha256"]
    if not SHA256.fullmatch(sha256) or not store.has_blob(sha256):
        raise refuse(404, "NoSuchKey")
    return file_answer(request, store.blob_path(sha256), {"ETag": f'"{sha256}"'})


# -- in -------------------------------------------------------------------------------------------------
async def _receive(request: Request, path: Path, digest: Any) -> int:
    size = 0
    with path.open("wb") as file:
        async for piece in request.stream():
            digest.update(piece)
            file.write(piece)
            size += len(piece)
    return size


async def lfs_batch(request: Request) -> Response:
    """POST /{id}.git/info/lfs/objects/batch: where each object goes, or nothing to do."""
    name = request.path_params["name"]
    if not name.endswith(".git"):
        raise refuse(404, "not found")
    request.scope["path_params"]["name"] = name.removesuffix(".git")
    repo, _ = writable_repo(request)
    store: Store = request.app.state.store
    origins: dict[str, str] = request.app.state.origins
    answers: list[dict[str, Any]] = []
    for item in (await request.json())["objects"]:
        oid, size = item["oid"], item["size"]
        answer: dict[str, Any] = {"oid": oid, "size": size}
        answers.append(answer)
        if not SHA256.fullmatch(oid):
            answer["error"] = {"code": 422, "message": "oid is not a SHA-256"}
        elif not store.has_blob(oid, size):
            base = f"{origins['hub']}/{repo.name}.git/info/lfs"
            upload: dict[str, Any] = {"href": signed(request, f"/upload/{oid}", "PUT")}
            if size > store.multipart_bytes:
                parts = math.ceil(size / store.part_bytes)
                header = {
                    f"{part:05d}": signed(request, f"/upload/{oid}/{part}", "PUT")
                    for part in range(1, parts + 1)
                }
                signature = _signature(request, f"complete {oid} {parts}")
                upload = {
                    "href": f"{base}/multipart/{oid}?X-Signature={signature}",
                    "header": {"chunk_size": str(store.part_bytes), **header},
                }
            answer["actions"] = {"upload": upload, "verify": {"href": f"{base}/verify"}}
    body = {"transfer": "multipart", "objects": answers}
    return Response(json.dumps(body), media_type="application/vnd.git-lfs+json")


async def storage_put(request: Request) -> Response:
    """PUT of a whole object at the storage: refused unless its bytes have the promised SHA-256."""
    check_signature(request)
    store: Store = request.app.state.store
    digest = hashlib.sha256()
    temporary = store.temporary()
    await _receive(request, temporary, digest)
    if digest.hexdigest() != request.path_params["sha256"]:
        temporary.unlink()
        raise refuse(400, "BadDigest: the SHA-256 of the content is not the one that was promised")
    store.adopt(temporary, digest.hexdigest())
    return Response(headers={"ETag": f'"{digest.hexdigest()}"'})


def _part_path(store: Store, sha256: str, part: int) -> Path:
    return store.data / "uploads" / f"{sha256}.parts" / f"{part:05d}"


async def storage_put_part(request: Request) -> Response:
    """PUT of one part at the storage."""
    check_signature(request)
    store: Store = request.app.state.store
    path = _part_path(store, request.path_params["sha256"], int(request.path_params["part"]))
    path.parent.mkdir(exist_ok=True)
    digest = hashlib.md5()
    temporary = store.temporary()
    await _receive(request, temporary, digest)
    temporary.replace(path)
    return Response(headers={"ETag": f'"{digest.hexdigest()}"'})


async def complete_multipart(request: Request) -> Response:
    """POST after the last part: puts the parts together and checks the SHA-256."""
    store: Store = request.app.state.store
    sha256 = request.path_params["sha256"]
    body = await request.json()
    parts = [int(part["partNumber"]) for part in body["parts"]]
    expected = _signature(request, f"complete {sha256} {len(parts)}")
    if not hmac.compare_digest(request.query_params.get("X-Signature", ""), expected):
        raise refuse(403, "SignatureDoesNotMatch")
    if store.has_blob(sha256):
        return JSONResponse({"ok": True})  # the answer to an earlier completion was lost
    digest = hashlib.sha256()
    temporary = store.temporary()
    with temporary.open("wb") as out:
        for number, part in zip(parts, body["parts"], strict=True):
            path = _part_path(store, sha256, number)
            if not path.is_file():
                raise refuse(400, f"InvalidPart: {number}")
            content = path.read_bytes()
            if hashlib.md5(content).hexdigest() != part["etag"].strip('"'):
                raise refuse(400, f"InvalidPart: the ETag of part {number} differs")
            digest.update(content)
            out.write(content)
    if digest.hexdigest() != sha256:
        temporary.unlink()
        raise refuse(400, "BadDigest: the SHA-256 of the parts is not the one that was promised")
    store.adopt(temporary, sha256)
    shutil.rmtree(_part_path(store, sha256, 1).parent)
    return JSONResponse({"ok": True})


async def lfs_verify(request: Request) -> Response:
    """POST verify: is the object there, with this size?"""
    request.scope["path_params"]["name"] = request.path_params["name"].removesuffix(".git")
    writable_repo(request)
    store: Store = request.app.state.store
    body = await request.json()
    if not store.has_blob(body["oid"], body["size"]):
        raise refuse(404, "object not found")
    return JSONResponse({"ok": True})
