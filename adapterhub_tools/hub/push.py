"""Publishes an adapter on a Hub: validated first, one commit, and never twice for the same content."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapterhub_tools.errors import FormatError, HubError, escape
from adapterhub_tools.hub import card
from adapterhub_tools.hub.package import Package, open_package, outgoing_bytes
from adapterhub_tools.hub.patience import TransientError, patiently
from adapterhub_tools.hub.reference import HubReference, check_git_name, is_commit
from adapterhub_tools.hub.repository import DEFAULT_BRANCH, Commit, Repository
from adapterhub_tools.hub.selection import CARD_NAME
from adapterhub_tools.hub.settle import find_commit
from adapterhub_tools.hub.snapshot import HubSnapshot, fetch_small
from adapterhub_tools.hub.trees import RemoteFile
from adapterhub_tools.hub.upload import CommitAnswer, Outgoing, choose_modes, commit, send_large
from adapterhub_tools.model.manifest import MANIFEST_NAME, Manifest
from adapterhub_tools.model.protocols import Progress, SilentProgress
from adapterhub_tools.store.strict_json import parse_json

_UNCERTAIN = (
    "connection-lost",
    "stalled",
    "unreachable",
    "server-error",
    "rate-limited",
    "conflict",
    "bad-answer",
)
"""Kinds of error after which a commit may have happened all the same, or may be tried again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushedFile:
    """A file of a push.

    Attributes:
        path: in the repository or version.
        size: bytes; 0 for one that is deleted.
        sha256: of its content; None for one that is deleted.
        change: ``"add"``, ``"change"``, ``"same"`` or ``"delete"``.
    """

    path: str
    size: int
    sha256: str | None
    change: str

    def to_json(self) -> dict[str, Any]:
        """Returns the record as a JSON object."""
        return {"path": self.path, "size": self.size, "sha256": self.sha256, "change": self.change}


@dataclass(frozen=True, slots=True, kw_only=True)
class PushReport:
    """What a push did, or with ``dry_run`` would do.

    Attributes:
        ref: where to.
        endpoint: the Hub, or the registry.
        commit: the commit, or a registry's ``"sha256:…"``, that holds the adapter now; None in a dry run.
        parent: what was there before; None if nothing was.
        created_commit: False if everything was there already.
        dry_run: True if nothing was sent.
        files: what was sent, and what was there already.
        digest: the adapter digest.
        tag: the tag that names the commit.
        pull_request: where the pull request is.
        left: files that were not sent, each with the reason.
        notes: what else should be known.
    """

    ref: str
    endpoint: str
    commit: str | None
    parent: str | None
    created_commit: bool
    dry_run: bool
    files: tuple[PushedFile, ...]
    digest: str | None = None
    tag: str | None = None
    pull_request: str | None = None
    left: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """One line that proves what was done."""
        changed = [file for file in self.files if file.change != "same"]
        what = f"{len(changed)} of {len(self.files)} files changed, {sum(f.size for f in changed):,} bytes"
        if self.dry_run:
            return f"dry run: {what} would be pushed to {self.ref}; nothing was sent"
        tag = f", tag {self.tag}" if self.tag else ""
        if not self.created_commit:
            return f"unchanged: {self.ref} holds all {len(self.files)} files, {self.commit}{tag}"
        request = f", {self.pull_request}" if self.pull_request else ""
        return f"pushed: {what}, {self.ref}, {self.commit}{tag}{request}"

    def to_json(self) -> dict[str, Any]:
        """Returns the report as a JSON object."""
        data = {name: getattr(self, name) for name in self.__slots__}
        data["files"] = [file.to_json() for file in self.files]
        data["left"] = [list(pair) for pair in self.left]
        data["notes"] = list(self.notes)
        return {**data, "summary": self.summary}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a push goes.

    Attributes:
        repository: the repository.
        reference: as the user gave it.
        branch: the branch.
        private: whether the repository is to be private if it is made.
        create_pr: whether to ask for a pull request instead of changing the branch.
    """

    repository: Repository
    reference: HubReference
    branch: str
    private: bool
    create_pr: bool


def push_to_hub(
    adapter: Path,
    reference: HubReference,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    include: Sequence[str] = (),
    message: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PushReport:
    """Pushes an adapter to a repository of the Hub.

    Args:
        adapter: its folder.
        reference: the repository, and a folder inside it.
        private: whether a new repository is private; an existing public one is refused then.
        revision: the branch; made from the default one if it is not there.
        create_pr: whether to open a pull request instead.
        tag: a tag for the commit.
        include: files to send although they are not on the list of files of an adapter.
        message: the title of the commit.
        dry_run: whether only to say what would change.
        progress: told the bytes sent.

    Raises:
        FormatError: the adapter is not valid, or the reference is not one to push to.
        HubError: it could not be pushed; what the remote holds is what it held, or all of the new.
        StoreError: a file cannot be read or changed meanwhile.
    """
    if reference.revision is not None and revision is not None:
        raise FormatError.of(
            "revision", "the revision is given twice.", loc="--revision", remedy="Give it once."
        )
    branch = reference.revision or check_git_name(revision or DEFAULT_BRANCH, "--revision", "next")
    if is_commit(branch):
        message = f"{branch} is a commit, and commits do not change."
        raise FormatError.of("revision", message, loc="--revision", remedy="Name a branch.")
    if tag is not None and (is_commit(check_git_name(tag, "--tag", "v1.0")) or tag == branch):
        message = f"{escape(tag)} would be taken for a commit or for the branch."
        raise FormatError.of("tag", message, loc="--tag", remedy="Choose a name such as v1.0.")
    if "/" not in reference.id:
        raise FormatError.of("reference", f"{escape(reference.id)} has no owner.", remedy="Write owner/name.")
    with open_package(adapter, include=include, write=not dry_run) as package:
        target = Target(
            repository=Repository.connect(reference.id),
            reference=HubReference(id=reference.id, folder=reference.folder),
            branch=branch,
            private=private,
            create_pr=create_pr,
        )
        before = _find(target, dry_run)
        if private and before is not None and not before.private:
            raise HubError.of(
                "public-repository",
                f"{escape(reference.id)} is public.",
                loc="--private",
                remedy="Choose another name, make that repository private first, or push without --private.",
            )
        tree = () if before is None or not before.id else target.repository.tree(before.id)
        files, deleted = _files(package, target, before, tree)
        report = _report(package, target, before, tree, files, deleted, dry_run)
        if dry_run:
            return report
        changed = [file for file in files if _change(file, tree) != "same"]
        if tag is not None and before is not None:
            # A tag that is taken is refused before anything is sent.
            target.repository.check_tag(tag, "" if changed or deleted else before.id)
        if changed or deleted:
            answer = _send(target, before, changed, deleted, message, progress or SilentProgress())
            report = replace(report, commit=answer.id, created_commit=True, pull_request=answer.pull_request)
    if tag is not None and report.commit is not None:
        target.repository.create_tag(tag, report.commit)
        report = replace(report, tag=tag)
    return report


def _find(target: Target, dry_run: bool) -> Commit | None:
    """Returns what the branch holds; makes the repository and the branch where they are missing.

    In a dry run it returns None for a repository that would be made.
    """
    repository = target.repository
    try:
        found = repository.pin(target.branch)
        if target.branch != DEFAULT_BRANCH:
            _refuse_tag(target)
        return found
    except HubError as error:
        kind = error.problems[0].kind
        if kind not in ("not-found", "no-revision"):
            raise
        if kind == "not-found" and repository.transport.endpoint.token is None:
            raise  # nothing can be made without a token, and the remedy says so
    if kind == "not-found":
        if dry_run:
            return None
        repository.create(private=target.private)
    start = repository.pin()
    if target.branch != DEFAULT_BRANCH and not dry_run and not target.create_pr:
        repository.create_branch(target.branch, start.id)
    return start


def _refuse_tag(target: Target) -> None:
    """Refuses a revision that is a tag, before anything is sent: nothing can be added to one.

    Raises:
        FormatError: it is one.
        HubError: the tags cannot be read.
    """
    branch = target.branch
    if branch in target.repository.tags() and branch not in target.repository.branches():
        raise FormatError.of(
            "revision",
            f"{escape(branch)} is a tag of {escape(target.repository.id)}, and tags do not move.",
            loc="--revision",
            remedy="Name a branch; --tag gives the new commit a tag of its own.",
        )


def _files(
    package: Package, target: Target, before: Commit | None, tree: Sequence[RemoteFile]
) -> tuple[list[Outgoing], list[str]]:
    """Returns every file with its path in the repository, the card included, and what is to be deleted."""
    folder = target.reference.folder
    prefix = f"{folder}/" if folder else ""
    there = {file.path: file for file in tree}
    text = package.card
    remote: str | None = None
    if before is not None and prefix + CARD_NAME in there and (text is None or card.is_unfilled(text)):
        data = _remote(target, before, there[prefix + CARD_NAME])
        remote = data.decode("utf-8", "replace")
    rendered = card.render(package.manifest, target.reference, remote if remote is not None else text)
    made = outgoing_bytes(CARD_NAME, rendered.encode("utf-8"))
    files = [replace(file, path=prefix + file.path) for file in (*package.files, made)]
    new = {file.path for file in files}
    deleted: list[str] = []
    manifest = there.get(prefix + MANIFEST_NAME)
    if before is not None and manifest is not None:
        deleted = [
            prefix + name
            for name in _listed(_remote(target, before, manifest))
            if prefix + name in there and prefix + name not in new
        ]
    return sorted(files, key=lambda file: file.path), sorted(deleted)


def _listed(data: bytes) -> list[str]:
    """Returns the files that the manifest before listed; none if it cannot be read."""
    try:
        return [file.path for file in Manifest.from_json(parse_json(data, file=MANIFEST_NAME)).files]
    except FormatError:
        return []


def _remote(target: Target, before: Commit, file: RemoteFile) -> bytes:
    snapshot = HubSnapshot.of(target.repository, before.id, (file,))
    return fetch_small(snapshot, file)


def _change(file: Outgoing, tree: Iterable[RemoteFile]) -> str:
    for remote in tree:
        if remote.path == file.path:
            return "same" if remote.identity in file.identities else "change"
    return "add"


def _report(
    package: Package,
    target: Target,
    before: Commit | None,
    tree: Sequence[RemoteFile],
    files: Sequence[Outgoing],
    deleted: Sequence[str],
    dry_run: bool,
) -> PushReport:
    rows = [PushedFile(path=f.path, size=f.size, sha256=f.sha256, change=_change(f, tree)) for f in files]
    rows += [PushedFile(path=path, size=0, sha256=None, change="delete") for path in deleted]
    start = before.id if before is not None and before.id else None
    notes = list(package.notes)
    if before is None:
        notes.append("the repository would be made")
    return PushReport(
        ref=str(
            replace(target.reference, revision=None if target.branch == DEFAULT_BRANCH else target.branch)
        ),
        endpoint=target.repository.transport.endpoint.url,
        commit=None if dry_run else start,
        parent=start,
        created_commit=False,
        dry_run=dry_run,
        files=tuple(rows),
        digest=package.manifest.digest,
        left=package.left,
        notes=tuple(notes),
    )


def _send(
    target: Target,
    before: Commit | None,
    files: Sequence[Outgoing],
    deleted: Sequence[str],
    message: str | None,
    progress: Progress,
) -> CommitAnswer:
    """Stores large content and commits; an answer that was lost is looked for before anything is repeated."""
    repository, branch = target.repository, target.branch
    modes = choose_modes(repository, branch, files, create_pr=target.create_pr)
    large = [file for file in files if file.path in modes]
    progress.start("pushing", sum(file.size for file in large))
    send_large(repository, large, branch=branch, create_pr=target.create_pr, advance=progress.advance)
    for file in files:
        file.check_unchanged()
    parent = before.id if before is not None else ""
    title = message or f"Push adapter {target.reference.folder or target.reference.id}"
    wanted = {file.path: file.identities for file in files}
    patience = repository.transport.patience

    def attempt() -> CommitAnswer:
        try:
            return commit(
                repository,
                branch,
                files,
                modes,
                deleted,
                message=title,
                parent=parent,
                create_pr=target.create_pr,
            )
        except HubError as error:
            problem = error.problems[0]
            if problem.kind not in _UNCERTAIN:
                raise
            found = find_commit(
                repository, branch, wanted, deleted, parent=parent, create_pr=target.create_pr
            )
            if found is not None:
                return found
            if problem.kind in ("conflict", "bad-answer"):
                raise
            cause = error.__cause__
            wait = cause.wait_seconds if isinstance(cause, TransientError) else None
            raise TransientError(problem, wait_seconds=wait) from error

    answer = patiently(attempt, patience, patience.deadline())
    progress.finish()
    return answer
