"""HTTP to one endpoint: limits on tries and time, redirects by hand, and the token shown to no one else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from adapterhub_tools.errors import HubError, Problem, escape
from adapterhub_tools.hub import library
from adapterhub_tools.hub.endpoint import Endpoint, without_secrets
from adapterhub_tools.hub.patience import Deadline, Patience, TransientError, patiently

MAX_JSON_BYTES = 64 << 20
_MAX_ERROR_BYTES = 64 << 10
_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_AGAIN = "Try again later."
_LOGIN_AGAIN = "The token may be wrong or expired: log in again with `hf auth login`, or set HF_TOKEN."
_SHORT_STALL_SECONDS = 5.0

_unanswered: set[str] = set()
"""Endpoints that gave no answer to a request with all its tries: the next one, perhaps for the next of a
thousand adapters, is tried once, until there is an answer again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer whose body is still to be read.

    Attributes:
        status: the HTTP status.
        headers: its headers, names in lower case.
        url: who answered, after redirects.
        pieces: the body as it comes; raises TransientError if it breaks off.
    """

    status: int
    headers: Mapping[str, str]
    url: str
    pieces: Iterator[bytes]

    def read(self, limit: int) -> bytes:
        """Returns the body.

        Raises:
            HubError: it is longer than ``limit`` bytes.
            TransientError: it broke off.
        """
        parts, total = [], 0
        for piece in self.pieces:
            total += len(piece)
            if total > limit:
                raise bad_answer(f"its answer is longer than {limit:,} bytes", self.url)
            parts.append(piece)
        return b"".join(parts)


class Transport:
    """Requests to one endpoint.

    Attributes:
        endpoint: whom they go to.
        patience: how long to try.
        requests: how many were sent, redirects counted.
    """

    def __init__(self, endpoint: Endpoint, patience: Patience) -> None:
        self.endpoint = endpoint
        self.patience: Patience = patience
        self._usual = patience
        if endpoint.url in _unanswered:
            stall = min(patience.stall_seconds, _SHORT_STALL_SECONDS)
            self.patience = replace(patience, tries=1, stall_seconds=stall)
        self.requests: int = 0

    def json(
        self,
        method: str,
        path: str,
        *,
        what: str,
        body: bytes | None = None,
        media: str = "application/json",
        content: str | None = None,
        repeatable: bool = True,
        accept: tuple[int, ...] = (200, 201),
        signed: bool = False,
    ) -> tuple[Any, Mapping[str, str]]:
        """Sends a request and returns the parsed answer and its headers.

        Args:
            method: ``"GET"``, ``"POST"`` or ``"DELETE"``.
            path: below the endpoint, or a whole URL of the endpoint.
            what: what is being done, for messages.
            body: what to send.
            media: the type of the answer.
            content: the type of the body, if it is another.
            repeatable: whether it may be sent again if no answer came.
            accept: the statuses that are no error.
            signed: the URL itself is the permission, so that no token is sent.

        Raises:
            HubError: it failed, or the answer is no JSON.
        """
        deadline = self.patience.deadline()
        url = path if "://" in path else self.endpoint.url + path
        headers = {"accept": media}
        if body is not None:
            headers["content-type"] = content or media

        def attempt() -> tuple[Any, Mapping[str, str]]:
            with self.open(
                method, url, what=what, headers=headers, body=body, deadline=deadline, signed=signed
            ) as answer:
                if answer.status not in accept:
                    raise self.refusal(answer, what)
                data = answer.read(MAX_JSON_BYTES)
            try:
                return (json.loads(data) if data.strip() else None), answer.headers
            except (ValueError, RecursionError) as error:
                raise bad_answer("its answer is not JSON", url) from error

        try:
            found = patiently(attempt, self.patience, deadline, repeatable=repeatable)
        except HubError as error:
            if error.problems[0].kind in ("unreachable", "stalled"):
                _unanswered.add(self.endpoint.url)
            raise
        _unanswered.discard(self.endpoint.url)
        self.patience = self._usual
        return found

    @contextmanager
    def open(
        self,
        method: str,
        url: str,
        *,
        what: str,
        deadline: Deadline,
        headers: Mapping[str, str] | None = None,
        body: bytes | BinaryIO | Iterator[bytes] | None = None,
        other_hosts: bool = False,
        signed: bool = False,
        raw: bool = False,
    ) -> Iterator[Answer]:
        """Sends one request, without trying again, and yields its answer, redirects followed.

        Args:
            method: the HTTP method.
            url: the whole URL.
            what: what is being done, for messages.
            deadline: when to give up.
            headers: more headers.
            body: what to send.
            other_hosts: whether a redirect may lead to another host (content does; the API does not).
            signed: the URL itself is the permission, so that no token is sent even to the endpoint.
            raw: the bytes as sent; a compressed body is refused.

        Raises:
            HubError: it may not be sent, is not answered in time, or is redirected too often.
            TransientError: no answer came; another try may help.
        """
        asked = self.endpoint.check_url(url)
        sent = {"accept-encoding": "identity", "user-agent": "adaptertool", **(headers or {})}
        for _ in range(_MAX_REDIRECTS + 1):
            deadline.check(what)
            token = {} if signed else self.endpoint.headers_for(asked)
            with self._send(method, asked, {**sent, **token}, body, what, deadline, raw) as answer:
                location = answer.headers.get("location")
                if answer.status not in _REDIRECTS or location is None:
                    yield answer
                    return
                target = self.endpoint.resolve(asked, location)
            if not other_hosts and not self.endpoint.is_own(target):
                raise self._redirect(f"{what} was redirected to another host", target)
            if method not in ("GET", "HEAD") and (answer.status not in (307, 308) or not _rewindable(body)):
                raise self._redirect(f"{what} was redirected", target)
            asked = target
        raise self._redirect(f"{what} was redirected more than {_MAX_REDIRECTS} times", asked)

    def refusal(self, answer: Answer, what: str) -> HubError | TransientError:
        """Returns the error for an answer that is not the one hoped for; reads its text."""
        try:
            text = _text_of(answer)
        except (TransientError, HubError):
            text = ""
        status, code = answer.status, answer.headers.get("x-error-code", "")
        said = f"{what}: {self.endpoint.shown} answered {status}" + (f" ({text})." if text else ".")
        if status in _BUSY:
            wait = _retry_after(answer.headers)
            kind = "rate-limited" if status == 429 else "server-error"
            asks = "" if wait is None else f" It asks to wait {wait:.0f} s."
            problem = Problem(kind=kind, message=said + asks, remedy=_AGAIN)
            return TransientError(problem, wait_seconds=wait)
        kind, remedy = self._kind(status, code)
        return HubError(Problem(kind=kind, message=said, remedy=remedy))

    def _kind(self, status: int, code: str) -> tuple[str, str]:
        known = {
            "GatedRepo": ("gated", "Ask for access on the repository's page, then try again."),
            "RevisionNotFound": ("no-revision", "Check the branch, tag or commit."),
            "EntryNotFound": ("no-file", "Check the path inside the repository."),
        }
        if code in known:
            return known[code]
        missing = "Check the repository's name; if it is private, log in with a token that may read it."
        if self.endpoint.token is None:
            missing += f" {self.endpoint.missing_token}"
        if status == 404 or code == "RepoNotFound":
            return "not-found", missing
        return {
            400: ("bad-request", "The server does not accept it; update adaptertool, or check the endpoint."),
            401: (
                "unauthorized",
                missing if self.endpoint.token is None else f"{_LOGIN_AGAIN} {missing}",
            ),
            403: ("forbidden", "Use a token that has write access to this repository."),
            409: ("conflict", "Pull, look at what changed, and push again."),
            412: ("conflict", "Someone else changed the repository; pull, then push again."),
            416: ("bad-range", "The server has other bytes than it listed; try again."),
        }.get(status, ("bad-answer", "Check HF_ENDPOINT; the server does not behave like a Hub."))

    @contextmanager
    def _send(
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        body: bytes | BinaryIO | Iterator[bytes] | None,
        what: str,
        deadline: Deadline,
        raw: bool,
    ) -> Iterator[Answer]:
        stall = max(0.05, min(self.patience.stall_seconds, deadline.left_seconds))
        failures, offline = library.transport_errors(), library.offline_error()
        self.requests += 1
        try:
            with library.session().stream(
                method,
                url,
                headers=headers,
                content=body,
                timeout=(stall, stall, stall, stall),
                follow_redirects=False,
            ) as response:
                plain = {name.lower(): value for name, value in response.headers.items()}
                if raw and plain.get("content-encoding", "identity") != "identity":
                    raise bad_answer("it compressed what was asked for as it is", url)
                pieces = response.iter_raw(1 << 20) if raw else response.iter_bytes(1 << 16)
                watched = _watch(
                    pieces, deadline, what, lambda error: self._broken(error, what, url), failures
                )
                yield Answer(status=response.status_code, headers=plain, url=url, pieces=watched)
        except offline as error:
            raise HubError.of(
                "offline",
                f"{what} needs the network, but HF_HUB_OFFLINE is set.",
                remedy="Unset it, or give a local path.",
            ) from error
        except failures as error:
            raise self._broken(error, what, url) from error

    def _broken(self, error: Exception, what: str, url: str) -> TransientError:
        """Returns the error for a request that got no answer, or not all of one."""
        name, proxy = type(error).__name__, escape(library.proxy_for(url))
        host = escape(urlsplit(url).netloc) + f" through the proxy {proxy}" * bool(proxy)
        if "Timeout" in name:
            problem = ("stalled", f"{what}: {host} sent nothing for {self.patience.stall_seconds:g} s.")
        elif name in ("ConnectError", "ProxyError"):
            problem = ("unreachable", f"{what}: {host} cannot be reached ({escape(error)}).")
        else:
            problem = ("connection-lost", f"{what}: the connection to {host} was lost ({name}).")
        remedy = "Check the network and HF_ENDPOINT, then try again."
        if proxy:
            remedy = "Check HTTP_PROXY, HTTPS_PROXY and NO_PROXY, then try again."
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            remedy = "If your network has an authority of its own, set SSL_CERT_FILE to its certificates."
        return TransientError(Problem(kind=problem[0], message=problem[1], remedy=remedy))

    def _redirect(self, message: str, target: str) -> HubError:
        return HubError.of(
            "redirect",
            f"{message}: {escape(without_secrets(target))}.",
            remedy="Check the reference and HF_ENDPOINT; the repository may have been renamed.",
        )


def bad_answer(reason: str, url: str = "") -> HubError:
    """Returns the error for an answer that cannot be used: the server is broken or hostile."""
    where = f" ({escape(without_secrets(url))})" if url else ""
    return HubError.of(
        "bad-answer",
        f"the server cannot be trusted: {reason}{where}.",
        remedy="Try again; if it stays so, check HF_ENDPOINT and report it to who runs the server.",
    )


def _watch(
    pieces: Iterator[bytes],
    deadline: Deadline,
    what: str,
    broken: Callable[[Exception], TransientError],
    failures: tuple[type[Exception], ...],
) -> Iterator[bytes]:
    while True:
        deadline.check(what)
        try:
            piece = next(pieces, None)
        except failures as error:
            raise broken(error) from error
        if piece is None:
            return
        yield piece


def _text_of(answer: Answer) -> str:
    """Returns what the server says is wrong, cut and escaped."""
    said: Any = answer.headers.get("x-error-message", "")
    if not said:
        try:
            data = json.loads(answer.read(_MAX_ERROR_BYTES))
            said = data.get("error", "") if isinstance(data, dict) else ""
        except (ValueError, RecursionError):
            said = ""
    return escape(said.strip().rstrip(".")) if isinstance(said, str) else ""


def _retry_after(headers: Mapping[str, str]) -> float | None:
    text = headers.get("retry-after", "").strip()
    return float(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _rewindable(body: bytes | BinaryIO | Iterator[bytes] | None) -> bool:
    return body is None or isinstance(body, bytes)
