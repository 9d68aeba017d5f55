"""The endpoint that tests steer the server by: faults, log, stored state, quick commits without a client."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.hub.server.faults import Fault, Log, Play
from tests.hub.server.store import Entry, Store, lfs_entry

if TYPE_CHECKING:
    from starlette.requests import Request

SETTINGS = ("page_size", "lfs_bytes", "multipart_bytes", "part_bytes")


def control_app(store: Store, log: Log) -> Starlette:
    """The control application."""
    defaults = {name: getattr(store, name) for name in SETTINGS}

    async def reset(request: Request) -> Response:
        for known in (log.requests, log.fired, log.armed):
            known.clear()
        for name, value in defaults.items():
            setattr(store, name, value)
        return JSONResponse({})

    async def settings(request: Request) -> Response:
        for name, value in (await request.json()).items():
            if name not in SETTINGS:
                return JSONResponse({"error": f"no setting {name}"}, status_code=400)
            setattr(store, name, value)
        return JSONResponse({})

    async def faults(request: Request) -> Response:
        if request.method == "POST":
            fault = Fault(**await request.json())
            if not hasattr(Play, f"play_{fault.kind}"):
                return JSONResponse({"error": f"no fault {fault.kind}"}, status_code=400)
            log.armed.append(fault)
        elif request.method == "DELETE":
            log.armed.clear()
        return JSONResponse(log.fired)

    async def requests(request: Request) -> Response:
        return JSONResponse(log.requests)

    async def state(request: Request) -> Response:
        repo = store.repo(request.query_params["repo"])
        if repo is None:
            return JSONResponse({})
        commits: dict[str, Any] = {}
        for commit in store.all_commits(repo.name):
            files = {
                path: {"sha256": e.sha256, "size": e.size, "lfs": e.lfs, "blob_id": e.blob_id}
                for path, e in store.tree(repo.name, commit.oid).items()
            }
            message = {"title": commit.title, "message": commit.message, "author": commit.author}
            commits[commit.oid] = {"parent": commit.parent, **message, "files": files}
        return JSONResponse({"private": repo.private, "refs": store.refs(repo.name), "commits": commits})

    async def seed(request: Request) -> Response:
        body = await request.json()
        name = body["repo"]
        if store.repo(name) is None:
            store.create_repo(name, private=body["private"], gated=body["gated"])
        changes: dict[str, Entry] = {}
        for path, source in body["files"].items():
            content = Path(source).read_bytes()
            Path(source).unlink()
            entry = store.regular_entry(content)
            changes[path] = (
                lfs_entry(entry.sha256, entry.size) if store.goes_to_lfs(path, entry.size) else entry
            )
        ref = store.full_ref(name, body["revision"]) or f"refs/heads/{body['revision']}"
        commit = store.add_commit(
            name, ref, changes=changes, start=store.resolve(name, "main"), title=body["message"],
            author=name.split("/")[0],
        )  # fmt: skip
        if body["tag"]:
            store.set_ref(name, f"refs/tags/{body['tag']}", commit.oid)
        return JSONResponse({"commit": commit.oid})

    return Starlette(
        routes=[
            Route("/reset", reset, methods=["POST"]),
            Route("/settings", settings, methods=["POST"]),
            Route("/faults", faults, methods=["GET", "POST", "DELETE"]),
            Route("/requests", requests),
            Route("/state", state),
            Route("/seed", seed, methods=["POST"]),
        ]
    )
