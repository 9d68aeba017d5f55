"""Each fault of the Hub server seen from a bare socket: it does to the wire what its name says."""

from __future__ import annotations

import json
import random
import socket
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.hub.hub_process import HubServer
from tests.hub.server.faults import Play
from tests.hub.server.store import GITATTRIBUTES

BODY = random.Random(5).randbytes(40_000)
PATIENCE_SECONDS = 20.0
SHORT_SECONDS = 0.4  # where silence is what is waited for


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What came back over a connection of its own."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    end: str  # "fin", "rst", or "silence" where the patience ended first

    @property
    def length(self) -> int:
        return int(self.headers["content-length"])


def ask(
    url: str,
    method: str = "GET",
    *,
    body: bytes = b"",
    token: str | None = None,
    headers: Mapping[str, str] | None = None,
    patience: float = PATIENCE_SECONDS,
) -> Heard:
    """Sends one request over a bare socket and listens until the other side ends, or the patience does."""
    parts = urlsplit(url)
    assert parts.port is not None
    target = parts.path + (f"?{parts.query}" if parts.query else "")
    fields = {"Host": parts.netloc, "Content-Length": str(len(body)), **(headers or {})}
    if token is not None:
        fields["Authorization"] = f"Bearer {token}"
    lines = [f"{method} {target} HTTP/1.1", *(f"{k}: {v}" for k, v in fields.items()), "Connection: close"]
    received, end = b"", "fin"
    with socket.create_connection(("127.0.0.1", parts.port), timeout=patience) as connection:
        try:
            connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
            while piece := connection.recv(1 << 16):
                received += piece
        except TimeoutError:
            end = "silence"
        except (ConnectionResetError, BrokenPipeError):
            end = "rst"
    head, _, content = received.partition(b"\r\n\r\n")
    first, *rest = head.decode("latin-1").split("\r\n")
    found = dict(line.split(": ", 1) for line in rest)
    status = int(first.split()[1]) if first else 0
    return Heard(status=status, headers={k.lower(): v for k, v in found.items()}, body=content, end=end)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A repository with one LFS file and one regular file."""

    server: HubServer
    repo: str
    head: str

    @property
    def regular(self) -> str:
        return f"{self.server.endpoint}/api/resolve-cache/models/{self.repo}/{self.head}/notes.txt"

    @property
    def lfs(self) -> str:
        return f"{self.server.endpoint}/{self.repo}/resolve/main/w.safetensors"

    @property
    def tree(self) -> str:
        return f"{self.server.endpoint}/api/models/{self.repo}/tree/main?recursive=True"

    @property
    def info(self) -> str:
        return f"{self.server.endpoint}/api/models/{self.repo}"


@pytest.fixture
def scene(hub_server: HubServer) -> Scene:
    repo = hub_server.repo_name()
    head = hub_server.seed(repo, {"w.safetensors": BODY[:9000], "notes.txt": BODY})
    return Scene(server=hub_server, repo=repo, head=head)


def test_without_a_fault_everything_is_as_stored(scene: Scene) -> None:
    heard = ask(scene.regular)
    assert (heard.status, heard.body, heard.length, heard.end) == (200, BODY, len(BODY), "fin")
    part = ask(scene.regular, headers={"Range": "bytes=10-19"})
    assert (part.status, part.body) == (206, BODY[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(BODY)}"
    assert ask(scene.regular, headers={"Range": f"bytes={len(BODY)}-"}).status == 416
    assert ask(scene.regular, "HEAD").body == b""
    redirect = ask(scene.lfs, "HEAD")
    assert redirect.status == 302
    assert redirect.headers["x-repo-commit"] == scene.head
    assert redirect.headers["x-linked-size"] == "9000"
    location = redirect.headers["location"]
    assert location.startswith(scene.server.cdn)
    assert ask(location).body == BODY[:9000]
    assert ask(location, token="x").status == 400  # like S3: not both a signature and a token
    assert ask(location.partition("?")[0]).status == 403
    assert [r["fault"] for r in scene.server.requests()] == [None] * 8
    assert scene.server.tokens_seen("cdn") == {"Bearer x"}


def test_a_fault_hits_what_it_matches_and_no_more(scene: Scene) -> None:
    scene.server.arm("status", status=503, path=r"notes\.txt$", method="GET", skip=1, times=2)
    urls = [scene.regular] * 2 + [scene.tree] + [scene.regular] * 2
    assert [ask(url).status for url in urls] == [200, 503, 200, 503, 200]
    assert [fault["kind"] for fault in scene.server.fired()] == ["status", "status"]
    scene.server.arm("status", status=503, times=-1)
    assert ask(scene.tree).status == 503
    scene.server.disarm()
    assert ask(scene.tree).status == 200


@pytest.mark.parametrize("status", [401, 403, 404, 409, 412, 429, 500, 502, 503, 504])
def test_status(scene: Scene, status: int) -> None:
    scene.server.arm("status", status=status, **({"retry_after": 3} if status == 429 else {}))
    heard = ask(scene.info)
    assert (heard.status, heard.end) == (status, "fin")
    assert heard.headers.get("retry-after") == ("3" if status == 429 else None)
    assert heard.headers.get("x-error-code") == {
        401: "RepoNotFound",
        403: "GatedRepo",
        404: "RepoNotFound",
    }.get(status)
    assert "error" in json.loads(heard.body)


@pytest.mark.parametrize("end", ["fin", "rst"])
def test_cut_answers(scene: Scene, end: str) -> None:
    scene.server.arm(end, fraction=0.25)
    scene.server.arm(end, headers=False)
    heard = ask(scene.regular)
    assert (heard.status, heard.length, heard.body, heard.end) == (200, len(BODY), BODY[:10_000], end)
    nothing = ask(scene.regular)
    assert (nothing.status, nothing.end) == (0, end)


def test_seeds_choose_the_place(scene: Scene) -> None:
    for seed in range(4):
        scene.server.arm("fin", seed=seed)
    lengths = {len(ask(scene.regular).body) for _ in range(4)}
    assert len(lengths) == 4
    assert all(0 < length < len(BODY) for length in lengths)


def test_a_reset_upload_leaves_nothing(scene: Scene) -> None:
    token = scene.server.tokens["write"]
    header = json.dumps({"key": "header", "value": {"summary": "m", "description": ""}})
    file = json.dumps(
        {"key": "file", "value": {"path": "x", "content": "eHh4" * 100_000, "encoding": "base64"}}
    )
    scene.server.arm("upload_rst", method="POST", fraction=0.3)
    url = f"{scene.info}/commit/main"
    heard = ask(url, "POST", body=f"{header}\n{file}\n".encode(), token=token)
    assert (heard.status, heard.end) == (0, "rst")
    assert scene.server.head(scene.repo) == scene.head
    assert ask(url, "POST", body=f"{header}\n{file}\n".encode(), token=token).status == 200


def test_stalls(scene: Scene) -> None:
    scene.server.arm("header_stall", seconds=30)
    scene.server.arm("body_stall", seconds=30, fraction=0.5)
    scene.server.arm("header_stall", seconds=0.05)
    heard = ask(scene.regular, patience=SHORT_SECONDS)
    assert (heard.status, heard.end) == (0, "silence")
    heard = ask(scene.regular, patience=SHORT_SECONDS)
    assert (heard.status, len(heard.body), heard.length, heard.end) == (
        200,
        len(BODY) // 2,
        len(BODY),
        "silence",
    )
    heard = ask(scene.regular)
    assert (heard.status, heard.end) == (0, "fin")


def test_lengths_that_agree_and_lengths_that_do_not(scene: Scene) -> None:
    for kind in ("truncate", "extend", "wrong_length"):
        scene.server.arm(kind)
    short, long, wrong = (ask(scene.regular) for _ in range(3))
    assert short.length == len(short.body) < len(BODY)
    assert BODY.startswith(short.body)
    assert long.length == len(long.body) > len(BODY)
    assert long.body.startswith(BODY)
    assert wrong.body == BODY
    assert wrong.length > len(BODY)


def test_a_flip_is_one_bit(scene: Scene) -> None:
    scene.server.arm("flip", seed=1)
    scene.server.arm("flip", position=7)
    heard = ask(scene.regular)
    assert heard.length == len(heard.body) == len(BODY)
    difference = int.from_bytes(heard.body, "big") ^ int.from_bytes(BODY, "big")
    assert difference.bit_count() == 1
    second = ask(scene.regular).body
    assert [i for i in range(len(BODY)) if second[i] != BODY[i]] == [7]


def test_headers_and_etags(scene: Scene) -> None:
    true = ask(scene.lfs, "HEAD").headers
    scene.server.arm("headers", set={"X-Repo-Commit": "../../etc", "X-Linked-Size": None})
    scene.server.arm("stale_etag")
    scene.server.arm("stale_etag", etag="0123")
    changed, stale, said = (ask(scene.lfs, "HEAD").headers for _ in range(3))
    assert changed["x-repo-commit"] == "../../etc"
    assert "x-linked-size" not in changed
    assert changed["x-linked-etag"] == true["x-linked-etag"]
    assert stale["x-linked-etag"] != true["x-linked-etag"]
    assert len(stale["x-linked-etag"]) == len(true["x-linked-etag"])
    assert stale["x-repo-commit"] == scene.head
    assert said["x-linked-etag"] == said["etag"] == '"0123"'


def test_content_changes_between_two_requests(scene: Scene) -> None:
    scene.server.arm("etag_change", times=3, fraction=0.5)
    first = ask(scene.regular)
    rest = ask(scene.regular, headers={"Range": f"bytes={len(first.body)}-"})
    assert first.body == BODY[: len(BODY) // 2]
    assert rest.status == 206
    assert rest.headers["etag"] != first.headers["etag"]
    assert rest.body == bytes(b ^ 0xFF for b in BODY[len(BODY) // 2 :])
    assert ask(scene.regular).headers["etag"] == rest.headers["etag"]


def test_a_range_is_ignored(scene: Scene) -> None:
    scene.server.arm("range_ignored")
    heard = ask(scene.regular, headers={"Range": "bytes=10-19"})
    assert (heard.status, heard.body) == (200, BODY)
    assert "content-range" not in heard.headers


def test_redirects(scene: Scene) -> None:
    scene.server.arm("redirect_loop")
    scene.server.arm("redirect")
    scene.server.arm("redirect", location="http://no-such-host.invalid/x", status=307)
    assert ask(scene.tree).headers["location"] == scene.tree
    away = ask(scene.tree)
    assert away.status == 302
    assert away.headers["location"] == scene.tree.replace(scene.server.endpoint, scene.server.other)
    gone = ask(scene.tree)
    assert (gone.status, gone.headers["location"]) == (307, "http://no-such-host.invalid/x")
    assert ask(away.headers["location"]).body == ask(scene.tree).body
    assert [r["origin"] for r in scene.server.requests()] == ["hub"] * 3 + ["other", "hub"]


@pytest.mark.parametrize("where", ["tree", "info"])
def test_listings_that_lie(scene: Scene, where: str) -> None:
    url = scene.tree if where == "tree" else f"{scene.info}?blobs=true"
    key = "path" if where == "tree" else "rfilename"

    def items() -> dict[str, dict[str, object]]:
        data = json.loads(ask(url).body)
        return {item[key]: item for item in (data if where == "tree" else data["siblings"])}

    true = items()
    assert set(true) == {".gitattributes", "notes.txt", "w.safetensors"}
    scene.server.arm("listing", edit="extra")
    assert set(items()) == {*true, "tokenizer.json"}
    scene.server.arm("listing", edit="hostile", name="../../x")
    assert set(items()) == {*true, "../../x"}
    scene.server.arm("listing", edit="missing", name="notes")
    assert set(items()) == {".gitattributes", "w.safetensors"}
    for edit in ("wrong_digest", "wrong_size"):
        scene.server.arm("listing", edit=edit, name="w.safe")
        lie = items()
        assert {name for name in true if lie[name] != true[name]} == {"w.safetensors"}
        assert lie["w.safetensors"]["lfs"] != true["w.safetensors"]["lfs"]


def test_any_body(scene: Scene) -> None:
    scene.server.arm("body", text="<html>sign in")
    heard = ask(scene.info)
    assert (heard.status, heard.body) == (200, b"<html>sign in")


@pytest.mark.parametrize("how", ["fin", "rst"])
def test_a_lost_answer_is_a_commit_that_exists(scene: Scene, how: str) -> None:
    header = json.dumps({"key": "header", "value": {"summary": "done", "description": ""}})
    file = json.dumps({"key": "file", "value": {"path": "x", "content": "eHh4", "encoding": "base64"}})
    scene.server.arm("lost_answer", how=how, path="/commit/")
    url = f"{scene.info}/commit/main"
    heard = ask(url, "POST", body=f"{header}\n{file}\n".encode(), token=scene.server.tokens["write"])
    assert (heard.status, heard.end) == (0, how)
    assert scene.server.files(scene.repo) == {
        ".gitattributes": GITATTRIBUTES, "notes.txt": BODY, "w.safetensors": BODY[:9000], "x": b"xxx",
    }  # fmt: skip


def test_someone_else_commits_first(scene: Scene) -> None:
    header = json.dumps(
        {"key": "header", "value": {"summary": "m", "description": "", "parentCommit": scene.head}}
    )
    file = json.dumps({"key": "file", "value": {"path": "x", "content": "eHh4", "encoding": "base64"}})
    scene.server.arm("advance", path="/commit/", name="theirs.txt")
    url = f"{scene.info}/commit/main"
    heard = ask(url, "POST", body=f"{header}\n{file}\n".encode(), token=scene.server.tokens["write"])
    assert heard.status == 412
    assert set(scene.server.files(scene.repo)) == {
        ".gitattributes",
        "notes.txt",
        "theirs.txt",
        "w.safetensors",
    }


@pytest.mark.parametrize("phase", ["before", "during", "handled", "answer"])
def test_the_server_kills_itself(scene: Scene, phase: str) -> None:
    header = json.dumps({"key": "header", "value": {"summary": "done", "description": ""}})
    file = json.dumps(
        {"key": "file", "value": {"path": "x", "content": "eHh4" * 100_000, "encoding": "base64"}}
    )
    scene.server.arm("kill", phase=phase, path="/commit/", fraction=0.5)
    url = f"{scene.info}/commit/main"
    heard = ask(url, "POST", body=f"{header}\n{file}\n".encode(), token=scene.server.tokens["write"])
    assert scene.server.wait_dead() == -9
    assert heard.status == (200 if phase == "answer" else 0)
    assert heard.end in {"fin", "rst"}
    with pytest.raises(ConnectionRefusedError):
        ask(scene.info)
    scene.server.start()
    assert ("x" in scene.server.files(scene.repo)) == (phase in {"handled", "answer"})


def test_endpoints_that_cannot_be_reached(hub_server: HubServer) -> None:
    with pytest.raises(ConnectionRefusedError):
        ask(hub_server.refused)
    for url in (hub_server.unknown_host, hub_server.tls):
        with pytest.raises(OSError):
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5)


def test_every_fault_is_shown_here() -> None:
    kinds = {name.removeprefix("play_") for name in dir(Play) if name.startswith("play_")}
    text = Path(__file__).read_text(encoding="utf-8")
    assert {kind for kind in kinds if f'"{kind}"' not in text} == set()
