"""Registries without a Hub: a folder, and S3 by an S3 server on loopback; the same promises for both."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import adapterhub_tools as at
from tests.hub.hub_process import free_port
from tests.hub.small_adapter import weights, write_adapter

REPOSITORY = Path(__file__).resolve().parents[2]
START_SECONDS = 60
MANIFEST = "adapter_manifest.json"


@pytest.fixture(scope="module")
def s3_port() -> Iterator[int]:
    """A moto server with an empty bucket."""
    port = free_port()
    program = Path(sys.executable).with_name("moto_server")
    server = subprocess.Popen(
        [str(program), "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert server.poll() is None
                assert time.monotonic() < end, "moto_server did not start"
                time.sleep(0.1)
        yield port
    finally:
        server.kill()
        server.wait()


@dataclass(frozen=True, kw_only=True)
class Place:
    """A registry, and how a test changes what it stores behind its back."""

    url: str
    blobs: Callable[[], dict[str, bytes]]
    overwrite: Callable[[str, bytes], None]


def _s3(port: int, monkeypatch: pytest.MonkeyPatch, name: str) -> Place:
    for variable, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(variable, value)
    import boto3

    s3 = boto3.client("s3")
    s3.create_bucket(Bucket=name)

    def blobs() -> dict[str, bytes]:
        found = s3.list_objects_v2(Bucket=name).get("Contents", [])
        return {item["Key"]: s3.get_object(Bucket=name, Key=item["Key"])["Body"].read() for item in found}

    def overwrite(key: str, data: bytes) -> None:
        s3.put_object(Bucket=name, Key=key, Body=data)

    return Place(url=f"s3://{name}/adapters-here", blobs=blobs, overwrite=overwrite)


def _folder(root: Path) -> Place:
    def blobs() -> dict[str, bytes]:
        return {str(p.relative_to(root.parent)): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    def overwrite(key: str, data: bytes) -> None:
        (root.parent / key).write_bytes(data)

    return Place(url=root.as_uri(), blobs=blobs, overwrite=overwrite)


@pytest.fixture(params=["file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.delenv("ADAPTERTOOL_REGISTRY", raising=False)
    if request.param == "file":
        return _folder(tmp_path / "registry")
    port = request.getfixturevalue("s3_port")
    return _s3(port, monkeypatch, "bucket-" + hashlib.sha256(str(tmp_path).encode()).hexdigest()[:20])


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


def change(adapter: Path, seed: int) -> None:
    (adapter / MANIFEST).unlink(missing_ok=True)
    (adapter / "adapter_model.safetensors").write_bytes(weights(seed))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def test_push_pull_list_tags_and_history(place: Place, adapter: Path, tmp_path: Path) -> None:
    ref = f"{place.url}/team/french"
    first = at.push(adapter, ref, tag="v1", message="first")
    old = contents(adapter)
    assert first.created_commit
    again = at.push(adapter, ref)
    assert (again.created_commit, again.commit) == (False, first.commit)
    change(adapter, 2)
    second = at.push(adapter, ref)
    assert second.parent == first.commit

    by_tag = at.pull(f"{ref}@v1", tmp_path / "v1")
    assert by_tag.verified_by_manifest
    got = contents(tmp_path / "v1")
    assert {name: data for name, data in got.items() if name != "README.md"} == old
    assert at.pull(ref, tmp_path / "latest").commit == second.commit
    assert at.pull(f"{ref}@1", tmp_path / "one").commit == first.commit
    assert at.pull(f"{ref}@{first.commit}", tmp_path / "digest").commit == first.commit
    assert at.validate(tmp_path / "latest").ok

    listed = at.list_adapters(place.url)
    assert [(item.name, item.versions, item.tags) for item in listed.adapters] == [
        ("team/french", 2, ("v1",))
    ]
    history = at.list_adapters(ref).versions
    assert [(item.number, item.id, item.tags) for item in history] == [
        (2, second.commit, ()),
        (1, first.commit, ("v1",)),
    ]
    assert history[1].message == "first"


def test_content_is_stored_once_under_its_digest(place: Place, adapter: Path) -> None:
    at.push(adapter, f"{place.url}/team/a")
    at.push(adapter, f"{place.url}/team/b")
    blobs = {key: data for key, data in place.blobs().items() if "/blobs/" in key}
    assert all(key.endswith(hashlib.sha256(data).hexdigest()) for key, data in blobs.items())
    assert sum(data == weights(1) for data in blobs.values()) == 1


def test_damage_is_noticed_and_nothing_is_left(place: Place, adapter: Path, tmp_path: Path) -> None:
    at.push(adapter, f"{place.url}/team/a")
    key = next(key for key, data in place.blobs().items() if data == weights(1))
    damaged = bytearray(weights(1))
    damaged[len(damaged) // 2] ^= 1
    for wrong in (bytes(damaged), weights(1)[:-1], weights(1) + b"x", b""):
        place.overwrite(key, wrong)
        with pytest.raises(at.IntegrityError):
            at.pull(f"{place.url}/team/a", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_tag_is_never_moved(place: Place, adapter: Path) -> None:
    ref = f"{place.url}/team/a"
    first = at.push(adapter, ref, tag="v1")
    at.push(adapter, ref, tag="v1")
    change(adapter, 2)
    with pytest.raises(at.HubError, match="v1"):
        at.push(adapter, ref, tag="v1")
    assert [item.id for item in at.list_adapters(ref).versions] == [first.commit]


def test_what_is_not_there(place: Place, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(at.StoreError, match=r"registry\.json"):
        at.pull(f"{place.url}/team/a", tmp_path / "out")
    at.push(adapter, f"{place.url}/team/a")
    for reference in ("team/b", "team/a@v9", "team/a@9", f"team/a@sha256:{'0' * 64}"):
        with pytest.raises(at.HubError):
            at.pull(f"{place.url}/{reference}", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(place: Place, adapter: Path) -> None:
    report = at.push(adapter, f"{place.url}/team/a", dry_run=True)
    assert {file.change for file in report.files} == {"add"}
    assert place.blobs() == {}
    assert not (adapter / MANIFEST).exists()


def test_options_of_a_hub_are_refused(place: Place, adapter: Path) -> None:
    for option in ({"private": True}, {"create_pr": True}, {"revision": "main"}):
        with pytest.raises(at.UnsupportedError):
            at.push(adapter, f"{place.url}/team/a", **option)  # type: ignore[arg-type]
    with pytest.raises(at.FormatError):
        at.push(adapter, f"{place.url}/team/a@v1")


def test_references_to_a_registry_work_where_paths_do(place: Place, adapter: Path) -> None:
    ref = f"{place.url}/team/a"
    at.push(adapter, ref)
    assert at.validate(ref).ok
    report = at.inspect(ref)
    assert isinstance(report, at.AdapterReport)
    assert report.path == ref
    assert at.adapter_digest(ref) == at.adapter_digest(adapter)


def run(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "adapterhub_tools.cli.main", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_registry_of_the_environment_is_where_bare_names_lie(adapter: Path, tmp_path: Path) -> None:
    env = {"ADAPTERTOOL_REGISTRY": str(tmp_path / "registry")}
    assert run("push", adapter, "me/mine", "--tag", "v1", **env).returncode == 0
    assert "me/mine" in run("list", **env).stdout
    assert run("pull", "me/mine@v1", tmp_path / "out", **env).returncode == 0
    assert contents(tmp_path / "out")["adapter_model.safetensors"] == weights(1)
    assert run("list", ADAPTERTOOL_REGISTRY="").returncode == 3


def test_a_folder_with_other_things_is_no_registry(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(at.StoreError, match="no registry"):
        at.push(adapter, f"{(tmp_path / 'home').as_uri()}/me/mine")
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("below", ["team", "adapters/team", "team/of/many"])
def test_no_registry_is_made_inside_another(place: Place, adapter: Path, tmp_path: Path, below: str) -> None:
    at.push(adapter, f"{place.url}/team/a")
    before = place.blobs()
    for dry_run in (True, False):
        with pytest.raises(at.FormatError, match=r"team|adapters") as caught:
            at.push(adapter, f"{place.url}/{below}/part/b", dry_run=dry_run)
        assert caught.value.problems[0].kind == "registry-inside"
        assert f"{place.url}/owner/name" in caught.value.problems[0].remedy
    assert place.blobs() == before
    with pytest.raises(at.StoreError, match="no registry") as refused:
        at.pull(f"{place.url}/{below}/part/b", tmp_path / "out")
    assert f"{place.url}/owner/name" in refused.value.problems[0].remedy


def test_a_file_of_that_name_that_others_made_is_no_registry(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "registry.json").write_text('{"npm": true}', encoding="utf-8")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "registry.json").write_bytes(b"\xff")
    for folder in ("a", "b/c"):
        assert at.push(adapter, f"{(tmp_path / folder).as_uri()}/team/a").created_commit


def test_records_made_by_hand_are_not_trusted(adapter: Path, tmp_path: Path) -> None:
    root = tmp_path / "registry"
    at.push(adapter, f"{root.as_uri()}/me/mine")
    record = root / "adapters/me/mine/versions/00000001.json"
    good = json.loads(record.read_bytes())
    for path in ("../../evil", "/etc/passwd", "a\\b", ".git/hooks/x/../y", ""):
        bad = {**good, "files": [{**good["files"][0], "path": path}, *good["files"][1:]]}
        record.write_text(json.dumps(bad), encoding="utf-8")
        with pytest.raises(at.FormatError):
            at.pull(f"{root.as_uri()}/me/mine", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    record.unlink()
    record.symlink_to("/etc/hostname")
    with pytest.raises(at.AdapterError):
        at.pull(f"{root.as_uri()}/me/mine", tmp_path / "out")


WRITER = """
import sys
from pathlib import Path
import adapterhub_tools as at
from tests.hub.small_adapter import write_adapter
folder, url, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for number in range(5):
    report = at.push(write_adapter(folder / str(number), seed=seed + number), url)
    assert report.created_commit
    print(report.commit, flush=True)
"""


def test_writers_at_once_lose_nothing(place: Place, tmp_path: Path) -> None:
    url = f"{place.url}/team/busy"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / f"w{number}"), url, str(100 * number)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (1, 2, 3)
    ]
    said = [writer.communicate(timeout=120) for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0], said
    made = {line for out, _ in said for line in out.split()}
    history = at.list_adapters(url).versions
    assert {item.id for item in history} == made
    assert [item.number for item in history] == list(range(15, 0, -1))


@pytest.mark.parametrize("point", range(20))
def test_a_push_that_is_killed_leaves_the_old_or_the_new(point: int, tmp_path: Path) -> None:
    root = tmp_path / "registry"
    url = f"{root.as_uri()}/team/a"
    adapter = write_adapter(tmp_path / "adapter")
    first = at.push(adapter, url)
    change(adapter, 2)
    at.init(adapter)
    code = (
        "import os, signal, sys\n"
        "import adapterhub_tools as at\n"
        "from adapterhub_tools.hub import directory_store\n"
        "left = int(sys.argv[3])\n"
        "def count(name, of=os):\n"
        "    call = getattr(of, name)\n"
        "    def counted(*a, **k):\n"
        "        global left\n"
        "        left -= 1\n"
        "        if left < 0:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return call(*a, **k)\n"
        "    setattr(of, name, counted)\n"
        "for name in ('write_all', 'flush'):\n"
        "    count(name, directory_store)\n"
        "count('link')\n"
        "at.push(sys.argv[1], sys.argv[2])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(adapter), url, str(point)],
        cwd=REPOSITORY,
        capture_output=True,
        check=False,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
    assert done.returncode == -signal.SIGKILL or point > 8
    out = tmp_path / "out"
    pulled = at.pull(url, out)
    expected = weights(1) if pulled.commit == first.commit else weights(2)
    assert (out / "adapter_model.safetensors").read_bytes() == expected
    again = at.push(adapter, url)
    assert again.created_commit == (pulled.commit == first.commit)
    shutil.rmtree(out)
    at.pull(url, out)
    assert (out / "adapter_model.safetensors").read_bytes() == weights(2)
