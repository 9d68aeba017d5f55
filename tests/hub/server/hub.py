"""The Hub's own endpoints, as huggingface_hub 2.4.0 calls them, and the application of each origin."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs, unquote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.hub.server import content, listing
from tests.hub.server.access import account_of, commit_of, need_account, refuse, visible_repo, writable_repo
from tests.hub.server.store import COMMIT_ID, ConflictError, Entry, Store, lfs_entry

Endpoint = Callable[[Request], Awaitable[Response]]
REPO_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}")
MODEL = "/api/models/{namespace}/{name}"


def _store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


def _flag(request: Request, name: str) -> bool:
    return request.query_params.get(name, "").lower() in {"1", "true"}


# -- accounts and repositories --------------------------------------------------------------------------
async def whoami(request: Request) -> Response:
    account = need_account(request)
    role = "read" if account.role == "read" else "write"
    token = {"displayName": "test", "role": role}
    body = {"type": "user", "id": "0" * 24, "name": account.user, "fullname": account.user, "orgs": []}
    return JSONResponse({**body, "auth": {"type": "access_token", "accessToken": token}})


async def create_repo(request: Request) -> Response:
    account = need_account(request)
    body = await request.json()
    owner = body.get("organization") or account.user
    name = f"{owner}/{body['name']}"
    if account.role == "read" or owner != account.user:
        raise refuse(403, f'You don\'t have the rights to create a model under the namespace "{owner}".')
    if not REPO_NAME.fullmatch(body["name"]):
        raise refuse(400, "Invalid repo name")
    url = f"{request.app.state.origins['hub']}/{name}"
    if _store(request).repo(name) is not None:
        message = "You already created this model repo"
        return JSONResponse(
            {"error": message, "url": url}, status_code=409, headers={"X-Error-Message": message}
        )
    _store(request).create_repo(
        name, private=body.get("visibility") == "private" or bool(body.get("private"))
    )
    return JSONResponse({"url": url, "name": name, "id": "0" * 24})


async def delete_repo(request: Request) -> Response:
    account = need_account(request)
    body = await request.json()
    request.scope["path_params"] = {
        "namespace": body.get("organization") or account.user,
        "name": body["name"],
    }
    repo, _ = writable_repo(request)
    _store(request).delete_repo(repo.name)
    return JSONResponse({})


async def validate_yaml(request: Request) -> Response:
    account_of(request)
    try:
        listing.card_data((await request.json())["content"].encode())
    except ValueError as error:
        return JSONResponse({"errors": [{"message": str(error)}], "warnings": []}, status_code=400)
    return JSONResponse({"errors": [], "warnings": []})


async def repo_info(request: Request) -> Response:
    repo = visible_repo(request)
    oid = commit_of(request, repo)
    return JSONResponse(listing.repo_info(_store(request), repo, oid, blobs=_flag(request, "blobs")))


async def tree(request: Request) -> Response:
    repo = visible_repo(request)
    store = _store(request)
    oid = commit_of(request, repo)
    commit = store.commit(repo.name, oid)
    assert commit is not None
    under = request.path_params.get("path", "").strip("/")
    items = listing.tree_items(
        store.tree(repo.name, oid), commit, under=under,
        recursive=_flag(request, "recursive"), expand=_flag(request, "expand"),
    )  # fmt: skip
    if under and not items:
        raise refuse(404, f"{under} does not exist on {request.path_params.get('revision')}", "EntryNotFound")
    start = int(request.query_params.get("cursor", "0"))
    headers = {}
    if start + store.page_size < len(items):
        following = request.url.replace(scheme="http").include_query_params(cursor=start + store.page_size)
        origin = request.app.state.origins["hub"]
        path = request.scope["raw_path"].decode("ascii")
        headers["Link"] = f'<{origin}{path}?{following.query}>; rel="next"'
    return JSONResponse(items[start : start + store.page_size], headers=headers)


async def paths_info(request: Request) -> Response:
    repo = visible_repo(request)
    store = _store(request)
    oid = commit_of(request, repo)
    commit = store.commit(repo.name, oid)
    assert commit is not None
    entries = store.tree(repo.name, oid)
    form = parse_qs((await request.body()).decode("ascii"))
    expand = form.get("expand", [""])[0].lower() == "true"
    found: list[dict[str, Any]] = []
    for path in form.get("paths", []):
        if path in entries:
            found.append(listing.tree_file(path, entries[path], commit if expand else None))
        elif any(other.startswith(f"{path}/") for other in entries):
            found.append(listing.tree_folder(path, oid))
    return JSONResponse(found)


async def commits(request: Request) -> Response:
    repo = visible_repo(request)
    history = _store(request).history(repo.name, commit_of(request, repo))
    return JSONResponse([listing.commit_info(commit) for commit in history])


# -- refs -----------------------------------------------------------------------------------------------
async def refs(request: Request) -> Response:
    repo = visible_repo(request)
    found = _store(request).refs(repo.name)
    return JSONResponse(listing.refs_info(found, pull_requests=_flag(request, "include_prs")))


async def create_ref(request: Request) -> Response:
    """POST …/branch/{branch} and …/tag/{revision}."""
    repo, _ = writable_repo(request)
    store = _store(request)
    body = await request.json()
    if "branch" in request.path_params:
        name, ref = request.path_params["branch"], f"refs/heads/{request.path_params['branch']}"
        request.scope["path_params"]["revision"] = body.get("startingPoint") or "main"
    else:
        name, ref = body["tag"], f"refs/tags/{body['tag']}"
    oid = commit_of(request, repo)
    if ref in store.refs(repo.name):
        raise refuse(409, f"Reference already exists: {name}")
    store.set_ref(repo.name, ref, oid, body.get("message") or "")
    return JSONResponse({})


async def delete_ref(request: Request) -> Response:
    repo, _ = writable_repo(request)
    params = request.path_params
    ref = f"refs/heads/{params['branch']}" if "branch" in params else f"refs/tags/{params['revision']}"
    if ref == "refs/heads/main" or not _store(request).delete_ref(repo.name, ref):
        raise refuse(404, f"Invalid reference: {ref}", "RevisionNotFound")
    return JSONResponse({})


# -- commits --------------------------------------------------------------------------------------------
async def preupload(request: Request) -> Response:
    repo, _ = writable_repo(request)
    store = _store(request)
    entries = store.tree(repo.name, commit_of(request, repo))
    answers = []
    for item in (await request.json())["files"]:
        path, size = item["path"], item["size"]
        entry = entries.get(path)
        answer = {
            "path": path,
            "uploadMode": "lfs" if store.goes_to_lfs(path, size) else "regular",
            "shouldIgnore": False,
        }
        if entry is not None:
            answer["oid"] = entry.sha256 if entry.lfs else entry.blob_id
        answers.append(answer)
    return JSONResponse({"files": answers, "commitOid": commit_of(request, repo)})


def _check_path(path: str) -> str:
    parts = path.rstrip("/").split("/")
    if any(part in {"", ".", "..", ".git"} for part in parts) or "\\" in path or "\0" in path:
        raise refuse(400, f"Invalid path: {path}")
    return path


def _changes(store: Store, lines: list[dict[str, Any]]) -> tuple[dict[str, Entry], list[str]]:
    """What the lines of a commit add and delete."""
    changes: dict[str, Entry] = {}
    deleted: list[str] = []
    for line in lines:
        key, value = line["key"], line["value"]
        path = _check_path(value["path"])
        if key == "file":
            changes[path] = store.regular_entry(base64.b64decode(value["content"], validate=True))
        elif key == "lfsFile":
            sha256 = value["oid"]
            size = value.get("size")
            if not content.SHA256.fullmatch(sha256) or not store.has_blob(sha256, size):
                raise refuse(400, f"Your push was rejected because LFS object {sha256} is missing")
            changes[path] = lfs_entry(sha256, store.blob_path(sha256).stat().st_size)
        elif key in {"deletedFile", "deletedFolder"}:
            deleted.append(path if key == "deletedFile" else path.rstrip("/") + "/")
        else:
            raise refuse(400, f"Unknown key: {key}")
    return changes, deleted


async def create_commit(request: Request) -> Response:
    repo, account = writable_repo(request)
    store = _store(request)
    lines = [json.loads(line) for line in (await request.body()).splitlines() if line]
    header = lines[0]["value"]
    parent = header.get("parentCommit")
    if (
        lines[0]["key"] != "header"
        or not header.get("summary")
        or (parent and not COMMIT_ID.fullmatch(parent))
    ):
        raise refuse(400, "Invalid commit header")
    start = commit_of(request, repo)
    ref = store.full_ref(repo.name, request.path_params["revision"])
    changes, deleted = _changes(store, lines[1:])
    missing = [
        path for path in deleted if not path.endswith("/") and path not in store.tree(repo.name, start)
    ]
    if missing:
        raise refuse(404, f"A file with this name doesn't exist: {missing[0]}", "EntryNotFound")
    number = 0
    if _flag(request, "create_pr"):
        if parent is not None and parent != start:
            raise refuse(412, "A commit has happened since. Please refresh and try again.")
        number = 1 + sum(name.startswith("refs/pr/") for name in store.refs(repo.name))
        ref, parent = f"refs/pr/{number}", None
    if ref is None or ref.startswith("refs/tags/"):
        raise refuse(400, f"Not a branch: {request.path_params['revision']}")
    try:
        commit = store.add_commit(
            repo.name, ref, changes=changes, deleted=deleted, expected_parent=parent, start=start,
            title=header["summary"], message=header.get("description") or "", author=account.user,
        )  # fmt: skip
    except ConflictError:
        raise refuse(412, "A commit has happened since. Please refresh and try again.") from None
    url = f"{request.app.state.origins['hub']}/{repo.name}"
    answer = {
        "success": True,
        "commitOid": commit.oid,
        "commitUrl": f"{url}/commit/{commit.oid}",
        "hookOutput": "",
    }
    if number:
        answer["pullRequestUrl"] = f"{url}/discussions/{number}"
    return JSONResponse(answer)


async def not_here(request: Request) -> Response:
    """What this server has not: xet, agent harnesses."""
    raise refuse(404, "Not found")


# -- applications ---------------------------------------------------------------------------------------
def _route(path: str, endpoint: Endpoint, *methods: str) -> Route:
    """A route on the raw path: a revision with a slash arrives as one part, and is decoded here."""

    async def decoded(request: Request) -> Response:
        request.scope["path_params"] = {k: unquote(v) for k, v in request.path_params.items()}
        return await endpoint(request)

    return Route(path, decoded, methods=list(methods) or ["GET"])


async def _error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if request.method == "HEAD":
        return Response(status_code=error.status_code, headers=error.headers)
    return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=error.headers)


def hub_app(store: Store, origins: dict[str, str], key: bytes) -> Starlette:
    """The application of one origin of the Hub; the storage answers on its own paths."""
    lfs = "/{namespace}/{name}/info/lfs"
    app = Starlette(
        routes=[
            _route("/api/whoami-v2", whoami),
            _route("/api/repos/create", create_repo, "POST"),
            _route("/api/repos/delete", delete_repo, "DELETE"),
            _route("/api/validate-yaml", validate_yaml, "POST"),
            _route("/api/resolve-cache/models/{namespace}/{name}/{revision}/{path}", content.resolve_cache),
            _route(MODEL, repo_info),
            _route(f"{MODEL}/revision/{{revision}}", repo_info),
            _route(f"{MODEL}/tree/{{revision}}", tree),
            _route(f"{MODEL}/tree/{{revision}}/{{path:path}}", tree),
            _route(f"{MODEL}/paths-info/{{revision}}", paths_info, "POST"),
            _route(f"{MODEL}/commits/{{revision}}", commits),
            _route(f"{MODEL}/refs", refs),
            _route(f"{MODEL}/branch/{{branch}}", create_ref, "POST"),
            _route(f"{MODEL}/branch/{{branch}}", delete_ref, "DELETE"),
            _route(f"{MODEL}/tag/{{revision}}", create_ref, "POST"),
            _route(f"{MODEL}/tag/{{revision}}", delete_ref, "DELETE"),
            _route(f"{MODEL}/preupload/{{revision}}", preupload, "POST"),
            _route(f"{MODEL}/commit/{{revision}}", create_commit, "POST"),
            _route(f"{lfs}/objects/batch", content.lfs_batch, "POST"),
            _route(f"{lfs}/verify", content.lfs_verify, "POST"),
            _route(f"{lfs}/multipart/{{sha256}}", content.complete_multipart, "POST"),
            _route("/{namespace}/{name}/resolve/{revision}/{path:path}", content.resolve),
        ],
        exception_handlers={HTTPException: _error},
    )
    app.state.store, app.state.origins, app.state.key = store, origins, key
    return app


def storage_app(store: Store, origins: dict[str, str], key: bytes) -> Starlette:
    """The application of the storage host."""
    app = Starlette(
        routes=[
            _route("/blobs/{sha256}", content.storage_get),
            _route("/upload/{sha256}", content.storage_put, "PUT"),
            _route("/upload/{sha256}/{part}", content.storage_put_part, "PUT"),
        ],
        exception_handlers={HTTPException: _error},
    )
    app.state.store, app.state.origins, app.state.key = store, origins, key
    return app
