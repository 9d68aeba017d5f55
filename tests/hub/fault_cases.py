"""The faults that push and pull are put through, each with five seeds.

The seed chooses the victim among the requests that a clean run makes, and where in its body the fault
strikes. What must happen then is of three kinds:

- `RECOVERS`: the fault passes (it hits once or twice): the command succeeds as if nothing had been.
- `FAILS`: it stays: the command ends with an error that names a remedy, and nothing was changed.
- `EITHER`: both are right, as long as no wrong byte is taken.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.hub.hub_process import HubServer

SEEDS = range(5)
NOWHERE = "http://no-such-host.invalid/x"
RECOVERS, FAILS, EITHER = "recovers", "fails", "either"
HANG_SECONDS = 30  # far beyond the client's patience: who waits for it fails the time limit

# Which requests of a clean run can be the victim: (origin, method, part of the path).
ANY = ("", "", "")
READ = ("", "GET", "")
CONTENT = ("", "GET", r"^/blobs/|/resolve-cache/")
STORAGE = ("cdn", "GET", "")
LISTING = ("hub", "GET", r"/tree/")
INFO = ("hub", "GET", r"^/api/models/[^/]+/[^/]+/revision/")
RESOLVE = ("hub", "GET", r"/resolve/")
CACHED = ("hub", "GET", r"^/api/resolve-cache/")
API = ("hub", "", r"^/api/models/")
UPLOAD = ("cdn", "PUT", "")
COMMIT = ("hub", "POST", r"/commit/")
WRITE = ("", "POST|PUT", "")
REPEATABLE_WRITE = ("", "POST|PUT", r"^(?!.*/commit/)")
BATCH = ("hub", "POST", r"/objects/batch")


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultCase:
    """One fault.

    Attributes:
        name: for the test's id.
        kind: as in server/faults.py.
        victims: which requests of the clean run it may hit.
        times: how often; -1: always.
        expected: what must happen.
        arguments: of the kind.
        then: a second fault, armed for the same victim after the first.
        codes: the exit codes that are right when it fails.
    """

    name: str
    kind: str
    victims: tuple[str, str, str]
    expected: str
    times: int = 1
    arguments: dict[str, Any] = field(default_factory=dict)
    then: str = ""
    codes: tuple[int, ...] = (8, 9)

    def arm(self, server: HubServer, trace: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
        """Arms it for one request of the trace, and returns that request."""
        origin, method, path = self.victims
        methods = method.split("|")
        victims = [
            r
            for r in trace
            if (not origin or r["origin"] == origin)
            and (not method or r["method"] in methods)
            and re.search(path, r["path"])
        ]
        assert victims, f"{self.name}: nothing to hit in {[(r['method'], r['path']) for r in trace]}"
        victim = random.Random(f"{self.name}:{seed}").choice(victims)
        place = {"origin": victim["origin"], "method": victim["method"], "path": pattern(victim["path"])}
        server.arm(self.kind, **place, times=self.times, seed=seed, **self.arguments)
        if self.then:
            server.arm(self.then, **place, times=-1, seed=seed)
        return victim


def pattern(path: str) -> str:
    """A pattern for the same request about another repository or another commit."""
    parts = path.split("/")
    if path.startswith("/api/models/"):
        parts[3:5] = ["%", "%"]
    elif path.startswith("/api/resolve-cache/"):
        parts[4:6] = ["%", "%"]
    elif not path.startswith(("/api/", "/blobs/", "/upload/")):
        parts[1:3] = ["%", "%.git" if parts[2].endswith(".git") else "%"]
    text = re.escape("/".join(parts)).replace("%", "[^/?]+")
    return "^" + re.sub(r"(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])", "[0-9a-f]{40}", text) + r"(\?|$)"


def case(title: str, kind: str, victims: tuple[str, str, str], expected: str, /, **more: Any) -> FaultCase:
    """One fault; what is not an attribute is an argument of its kind."""
    own = {key: more.pop(key) for key in ("times", "then", "codes") if key in more}
    return FaultCase(name=title, kind=kind, victims=victims, expected=expected, arguments=more, **own)


# What the server sends is not what the commit or the manifest names: that is an integrity error.
CONTENT_CODES = (7, 8, 9)
# A listing that lies may also describe something that is no adapter.
LISTING_CODES = (3, 4, 7, 8, 9)

PULL_CASES = (
    # It passes.
    case("429 once", "status", READ, RECOVERS, status=429, retry_after=0),
    case("429 and wait", "status", API, RECOVERS, status=429, retry_after=1),
    case("5xx burst", "status", READ, RECOVERS, times=2, status=503),
    case("500 once", "status", READ, RECOVERS, status=500),
    case("header stall once", "header_stall", READ, RECOVERS, seconds=HANG_SECONDS),
    case("body stall once", "body_stall", CONTENT, RECOVERS, seconds=HANG_SECONDS),
    case("closed before headers", "fin", READ, RECOVERS, headers=False),
    case("reset before headers", "rst", READ, RECOVERS, headers=False),
    case("FIN mid-body", "fin", CONTENT, RECOVERS),
    case("FIN mid-body twice", "fin", STORAGE, RECOVERS, times=2),
    case("RST mid-body", "rst", CONTENT, RECOVERS),
    case("RST mid-body twice", "rst", STORAGE, RECOVERS, times=2),
    case("FIN mid-listing", "fin", LISTING, RECOVERS),
    case("wrong Content-Length once", "wrong_length", CONTENT, RECOVERS),
    case("Range ignored on resume", "fin", STORAGE, RECOVERS, then="range_ignored"),
    # It stays.
    case("429 for long", "status", READ, FAILS, times=-1, status=429, retry_after=3600),
    case("5xx for ever", "status", READ, FAILS, times=-1, status=502),
    case("header stall for ever", "header_stall", READ, FAILS, times=-1, seconds=HANG_SECONDS),
    case("reset for ever", "rst", READ, FAILS, times=-1, headers=False),
    case("closed for ever", "fin", READ, FAILS, times=-1, headers=False),
    case("401", "status", API, FAILS, times=-1, status=401),
    case("401 invalid token", "status", API, FAILS, times=-1, status=401, code=False),
    case("403", "status", RESOLVE, FAILS, times=-1, status=403),
    case("404 repository", "status", API, FAILS, times=-1, status=404),
    case("404 revision", "status", INFO, FAILS, times=-1, status=404, error_code="RevisionNotFound"),
    case("404 entry", "status", RESOLVE, FAILS, times=-1, status=404, error_code="EntryNotFound"),
    case("409", "status", API, FAILS, times=-1, status=409),
    case("412", "status", API, FAILS, times=-1, status=412),
    case("redirect loop", "redirect_loop", READ, FAILS, times=-1),
    case("API redirect to another host", "redirect", API, FAILS, times=-1),
    case("content redirect to nowhere", "redirect", RESOLVE, FAILS, times=-1, location=NOWHERE),
    case("sign-in page", "body", API, FAILS, times=-1, text="<html>sign in</html>"),
    case("flip for ever", "flip", CONTENT, FAILS, times=-1, codes=CONTENT_CODES),
    case("truncated for ever", "truncate", CONTENT, FAILS, times=-1, codes=CONTENT_CODES),
    case("too long for ever", "extend", CONTENT, FAILS, times=-1, codes=CONTENT_CODES),
    case("ETag changes mid-file", "etag_change", STORAGE, FAILS, times=-1, codes=CONTENT_CODES),
    case("listing without config", "listing", LISTING, FAILS,
         times=-1, edit="missing", name="adapter_config", codes=LISTING_CODES),
    case("listing without weights", "listing", LISTING, FAILS,
         times=-1, edit="missing", name="safetensors", codes=LISTING_CODES),
    case("listing with wrong digest", "listing", LISTING, FAILS,
         times=-1, edit="wrong_digest", name="safetensors", codes=CONTENT_CODES),
    case("listing with wrong size", "listing", LISTING, FAILS,
         times=-1, edit="wrong_size", name="safetensors", codes=CONTENT_CODES),
    case("listing leaves the folder", "listing", LISTING, FAILS, edit="hostile", name="../../evil.json"),
    case("listing with an absolute path", "listing", LISTING, FAILS, edit="hostile", name="/etc/evil.json"),
    case("X-Repo-Commit of another commit", "headers", CACHED, FAILS,
         times=-1, set={"X-Repo-Commit": "ab" * 20}),
    # Either, but never a wrong byte.
    case("X-Repo-Commit of another commit, redirected", "headers", RESOLVE, EITHER,
         times=-1, set={"X-Repo-Commit": "ab" * 20}),
    case("flip once", "flip", CONTENT, EITHER, codes=CONTENT_CODES),
    case("truncated once", "truncate", CONTENT, EITHER, codes=CONTENT_CODES),
    case("too long once", "extend", CONTENT, EITHER, codes=CONTENT_CODES),
    case("ETag changes and changes back", "etag_change", STORAGE, EITHER, times=2, codes=CONTENT_CODES),
    case("stale ETag", "stale_etag", RESOLVE, EITHER, codes=CONTENT_CODES),
    case("content redirect to another host", "redirect", RESOLVE, EITHER),
    case("storage redirect to another host", "redirect", STORAGE, EITHER),
    case("flip in an answer of the API", "flip", API, EITHER, codes=LISTING_CODES),
    case("listing with a missing file", "listing", LISTING, EITHER, edit="extra", codes=LISTING_CODES),
    case("listing with a hook", "listing", LISTING, EITHER, edit="hostile", name=".git/hooks/post-checkout"),
)  # fmt: skip

PUSH_CASES = (
    # It passes.
    case("429 once", "status", REPEATABLE_WRITE, RECOVERS, status=429, retry_after=0),
    case("429 at the commit", "status", COMMIT, RECOVERS, status=429, retry_after=0),
    case("5xx burst", "status", READ, RECOVERS, times=2, status=503),
    case("5xx burst at the upload", "status", UPLOAD, RECOVERS, times=2, status=500),
    case("503 at the commit", "status", COMMIT, RECOVERS, status=503),
    case("header stall once", "header_stall", ANY, RECOVERS, seconds=HANG_SECONDS),
    case("closed before headers", "fin", ANY, RECOVERS, headers=False),
    case("reset before headers", "rst", ANY, RECOVERS, headers=False),
    case("FIN mid-answer", "fin", API, RECOVERS),
    case("RST mid-answer", "rst", API, RECOVERS),
    case("reset mid-upload", "upload_rst", UPLOAD, RECOVERS),
    case("reset mid-upload twice", "upload_rst", UPLOAD, RECOVERS, times=2),
    case("reset mid-commit", "upload_rst", COMMIT, RECOVERS),
    case("answer to the commit lost (FIN)", "lost_answer", COMMIT, RECOVERS, how="fin"),
    case("answer to the commit lost (RST)", "lost_answer", COMMIT, RECOVERS, how="rst"),
    case("answer to a write lost", "lost_answer", WRITE, RECOVERS, how="rst"),
    # It stays.
    case("429 for long", "status", ANY, FAILS, times=-1, status=429, retry_after=3600),
    case("5xx for ever", "status", ANY, FAILS, times=-1, status=504),
    case("header stall for ever", "header_stall", ANY, FAILS, times=-1, seconds=HANG_SECONDS),
    case("reset for ever", "rst", UPLOAD, FAILS, times=-1, headers=False),
    case("reset mid-upload for ever", "upload_rst", UPLOAD, FAILS, times=-1),
    case("401", "status", API, FAILS, times=-1, status=401),
    case("403", "status", COMMIT, FAILS, times=-1, status=403, code=False),
    case("404", "status", API, FAILS, times=-1, status=404),
    case("409 at the commit", "status", COMMIT, FAILS, times=-1, status=409),
    case("412 at the commit", "status", COMMIT, FAILS, times=-1, status=412),
    case("someone else commits first", "advance", COMMIT, FAILS),
    case("redirect loop", "redirect_loop", ANY, FAILS, times=-1),
    case("API redirect to another host", "redirect", API, FAILS, times=-1, status=307),
    case("upload redirect to nowhere", "redirect", UPLOAD, FAILS, times=-1, status=307, location=NOWHERE),
    case("sign-in page", "body", API, FAILS, times=-1, text="<html>sign in</html>"),
    # Either, but the remote is old or new.
    case("flip in an answer", "flip", API, EITHER, codes=LISTING_CODES),
    case("truncated answer", "truncate", API, EITHER, codes=LISTING_CODES),
    case("truncated upload instructions", "truncate", BATCH, EITHER, codes=LISTING_CODES),
)  # fmt: skip

# Into a repository that is not there yet, with a tag.
CREATE = ("hub", "POST", "/repos/create")
TAG = ("hub", "POST", "/tag/")
CREATE_CASES = (
    case("answer to a write lost", "lost_answer", WRITE, RECOVERS, how="rst"),
    case("answer to the creation lost", "lost_answer", CREATE, RECOVERS, how="fin"),
    case("answer to the tag lost", "lost_answer", TAG, RECOVERS, how="fin"),
    case("5xx burst", "status", CREATE, RECOVERS, times=2, status=503),
    case("reset before headers", "rst", ANY, RECOVERS, headers=False),
    case("403 at the creation", "status", CREATE, FAILS, times=-1, status=403, code=False),
    case("reset mid-upload for ever", "upload_rst", UPLOAD, FAILS, times=-1),
)
