"""Finds out whether a commit happened whose answer was lost or strange, by what the remote holds now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from adapterhub_tools.errors import HubError, Problem
from adapterhub_tools.hub.repository import Repository
from adapterhub_tools.hub.trees import holds
from adapterhub_tools.hub.upload import CommitAnswer

_NEWEST = 3


def find_commit(
    repository: Repository,
    branch: str,
    wanted: Mapping[str, Iterable[str]],
    deleted: Sequence[str],
    *,
    parent: str,
    create_pr: bool,
) -> CommitAnswer | None:
    """Returns the commit that holds what was meant, or None if the branch is where it was.

    Args:
        repository: the repository.
        branch: the branch, or what a pull request was to change.
        wanted: path -> the identities that its content may have.
        deleted: paths that must be gone.
        parent: the commit that the branch was at.
        create_pr: whether a pull request was meant; the newest ones are looked at.

    Raises:
        HubError: the branch moved, and does not hold what was meant; or it cannot be looked at.
    """
    if create_pr:
        for number, commit in list(repository.pull_requests().items())[-_NEWEST:]:
            if holds(repository.tree(commit), wanted, deleted):
                return CommitAnswer(id=commit, pull_request=f"refs/pr/{number}")
        return None
    head = repository.pin(branch).id
    if head == parent:
        return None
    if head and holds(repository.tree(head), wanted, deleted):
        return CommitAnswer(id=head, pull_request=None)
    raise HubError(
        Problem(
            kind="conflict",
            message=f"the branch is at {head} now, no longer at {parent or 'nothing'}: someone else pushed.",
            remedy="Pull, look at what changed, and push again.",
        )
    )
