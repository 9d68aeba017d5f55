"""How an adapter suits a server: what it has, what the server does with it, and what was done about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adapterhub_tools.errors import EXIT_OK, EXIT_PROBLEMS, Problem

ACCEPTED, UNKNOWN, REWRITTEN, REFUSED = "accepted", "unknown", "rewritten", "refused"
"""Verdicts, from the best to the worst."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFinding:
    """One feature of the adapter.

    Attributes:
        feature: its name in the table of servers.
        found: what the adapter has.
        verdict: ``"accepted"``; ``"unknown"`` where the server's class of the model decides; ``"rewritten"``
            if another form of the same adapter is accepted; ``"refused"``.
        says: what the server does, and what is done about it.
        source: where that stands.
        remedy: what to do, for what is refused.
    """

    feature: str
    found: str
    verdict: str
    says: str
    source: str
    remedy: str = ""

    def to_json(self) -> dict[str, str]:
        """Returns the finding as a JSON object."""
        return {name: getattr(self, name) for name in self.__slots__}

    def as_problem(self, file: str) -> Problem:
        """Returns a refusal as a problem."""
        return Problem(
            kind=self.feature,
            file=file,
            message=f"{self.found}: {self.says} ({self.source}).",
            remedy=self.remedy,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RewrittenModule:
    """A module whose tensors were written anew.

    Attributes:
        path: the module.
        rank_before: its rank; None where it was made of several, or is a part of one.
        rank: its rank now.
        exact: whether the delta is the same number for number.
        error: the relative Frobenius error of the delta; 0 where it is exact.
        how: what was done.
    """

    path: str
    rank_before: int | None
    rank: int
    exact: bool
    error: float
    how: str

    def to_json(self) -> dict[str, Any]:
        """Returns the record as a JSON object."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerReport:
    """What fitting an adapter to a server found and did.

    Attributes:
        path: the adapter.
        server: the server.
        checked: the versions that the table was checked against.
        findings: its features.
        out: the folder; None where nothing was written.
        dry_run: True if it was computed, and nothing was written.
        modules: what was written anew.
        left_out: tensors that are not in the output, each with the reason.
        nbytes: bytes of the weight file; 0 where nothing was written.
        digest: the adapter digest of the output; None where nothing was written.
        config: the config of the output; empty where nothing was written.
        notes: what else is to be known.
    """

    path: str
    server: str
    checked: str
    findings: tuple[ServerFinding, ...]
    out: str | None = None
    dry_run: bool = False
    modules: tuple[RewrittenModule, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
    nbytes: int = 0
    digest: str | None = None
    config: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """The worst verdict of all features."""
        order = (ACCEPTED, UNKNOWN, REWRITTEN, REFUSED)
        return max((finding.verdict for finding in self.findings), key=order.index, default=ACCEPTED)

    @property
    def exit_code(self) -> int:
        """0 if the server takes the adapter as it is, as far as can be known; 1 if not."""
        return EXIT_OK if self.verdict in (ACCEPTED, UNKNOWN) else EXIT_PROBLEMS

    @property
    def summary(self) -> str:
        """One line that proves what was found or done."""
        if self.out is None and not self.dry_run:
            words = {
                ACCEPTED: "fits as it is",
                UNKNOWN: "fits as it is, where the model's class agrees",
                REWRITTEN: "does not fit as it is, but can be rewritten",
                REFUSED: "cannot be made to fit",
            }
            return f"{words[self.verdict]}: {self.path} for {self.server}"
        exact = sum(module.exact for module in self.modules)
        worst = max((module.error for module in self.modules), default=0.0)
        what = f"{len(self.modules)} modules rewritten, {exact} of them exactly, error at most {worst:.3g}"
        if self.dry_run:
            return f"dry run: {what}; nothing was written"
        return f"fit for {self.server}: {what}, {self.nbytes:,} bytes, {self.digest}, {self.out}"

    def to_json(self) -> dict[str, Any]:
        """Returns the report as a JSON object."""
        return {
            "path": self.path,
            "server": self.server,
            "checked": self.checked,
            "verdict": self.verdict,
            "findings": [finding.to_json() for finding in self.findings],
            "out": self.out,
            "dry_run": self.dry_run,
            "modules": [module.to_json() for module in self.modules],
            "left_out": [{"name": name, "reason": reason} for name, reason in self.left_out],
            "bytes": self.nbytes,
            "digest": self.digest,
            "config": self.config,
            "notes": list(self.notes),
        }
