"""Who may do what, and the answers that the Hub gives to those who may not.

A repository that one may not see is answered like one that does not exist: 401 without a token, 404 with one.
An invalid or expired token is 401 everywhere, public repositories included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException

from tests.hub.server.store import Account, Repo, Store

if TYPE_CHECKING:
    from starlette.requests import Request


def refuse(status: int, message: str, code: str = "") -> HTTPException:
    """An error answer with the headers that the client goes by."""
    headers = {"X-Error-Message": message}
    if code:
        headers["X-Error-Code"] = code
    return HTTPException(status, detail=message, headers=headers)


def account_of(request: Request) -> Account | None:
    """Whose token the request carries; None without a token.

    Raises:
        HTTPException: 401 for a token that is unknown or expired.
    """
    header = request.headers.get("authorization")
    if header is None:
        return None
    store: Store = request.app.state.store
    account = store.account(header.removeprefix("Bearer "))
    if account is None or account.role == "expired":
        raise refuse(401, "Invalid credentials in Authorization header")
    return account


def need_account(request: Request) -> Account:
    """Like `account_of`, where anonymous access is refused."""
    account = account_of(request)
    if account is None:
        raise refuse(401, "Invalid username or password.")
    return account


def _not_found(account: Account | None) -> HTTPException:
    if account is None:
        return refuse(401, "Invalid username or password.", "RepoNotFound")
    return refuse(404, "Repository not found", "RepoNotFound")


def visible_repo(request: Request) -> Repo:
    """The repository of the path, for its metadata."""
    account = account_of(request)
    store: Store = request.app.state.store
    repo = store.repo(f"{request.path_params['namespace']}/{request.path_params['name']}")
    if repo is None or (repo.private and (account is None or account.user != repo.owner)):
        raise _not_found(account)
    return repo


def readable_repo(request: Request) -> Repo:
    """The repository of the path, for its content."""
    repo = visible_repo(request)
    account = account_of(request)
    if repo.gated and (account is None or account.user != repo.owner):
        status = 401 if account is None else 403
        raise refuse(status, f"Access to model {repo.name} is restricted.", "GatedRepo")
    return repo


def writable_repo(request: Request) -> tuple[Repo, Account]:
    """The repository of the path, for a change."""
    repo = visible_repo(request)
    account = account_of(request)
    if account is None:
        raise refuse(401, "Invalid username or password.")
    if account.role == "read":
        raise refuse(403, "Forbidden: you must use a write token to upload to a repository.")
    if account.user != repo.owner:
        raise refuse(403, f"Forbidden: you don't have the rights to change {repo.name}.")
    return repo, account


def commit_of(request: Request, repo: Repo) -> str:
    """The commit of the revision in the path."""
    store: Store = request.app.state.store
    revision = request.path_params.get("revision", "main")
    oid = store.resolve(repo.name, revision)
    if oid is None:
        raise refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return oid
