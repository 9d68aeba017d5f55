"""What the server keeps: repositories, refs, commits and tokens in SQLite; content as files named by SHA-256.

A commit is one transaction, and content is renamed into place when complete, so a killed process leaves
either the old state or the new one.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

SCHEMA = """
CREATE TABLE IF NOT EXISTS tokens (token TEXT PRIMARY KEY, user TEXT NOT NULL, role TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS repos (
  name TEXT PRIMARY KEY, owner TEXT NOT NULL, private INTEGER NOT NULL, gated INTEGER NOT NULL,
  created REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS refs (
  repo TEXT NOT NULL, ref TEXT NOT NULL, oid TEXT NOT NULL, message TEXT, PRIMARY KEY (repo, ref)
);
CREATE TABLE IF NOT EXISTS commits (
  repo TEXT NOT NULL, oid TEXT NOT NULL, parent TEXT, title TEXT NOT NULL, message TEXT NOT NULL,
  author TEXT NOT NULL, date REAL NOT NULL, PRIMARY KEY (repo, oid)
);
CREATE TABLE IF NOT EXISTS files (
  repo TEXT NOT NULL, oid TEXT NOT NULL, path TEXT NOT NULL, blob_id TEXT NOT NULL, size INTEGER NOT NULL,
  sha256 TEXT NOT NULL, lfs INTEGER NOT NULL, PRIMARY KEY (repo, oid, path)
);
"""
GITATTRIBUTES = (
    b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.bin filter=lfs diff=lfs merge=lfs -text\n"
)
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz", ".h5", ".onnx", ".msgpack")
COMMIT_ID = re.compile(r"[0-9a-f]{40}")


class ConflictError(Exception):
    """The branch moved: it is not at the parent that the commit names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Who a token belongs to and what it allows."""

    user: str
    role: str  # "write", "read", "foreign" (a write token of another user) or "expired"


@dataclass(frozen=True, slots=True, kw_only=True)
class Repo:
    """One repository."""

    name: str
    owner: str
    private: bool
    gated: bool
    created: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One file of a commit. `blob_id` is git's: of the content, or of the LFS pointer."""

    blob_id: str
    size: int
    sha256: str
    lfs: bool

    @property
    def pointer_size(self) -> int:
        return len(lfs_pointer(self.sha256, self.size))


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """One commit, without its files."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: float


def git_blob_id(content: bytes) -> str:
    """SHA-1 as git names a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    """The text that git keeps instead of LFS content."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def lfs_entry(sha256: str, size: int) -> Entry:
    """The entry of LFS content."""
    return Entry(blob_id=git_blob_id(lfs_pointer(sha256, size)), size=size, sha256=sha256, lfs=True)


class Store:
    """The state of one server."""

    def __init__(self, data: Path) -> None:
        """Opens the folder, making it if need be."""
        self.data = data
        for name in ("blobs", "uploads"):
            (data / name).mkdir(parents=True, exist_ok=True)
        self.db = sqlite3.connect(data / "hub.sqlite", isolation_level=None)
        self.db.execute("PRAGMA synchronous = OFF")  # to survive a killed process needs no flush to the disk
        self.db.executescript(SCHEMA)
        self.lfs_bytes = 10 * 1024 * 1024
        self.page_size = 50
        self.multipart_bytes = 8 * 1024 * 1024
        self.part_bytes = 5 * 1024 * 1024

    # -- tokens ----------------------------------------------------------------------------------------
    def add_token(self, token: str, account: Account) -> None:
        self.db.execute("INSERT OR REPLACE INTO tokens VALUES (?, ?, ?)", (token, account.user, account.role))

    def account(self, token: str) -> Account | None:
        row = self.db.execute("SELECT user, role FROM tokens WHERE token = ?", (token,)).fetchone()
        return None if row is None else Account(user=row[0], role=row[1])

    # -- content ---------------------------------------------------------------------------------------
    def blob_path(self, sha256: str) -> Path:
        return self.data / "blobs" / sha256[:2] / sha256

    def has_blob(self, sha256: str, size: int | None = None) -> bool:
        path = self.blob_path(sha256)
        return path.is_file() and (size is None or path.stat().st_size == size)

    def temporary(self) -> Path:
        return self.data / "uploads" / secrets.token_hex(8)

    def adopt(self, temporary: Path, sha256: str) -> None:
        """Moves complete content to its name."""
        target = self.blob_path(sha256)
        target.parent.mkdir(exist_ok=True)
        temporary.replace(target)

    def put(self, content: bytes) -> str:
        """Stores content; gives its SHA-256."""
        sha256 = hashlib.sha256(content).hexdigest()
        if not self.has_blob(sha256, len(content)):
            temporary = self.temporary()
            temporary.write_bytes(content)
            self.adopt(temporary, sha256)
        return sha256

    def regular_entry(self, content: bytes) -> Entry:
        return Entry(blob_id=git_blob_id(content), size=len(content), sha256=self.put(content), lfs=False)

    def goes_to_lfs(self, path: str, size: int) -> bool:
        return path.endswith(LFS_SUFFIXES) or size > self.lfs_bytes

    # -- repositories ----------------------------------------------------------------------------------
    def repo(self, name: str) -> Repo | None:
        row = self.db.execute("SELECT * FROM repos WHERE name = ?", (name,)).fetchone()
        if row is None:
            return None
        return Repo(name=row[0], owner=row[1], private=bool(row[2]), gated=bool(row[3]), created=row[4])

    def create_repo(self, name: str, *, private: bool, gated: bool = False) -> Repo:
        """Makes a repository with the first commit that the Hub makes: `.gitattributes`."""
        owner = name.split("/")[0]
        self.db.execute("BEGIN IMMEDIATE")
        with self.db:
            self.db.execute(
                "INSERT INTO repos VALUES (?, ?, ?, ?, ?)", (name, owner, private, gated, time.time())
            )
            self._add_commit(
                name, "refs/heads/main", None, {".gitattributes": self.regular_entry(GITATTRIBUTES)},
                title="initial commit", message="", author=owner,
            )  # fmt: skip
        found = self.repo(name)
        assert found is not None
        return found

    def delete_repo(self, name: str) -> None:
        self.db.execute("BEGIN IMMEDIATE")
        with self.db:
            self.db.execute("DELETE FROM repos WHERE name = ?", (name,))
            for table in ("refs", "commits", "files"):
                self.db.execute(f"DELETE FROM {table} WHERE repo = ?", (name,))

    def refs(self, repo: str) -> dict[str, str]:
        return dict(
            self.db.execute("SELECT ref, oid FROM refs WHERE repo = ? ORDER BY ref", (repo,)).fetchall()
        )

    def set_ref(self, repo: str, ref: str, oid: str, message: str = "") -> None:
        self.db.execute("INSERT INTO refs VALUES (?, ?, ?, ?)", (repo, ref, oid, message))

    def delete_ref(self, repo: str, ref: str) -> bool:
        return self.db.execute("DELETE FROM refs WHERE repo = ? AND ref = ?", (repo, ref)).rowcount == 1

    def full_ref(self, repo: str, revision: str) -> str | None:
        """The full name of the ref that a revision names."""
        refs = self.refs(repo)
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in refs), None)

    def resolve(self, repo: str, revision: str) -> str | None:
        """The commit that a revision names: a branch, a tag, `refs/…`, or a commit id."""
        ref = self.full_ref(repo, revision)
        if ref is not None:
            return self.refs(repo)[ref]
        if COMMIT_ID.fullmatch(revision) and self.commit(repo, revision) is not None:
            return revision
        return None

    def commit(self, repo: str, oid: str) -> Commit | None:
        row = self.db.execute(
            "SELECT oid, parent, title, message, author, date FROM commits WHERE repo = ? AND oid = ?",
            (repo, oid),
        ).fetchone()
        if row is None:
            return None
        return Commit(oid=row[0], parent=row[1], title=row[2], message=row[3], author=row[4], date=row[5])

    def history(self, repo: str, oid: str) -> list[Commit]:
        """A commit and those before it, newest first."""
        found: list[Commit] = []
        next_oid: str | None = oid
        while next_oid is not None:
            commit = self.commit(repo, next_oid)
            assert commit is not None, f"{repo}: no commit {next_oid}"
            found.append(commit)
            next_oid = commit.parent
        return found

    def all_commits(self, repo: str) -> list[Commit]:
        rows = self.db.execute("SELECT oid FROM commits WHERE repo = ? ORDER BY date", (repo,)).fetchall()
        return [commit for (oid,) in rows if (commit := self.commit(repo, oid)) is not None]

    def tree(self, repo: str, oid: str) -> dict[str, Entry]:
        """Path -> entry of a commit, in order of path."""
        rows = self.db.execute(
            "SELECT path, blob_id, size, sha256, lfs FROM files WHERE repo = ? AND oid = ? ORDER BY path",
            (repo, oid),
        ).fetchall()
        return {r[0]: Entry(blob_id=r[1], size=r[2], sha256=r[3], lfs=bool(r[4])) for r in rows}

    def add_commit(
        self,
        repo: str,
        ref: str,
        *,
        changes: Mapping[str, Entry],
        deleted: Sequence[str] = (),
        expected_parent: str | None = None,
        start: str | None = None,
        title: str,
        message: str = "",
        author: str,
    ) -> Commit:
        """One commit on top of a ref, in one transaction.

        Args:
            repo: the repository.
            ref: full name of the ref that moves.
            changes: path -> entry that is added or replaced.
            deleted: paths, or folders where they end in "/", that go away.
            expected_parent: the commit that the ref must be at.
            start: where a ref starts that does not exist yet (a pull request).
            title: first line of the message.
            message: the rest.
            author: user name.

        Raises:
            ConflictError: the ref is elsewhere.
        """
        self.db.execute("BEGIN IMMEDIATE")
        with self.db:
            head = self.refs(repo).get(ref, start)
            if expected_parent is not None and head != expected_parent:
                raise ConflictError
            tree = {} if head is None else self.tree(repo, head)
            for gone in deleted:
                tree = {
                    p: e
                    for p, e in tree.items()
                    if p != gone and not (gone.endswith("/") and p.startswith(gone))
                }
            tree.update(changes)
            return self._add_commit(repo, ref, head, tree, title=title, message=message, author=author)

    def _add_commit(
        self,
        repo: str,
        ref: str,
        parent: str | None,
        tree: Mapping[str, Entry],
        *,
        title: str,
        message: str,
        author: str,
    ) -> Commit:
        commit = Commit(oid="", parent=parent, title=title, message=message, author=author, date=time.time())
        identity = repr((repo, commit, sorted(tree.items()), secrets.token_hex(8))).encode()
        commit = replace(commit, oid=hashlib.sha1(identity).hexdigest())
        self.db.execute(
            "INSERT INTO commits VALUES (?, ?, ?, ?, ?, ?, ?)",
            (repo, commit.oid, parent, title, message, author, commit.date),
        )
        self.db.executemany(
            "INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?)",
            [(repo, commit.oid, path, e.blob_id, e.size, e.sha256, e.lfs) for path, e in tree.items()],
        )
        self.db.execute("INSERT OR REPLACE INTO refs VALUES (?, ?, ?, '')", (repo, ref, commit.oid))
        return commit
