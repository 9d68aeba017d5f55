"""The Hub server of the tests, driven by the real client: what it does is what huggingface_hub expects."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import pytest

from tests.hub.client_process import real_client
from tests.hub.hub_process import HubServer
from tests.hub.server.store import GITATTRIBUTES

LARGE = random.Random(12).randbytes(12_000_000)
CARD = b"---\nlibrary_name: peft\ntags:\n- lora\n---\n# An adapter\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with small files, one in a subfolder, and a large one."""
    root = tmp_path / "folder"
    (root / "sub").mkdir(parents=True)
    (root / "README.md").write_bytes(CARD)
    (root / "adapter_config.json").write_bytes(b'{"r": 8}\n')
    (root / "sub" / "notes.txt").write_bytes(b"notes\n")
    (root / "weights.safetensors").write_bytes(LARGE)
    (root / "small.safetensors").write_bytes(LARGE[:3000])
    return root


def content_of(folder: Path) -> dict[str, bytes]:
    """Path -> bytes of a folder, without the client's own bookkeeping."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {path: data for path, data in found.items() if not path.startswith(".cache/")}


def test_a_folder_goes_up_and_comes_down(hub_server: HubServer, tmp_path: Path, folder: Path) -> None:
    hub_server.settings(page_size=2)
    repo = hub_server.repo_name()
    result = real_client(
        """
result = {"name": api.whoami()["name"], "url": api.create_repo(args["repo"], private=True)}
result["again"] = error_of(api.create_repo, args["repo"])
api.create_repo(args["repo"], exist_ok=True)
info = api.upload_folder(repo_id=args["repo"], folder_path=args["folder"], commit_message="first")
result["oid"] = info.oid
result["unchanged"] = api.upload_folder(repo_id=args["repo"], folder_path=args["folder"]).oid
result["snapshot"] = hub.snapshot_download(args["repo"])
result["local"] = hub.snapshot_download(args["repo"], local_dir=args["local"])
result["files"] = api.list_repo_files(args["repo"])
result["tree"] = [[type(i).__name__, i.path] for i in api.list_repo_tree(args["repo"])]
result["mismatches"] = api.verify_repo_checksums(args["repo"]).mismatches
result["siblings"] = [[s.rfilename, s.size, s.blob_id, s.lfs and s.lfs.sha256]
    for s in api.model_info(args["repo"], files_metadata=True).siblings]
result["paths"] = [p.path for p in api.get_paths_info(args["repo"], ["README.md", "nothing", "sub"])]
result["commits"] = [c.title for c in api.list_repo_commits(args["repo"])]
""",
        hub_server.env(tmp_path / "home"),
        repo=repo,
        folder=str(folder),
        local=str(tmp_path / "local"),
    )
    sent = content_of(folder)
    everything = {**sent, ".gitattributes": GITATTRIBUTES}
    assert result["name"] == "alice"
    assert result["url"] == f"{hub_server.endpoint}/{repo}"
    assert result["again"][:2] == ["HfHubHTTPError", 409]
    assert hub_server.head(repo) == result["oid"] == result["unchanged"]
    assert hub_server.files(repo) == everything
    assert content_of(Path(result["snapshot"])) == everything
    assert content_of(Path(result["local"])) == everything
    assert result["files"] == sorted(everything)
    assert ["RepoFolder", "sub"] in result["tree"]
    assert ["RepoFile", "sub/notes.txt"] not in result["tree"]
    assert result["mismatches"] == []
    assert result["paths"] == ["README.md", "sub"]
    assert result["commits"] == ["first", "initial commit"]
    for name, size, blob_id, sha256 in result["siblings"]:
        data = everything[name]
        assert size == len(data)
        if name.endswith(".safetensors"):
            assert sha256 == hashlib.sha256(data).hexdigest()
        else:
            assert blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    assert len(hub_server.state(repo)["commits"]) == 2
    parts = [r for r in hub_server.requests("cdn") if r["method"] == "PUT"]
    assert len(parts) == 1 + 3  # the small one at once, 12 MB in parts of 5 MiB
    assert hub_server.tokens_seen("cdn") == set()
    assert hub_server.tokens_seen("hub") == {f"Bearer {hub_server.tokens['write']}"}


def test_a_cut_download_resumes_by_range(hub_server: HubServer, tmp_path: Path) -> None:
    repo = hub_server.repo_name()
    hub_server.seed(repo, {"weights.safetensors": LARGE})
    hub_server.arm("fin", origin="cdn", method="GET", fraction=0.95)
    path = real_client(
        "result = hub.hf_hub_download(args['repo'], 'weights.safetensors')",
        hub_server.env(tmp_path / "home", token=None),
        repo=repo,
    )
    assert Path(path).read_bytes() == LARGE
    ranges = [record["range"] for record in hub_server.requests("cdn")]
    assert ranges == [None, f"bytes={10 * 2**20}-"]  # the client writes pieces of 10 MiB


def test_branches_tags_and_pull_requests(hub_server: HubServer, tmp_path: Path) -> None:
    repo = hub_server.repo_name()
    first = hub_server.seed(repo, {"a.txt": b"1"})
    result = real_client(
        """
repo = args["repo"]
def put(text, **k):
    return api.create_commit(repo, [CommitOperationAdd("a.txt", text)], commit_message=text.decode(), **k)
api.create_branch(repo, branch="feature/one")
api.create_tag(repo, tag="v1", tag_message="the first")
result = {"tag again": error_of(api.create_tag, repo, tag="v1"), "branch again":
    error_of(api.create_branch, repo, branch="feature/one")}
result["branch"] = put(b"2", revision="feature/one").oid
pr = put(b"3", create_pr=True)
result["pr"] = [pr.oid, pr.pr_revision]
result["pr more"] = put(b"4", revision="refs/pr/1").oid
refs = api.list_repo_refs(repo, include_pull_requests=True)
result["refs"] = {r.ref: r.target_commit for r in refs.branches + refs.tags + refs.pull_requests}
result["on branch"] = Path(hub.hf_hub_download(repo, "a.txt", revision="feature/one")).read_text()
result["on tag"] = Path(hub.hf_hub_download(repo, "a.txt", revision="v1")).read_text()
result["sha"] = api.model_info(repo, revision="feature/one").sha
result["no revision"] = error_of(api.model_info, repo, revision="v2")
result["no file"] = error_of(hub.hf_hub_download, repo, "b.txt")
api.delete_tag(repo, tag="v1")
api.create_commit(repo, [CommitOperationDelete("a.txt")], commit_message="gone")
result["files"] = api.list_repo_files(repo)
result["missing"] = error_of(
    api.create_commit, repo, [CommitOperationDelete("a.txt")], commit_message="gone again")
api.delete_repo(repo)
result["deleted"] = error_of(api.model_info, repo)
""",
        hub_server.env(tmp_path / "home"),
        repo=repo,
    )
    assert result["tag again"][1] == result["branch again"][1] == 409
    assert result["refs"] == {
        "refs/heads/main": first,
        "refs/heads/feature/one": result["branch"],
        "refs/tags/v1": first,
        "refs/pr/1": result["pr more"],
    }
    assert result["pr"][1] == "refs/pr/1"
    assert (result["on branch"], result["on tag"], result["sha"]) == ("2", "1", result["branch"])
    assert result["no revision"][:2] == ["RevisionNotFoundError", 404]
    assert result["no file"][:2] == ["RemoteEntryNotFoundError", 404]
    assert result["files"] == [".gitattributes"]
    assert result["missing"][:2] == ["RemoteEntryNotFoundError", 404]
    assert result["deleted"][:2] == ["RepositoryNotFoundError", 404]
    assert hub_server.state(repo) == {}


def test_a_commit_on_an_old_parent_is_refused(hub_server: HubServer, tmp_path: Path) -> None:
    repo = hub_server.repo_name()
    old = hub_server.seed(repo, {"a.txt": b"1"})
    new = hub_server.seed(repo, {"a.txt": b"2"})
    result = real_client(
        """
def put(**k):
    return api.create_commit(args["repo"], [CommitOperationAdd("a.txt", b"3")], commit_message="m", **k)
result = [error_of(put, parent_commit=args["old"]), error_of(put, parent_commit=args["old"], create_pr=True),
    put(parent_commit=args["new"]).oid]
""",
        hub_server.env(tmp_path / "home"),
        repo=repo,
        old=old,
        new=new,
    )
    assert result[0][1] == result[1][1] == 412
    state = hub_server.state(repo)
    assert state["commits"][result[2]]["parent"] == new
    assert hub_server.head(repo) == result[2]
    assert len(state["commits"]) == 4
    assert not any(ref.startswith("refs/pr/") for ref in state["refs"])


ACCESS = """
repo = args["repo"]
result = {
    "whoami": error_of(lambda: api.whoami(token=True)),
    "info": error_of(api.model_info, repo),
    "list": error_of(api.list_repo_files, repo),
    "get": error_of(hub.hf_hub_download, repo, "a.txt"),
    "put": error_of(api.upload_file, path_or_fileobj=b"2", path_in_repo="a.txt", repo_id=repo),
    "large": error_of(api.upload_file, path_or_fileobj=b"2", path_in_repo="a.bin", repo_id=repo),
    "tag": error_of(api.create_tag, repo, tag="v1"),
    "delete": error_of(api.delete_repo, repo),
}
"""
# What each may not: (private repository, public repository); status of every call, None where it works.
READS = ("info", "list", "get")
WRITES = ("put", "large", "tag", "delete")


@pytest.mark.parametrize(
    ("token", "private", "read", "write"),
    [
        ("foreign", True, 404, 404),
        (None, True, 401, 401),
        ("expired", True, 401, 401),
        ("read", True, None, 403),
        ("foreign", False, None, 403),
        (None, False, None, 401),
        ("expired", False, 401, 401),
    ],
)
def test_who_may_do_what(
    hub_server: HubServer, tmp_path: Path, token: str | None, private: bool, read: int | None, write: int
) -> None:
    repo = hub_server.repo_name()
    head = hub_server.seed(repo, {"a.txt": b"1"}, private=private)
    result: dict[str, Any] = real_client(ACCESS, hub_server.env(tmp_path / "home", token=token), repo=repo)
    status = {name: error and error[1] for name, error in result.items()}
    assert {name: status[name] for name in READS} == dict.fromkeys(READS, read)
    assert {name: status[name] for name in WRITES} == dict.fromkeys(WRITES, write)
    if private and token != "read":
        expected = "HfHubHTTPError" if token == "expired" else "RepositoryNotFoundError"
        assert result["info"][0] == expected
    if token == "expired":
        assert result["whoami"][1] == 401
    assert hub_server.head(repo) == head
    assert len(hub_server.state(repo)["refs"]) == 1


def test_a_gated_repository_shows_itself_but_not_its_content(hub_server: HubServer, tmp_path: Path) -> None:
    repo = hub_server.repo_name()
    hub_server.seed(repo, {"a.txt": b"1"}, gated=True)
    result = real_client(
        """
result = [error_of(api.model_info, args["repo"]), error_of(hub.hf_hub_download, args["repo"], "a.txt")]
""",
        hub_server.env(tmp_path / "home", token="foreign"),
        repo=repo,
    )
    assert result[0] is None
    assert result[1][:2] == ["GatedRepoError", 403]


def test_a_card_with_broken_yaml_is_refused(hub_server: HubServer, tmp_path: Path) -> None:
    repo = hub_server.repo_name()
    head = hub_server.seed(repo, {"a.txt": b"1"})
    result = real_client(
        """result = error_of(api.upload_file, path_or_fileobj=b"---\\n: [\\n---\\n", path_in_repo="README.md",
    repo_id=args["repo"])""",
        hub_server.env(tmp_path / "home"),
        repo=repo,
    )
    assert result is not None
    assert hub_server.head(repo) == head


def test_content_edited_after_hashing_is_refused(hub_server: HubServer, tmp_path: Path) -> None:
    repo = hub_server.repo_name()
    head = hub_server.seed(repo, {"a.txt": b"1"})
    result = real_client(
        """
path = Path(args["path"]); path.write_bytes(b"a" * 4000)
add = CommitOperationAdd("w.bin", path); add.upload_info.sha256
path.write_bytes(b"b" * 4000)
result = error_of(api.create_commit, args["repo"], [add], commit_message="m")
""",
        hub_server.env(tmp_path / "home"),
        repo=repo,
        path=str(tmp_path / "w.bin"),
    )
    assert result[0] == "RuntimeError"
    assert hub_server.head(repo) == head


def test_what_is_stored_survives_a_kill(hub_server: HubServer) -> None:
    repo = hub_server.repo_name()
    head = hub_server.seed(repo, {"a.safetensors": LARGE[:5000], "b.txt": b"b"}, private=True, tag="v1")
    before = hub_server.state(repo)
    hub_server.kill()
    hub_server.start()
    assert hub_server.state(repo) == before
    assert hub_server.head(repo, "v1") == head
    assert hub_server.files(repo)["a.safetensors"] == LARGE[:5000]
