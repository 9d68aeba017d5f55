"""A repository of the Hub: what a revision holds, history and tags, and making them. Answers are checked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from adapterhub_tools.errors import HubError, escape
from adapterhub_tools.hub.endpoint import Endpoint
from adapterhub_tools.hub.patience import Patience
from adapterhub_tools.hub.transport import Transport, bad_answer
from adapterhub_tools.hub.trees import RemoteFile
from adapterhub_tools.store.files import path_reason

DEFAULT_BRANCH = "main"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NEXT = re.compile(r'<([^<>]*)>\s*;\s*rel="?next"?')
_MAX_PAGES = 100
_MAX_FILES = 100_000
_MAX_FILE_BYTES = 1 << 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A commit that a revision names.

    Attributes:
        id: its 40 hexadecimal digits; empty if the repository has no commit yet.
        private: whether the repository is private.
    """

    id: str
    private: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """An entry of the history.

    Attributes:
        id: the commit.
        title: its first line.
        date: when, as the server says.
    """

    id: str
    title: str
    date: str


class Repository:
    """One repository.

    Attributes:
        id: ``"owner/name"``.
        transport: how it is reached.
    """

    def __init__(self, id: str, transport: Transport) -> None:
        self.id = id
        self.transport = transport
        self._api = f"/api/models/{id}"

    @classmethod
    def connect(cls, id: str) -> Repository:
        """Returns a repository at the endpoint of the environment."""
        return cls(id, Transport(Endpoint.from_environment(), Patience.from_environment()))

    @property
    def _shown(self) -> str:
        return escape(self.id)

    def pin(self, revision: str | None = None) -> Commit:
        """Returns the commit that a revision names now.

        Raises:
            HubError: there is no such repository or revision, or it may not be read.
        """
        name = revision or DEFAULT_BRANCH
        path = f"{self._api}/revision/{quote(name, safe='')}"
        data, _ = self.transport.json("GET", path, what=f"looking up {self._shown} at {escape(name)}")
        if not isinstance(data, dict):
            raise bad_answer("the description of the repository is no object")
        commit = data.get("sha")
        if commit is None:
            commit = ""
        elif not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise bad_answer(f"{escape(commit)!r} is not a commit")
        if _COMMIT.fullmatch(name) and commit != name:
            raise bad_answer(f"asked for commit {name}, it answered for {commit}")
        return Commit(id=commit, private=data.get("private") is True)

    def tree(self, commit: str, folder: str = "") -> tuple[RemoteFile, ...]:
        """Returns the files of a commit, in or below a folder, sorted by path.

        Raises:
            HubError: they cannot be listed, or a path in the list is hostile.
        """
        below = f"/{quote(folder)}" if folder else ""
        url = f"{self._api}/tree/{commit}{below}?recursive=true&expand=false"
        found: dict[str, RemoteFile] = {}
        for entry in self._pages(url, f"listing the files of {self._shown}"):
            file = _file(entry)
            if file is None:
                continue
            if file.path in found or (folder and not file.path.startswith(folder + "/")):
                raise bad_answer(f"its list of files holds {escape(file.path)!r} twice or out of place")
            found[file.path] = file
            if len(found) > _MAX_FILES:
                raise bad_answer(f"it lists more than {_MAX_FILES:,} files")
        return tuple(found[path] for path in sorted(found))

    def tags(self) -> dict[str, str]:
        """Returns tag -> commit."""
        return self._refs("tags")

    def branches(self) -> dict[str, str]:
        """Returns branch -> commit."""
        return self._refs("branches")

    def pull_requests(self) -> dict[int, str]:
        """Returns number -> commit of the pull requests, oldest first."""
        named = self._refs("pullRequests", "?include_prs=1")
        numbers = {name.removeprefix("refs/pr/"): commit for name, commit in named.items()}
        found = {int(n): commit for n, commit in numbers.items() if n.isascii() and n.isdigit()}
        return {number: found[number] for number in sorted(found)}

    def history(self, revision: str, limit: int = 50) -> tuple[Change, ...]:
        """Returns the latest changes of a revision, newest first."""
        url = f"{self._api}/commits/{quote(revision, safe='')}"
        found = []
        for entry in self._pages(url, f"reading the history of {self._shown}"):
            if not isinstance(entry, dict) or not _COMMIT.fullmatch(str(entry.get("id"))):
                raise bad_answer("its history holds something that is no commit")
            found.append(
                Change(id=entry["id"], title=str(entry.get("title", "")), date=str(entry.get("date", "")))
            )
            if len(found) == limit:
                break
        return tuple(found)

    def content_url(self, commit: str, path: str) -> str:
        """Returns where a file's content is asked for."""
        return f"{self.transport.endpoint.url}/{self.id}/resolve/{commit}/{quote(path)}"

    def create(self, *, private: bool) -> None:
        """Makes the repository; one that is there already stays as it is.

        Raises:
            HubError: it may not be made.
        """
        owner, _, name = self.id.rpartition("/")
        body = {"name": name, "type": "model", "visibility": "private" if private else "public"}
        if owner:
            body["organization"] = owner
        self._post("/api/repos/create", body, f"making {self._shown}", accept=(200, 201, 409))

    def create_branch(self, branch: str, commit: str) -> None:
        """Makes a branch at a commit; one that is there already stays as it is."""
        path = f"{self._api}/branch/{quote(branch, safe='')}"
        self._post(
            path, {"startingPoint": commit}, f"making the branch {escape(branch)}", accept=(200, 201, 409)
        )

    def check_tag(self, tag: str, commit: str) -> bool:
        """Returns whether a tag names a commit already; False if there is no such tag.

        Raises:
            HubError: it names another commit.
        """
        named = self.tags().get(tag)
        if named is not None and named != commit:
            raise HubError.of(
                "tag-exists",
                f"the tag {escape(tag)!r} of {self._shown} names {named} already.",
                remedy="Choose another tag, or delete that one on the server first.",
            )
        return named is not None

    def create_tag(self, tag: str, commit: str) -> None:
        """Makes a tag at a commit; one that names it already stays.

        Raises:
            HubError: it names another commit, or may not be made.
        """
        if not self.check_tag(tag, commit):
            path = f"{self._api}/tag/{quote(commit, safe='')}"
            self._post(path, {"tag": tag}, f"making the tag {escape(tag)}", accept=(200, 201, 409))

    def _post(self, path: str, body: dict[str, Any], what: str, *, accept: tuple[int, ...]) -> Any:
        data = json.dumps(body).encode()
        return self.transport.json("POST", path, what=what, body=data, accept=accept)[0]

    def _refs(self, kind: str, query: str = "") -> dict[str, str]:
        what = f"reading the tags of {self._shown}"
        data, _ = self.transport.json("GET", f"{self._api}/refs{query}", what=what)
        entries = data.get(kind, []) if isinstance(data, dict) else None
        if not isinstance(entries, list):
            raise bad_answer("its list of branches and tags is no list")
        found = {}
        for entry in entries:
            name, commit = (
                (entry.get("name"), entry.get("targetCommit")) if isinstance(entry, dict) else (0, 0)
            )
            if not isinstance(name, str) or not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
                raise bad_answer("its list of branches and tags holds something else")
            found[name] = commit
        return found

    def _pages(self, url: str, what: str) -> Iterator[Any]:
        """Yields the entries of a list that comes in pages; a next page on another host is refused."""
        for _ in range(_MAX_PAGES):
            data, headers = self.transport.json("GET", url, what=what)
            if not isinstance(data, list):
                raise bad_answer("its list is no list")
            yield from data
            following = _NEXT.search(headers.get("link", ""))
            if following is None:
                return
            endpoint = self.transport.endpoint
            url = endpoint.resolve(endpoint.url + "/", following[1])
            if not endpoint.is_own(url):
                raise bad_answer(f"the next page is on another host, {escape(urlsplit(url).netloc)!r}")
        raise bad_answer(f"its list has more than {_MAX_PAGES} pages")


def _file(entry: Any) -> RemoteFile | None:
    """Returns the file that an entry of a tree describes; None for a folder."""
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise bad_answer("its list of files holds something that is no file")
    path = entry["path"]
    reason = path_reason(path)
    if reason or not path.isprintable() or len(path.encode("utf-8", "replace")) > 1000:
        raise bad_answer(f"it lists the path {escape(path)!r}, which {reason or 'no file may have'}")
    if entry.get("type") != "file":
        return None
    size, blob_id, large = entry.get("size"), entry.get("oid"), entry.get("lfs")
    sha256 = None
    if large is not None:
        sha256, size = (large.get("oid"), large.get("size", size)) if isinstance(large, dict) else (0, size)
        sha256 = sha256.removeprefix("sha256:") if isinstance(sha256, str) else ""
        if not _SHA256.fullmatch(sha256):
            raise bad_answer(f"it gives no SHA-256 for the large file {escape(path)!r}")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < _MAX_FILE_BYTES:
        raise bad_answer(f"it gives no size for {escape(path)!r}")
    if not isinstance(blob_id, str) or not _COMMIT.fullmatch(blob_id):
        if sha256 is None:
            raise bad_answer(f"it gives no git digest for {escape(path)!r}")
        blob_id = ""
    return RemoteFile(path=path, size=size, blob_id=blob_id, sha256=sha256)
