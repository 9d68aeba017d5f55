"""JSON shapes of repositories, files and commits, as huggingface_hub reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import yaml

from tests.hub.server.store import Commit, Entry, Repo, Store


def as_date(seconds: float) -> str:
    """ISO time with milliseconds, as the Hub writes it."""
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def card_data(content: bytes) -> dict[str, Any]:
    """The YAML head of a model card.

    Raises:
        ValueError: the head is not a YAML object.
    """
    lines = content.decode("utf-8").splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    end = next((i for i, line in enumerate(lines[1:], start=1) if line.strip() == "---"), None)
    if end is None:
        raise ValueError("the YAML head has no end")
    try:
        data = yaml.safe_load("\n".join(lines[1:end]))
    except yaml.YAMLError as error:
        raise ValueError(f"the YAML head cannot be read: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ValueError("the YAML head is not an object")
    return data


def _safe_card(store: Store, tree: Mapping[str, Entry]) -> dict[str, Any]:
    card = tree.get("README.md")
    if card is None:
        return {}
    try:
        return card_data(store.blob_path(card.sha256).read_bytes())
    except ValueError:
        return {}


def tree_file(path: str, entry: Entry, commit: Commit | None = None) -> dict[str, Any]:
    """One file in a tree listing or in paths-info; with its last commit if asked to expand."""
    item: dict[str, Any] = {"type": "file", "oid": entry.blob_id, "size": entry.size, "path": path}
    if entry.lfs:
        item["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
    if commit is not None:
        item["lastCommit"] = {"id": commit.oid, "title": commit.title, "date": as_date(commit.date)}
    return item


def tree_folder(path: str, commit_id: str) -> dict[str, Any]:
    """One folder in a tree listing; its id depends on commit and path only."""
    return {
        "type": "directory",
        "oid": hashlib.sha1(f"{commit_id}:{path}".encode()).hexdigest(),
        "size": 0,
        "path": path,
    }


def tree_items(
    tree: Mapping[str, Entry], commit: Commit, *, under: str, recursive: bool, expand: bool
) -> list[Any]:
    """The listing of a folder: its files and folders, deeper ones too if recursive."""
    prefix = f"{under}/" if under else ""
    items: dict[str, Any] = {}
    for path, entry in tree.items():
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts)):
            if recursive or depth == 1:
                folder = prefix + "/".join(parts[:depth])
                items[folder] = tree_folder(folder, commit.oid)
        if recursive or len(parts) == 1:
            items[path] = tree_file(path, entry, commit if expand else None)
    return [items[path] for path in sorted(items)]


def sibling(path: str, entry: Entry, *, blobs: bool) -> dict[str, Any]:
    """One file in the information about a repository."""
    item: dict[str, Any] = {"rfilename": path}
    if blobs:
        item |= {"size": entry.size, "blobId": entry.blob_id}
        if entry.lfs:
            item["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
    return item


def repo_info(store: Store, repo: Repo, oid: str, *, blobs: bool) -> dict[str, Any]:
    """What GET /api/models/{id} answers."""
    tree = store.tree(repo.name, oid)
    commit = store.commit(repo.name, oid)
    assert commit is not None
    card = _safe_card(store, tree)
    tags = [str(tag) for tag in card.get("tags") or []]
    library = card.get("library_name")
    return {
        "_id": "0" * 24,
        "id": repo.name,
        "modelId": repo.name,
        "author": repo.owner,
        "sha": oid,
        "createdAt": as_date(repo.created),
        "lastModified": as_date(commit.date),
        "private": repo.private,
        "disabled": False,
        "gated": "auto" if repo.gated else False,
        "downloads": 0,
        "likes": 0,
        "tags": tags if library is None else [*tags, str(library)],
        **({} if library is None else {"library_name": library}),
        **({"cardData": card} if card else {}),
        "siblings": [sibling(path, entry, blobs=blobs) for path, entry in tree.items()],
        "usedStorage": sum(entry.size for entry in tree.values()),
    }


def refs_info(refs: Mapping[str, str], *, pull_requests: bool) -> dict[str, Any]:
    """What GET …/refs answers."""

    def group(prefix: str) -> list[dict[str, str]]:
        names = [ref for ref in refs if ref.startswith(prefix)]
        return [{"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": refs[ref]} for ref in names]

    answer = {"branches": group("refs/heads/"), "tags": group("refs/tags/"), "converts": []}
    if pull_requests:
        answer["pullRequests"] = [{**item, "name": item["ref"]} for item in group("refs/pr/")]
    return answer


def commit_info(commit: Commit) -> dict[str, Any]:
    """One line of GET …/commits."""
    return {
        "id": commit.oid,
        "title": commit.title,
        "message": commit.message,
        "authors": [{"user": commit.author, "avatar": ""}],
        "date": as_date(commit.date),
    }
