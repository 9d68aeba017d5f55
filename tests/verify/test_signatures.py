"""Signatures: what is signed is found right by the OpenSSF library itself, and every change is found."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import model_signing
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

import adapterhub_tools as at
from adapterhub_tools.cli.main import cli
from adapterhub_tools.errors import FormatError, StoreError, UnsupportedError
from adapterhub_tools.store import directory, signature
from tests.undo.models import make_adapter, make_base


def write_keys(folder: Path, name: str, key: object = None) -> tuple[Path, Path]:
    own = key or ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(
        own.private_bytes(  # type: ignore[attr-defined]
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    public.write_bytes(
        own.public_key().public_bytes(  # type: ignore[attr-defined]
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path, "own")


@pytest.fixture
def signed(tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    base, adapter = make_base(tmp_path / "base", hidden=32), make_adapter(tmp_path / "adapter", hidden=32)
    report = at.merge(base, adapter, tmp_path / "merged", undo=True, sign=keys[0])
    assert report.signed
    assert "and signed" in report.summary
    return tmp_path / "merged"


def kinds(report: at.VerifyReport) -> list[str]:
    return [problem.kind for problem in report.problems]


def test_the_library_itself_finds_it_right(signed: Path, keys: tuple[Path, Path]) -> None:
    model_signing.verifying.Config().use_elliptic_key_verifier(public_key=keys[1]).verify(
        signed, signed / "model.sig"
    )
    report = at.verify(merged=signed, pubkey=keys[1])
    assert report.ok
    assert report.exit_code == 0
    assert set(report.signed_files or ()) == {
        path.name for path in signed.iterdir() if path.name != "model.sig"
    }


def test_a_signature_by_the_library_is_found_right(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    folder = make_base(tmp_path / "base", hidden=32)
    hashing = model_signing.hashing.Config().use_shard_serialization(shard_size=1000)
    config = model_signing.signing.Config().use_elliptic_key_signer(private_key=keys[0])
    config.set_hashing_config(hashing).sign(folder, folder / "model.sig")
    assert at.verify(merged=folder, pubkey=keys[1]).ok
    (folder / "config.json").write_text("{}")
    report = at.verify(merged=folder, pubkey=keys[1])
    assert not report.ok


def test_the_name_in_the_signature_is_that_of_the_output(signed: Path) -> None:
    import base64

    bundle = json.loads((signed / "model.sig").read_bytes())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    assert statement["subject"][0]["name"] == "merged"
    assert str(signed.parent) not in json.dumps(statement)


def test_beside_the_other_checks(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    given = {"merged": signed, "pubkey": keys[1]}
    assert at.verify(receipt=True, **given).ok
    report = at.verify(base=tmp_path / "base", adapter=tmp_path / "adapter", **given)
    assert report.ok
    assert report.tensors
    (signed / "model.sig").unlink()
    report = at.verify(base=tmp_path / "base", adapter=tmp_path / "adapter", **given)
    assert kinds(report) == ["no-signature"]
    assert report.exit_code == 1


def test_undone_as_without(signed: Path, tmp_path: Path) -> None:
    undone = at.unmerge(signed, tmp_path / "again", adapter=tmp_path / "adapter")
    assert undone.digest == at.content_digest(tmp_path / "base", cache=False).digest
    assert not (tmp_path / "again" / "model.sig").exists()


def test_an_edited_weight(signed: Path, keys: tuple[Path, Path]) -> None:
    path = signed / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    report = at.verify(merged=signed, pubkey=keys[1])
    assert kinds(report) == ["signed-files"]
    assert report.problems[0].file == "model.safetensors"
    assert "SHA-256" in report.problems[0].message


def test_an_edited_receipt_and_a_missing_and_a_new_file(signed: Path, keys: tuple[Path, Path]) -> None:
    receipt = signed / "merge_receipt.json"
    receipt.write_text(receipt.read_text().replace('"exact"', '"tolerance"'))
    (signed / "tokenizer.json").unlink()
    (signed / "more.safetensors").write_bytes(b"")
    report = at.verify(merged=signed, pubkey=keys[1])
    found = {problem.file: problem.kind for problem in report.problems}
    assert found == {
        "merge_receipt.json": "signed-files",
        "tokenizer.json": "missing-file",
        "more.safetensors": "not-covered",
    }
    assert report.exit_code == 1


def test_cards_and_what_belongs_to_git_may_change(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / "README.md").write_text("# A card")
    (signed / ".gitattributes").write_text("*.safetensors filter=lfs")
    (signed / ".cache").mkdir()
    (signed / ".cache" / "record").write_text("x")
    report = at.verify(merged=signed, pubkey=keys[1])
    assert report.ok
    assert report.notes == ("not covered by the signature: README.md, .cache, .gitattributes",)


def test_another_key(signed: Path, tmp_path: Path) -> None:
    _, other = write_keys(tmp_path, "other")
    report = at.verify(merged=signed, pubkey=other)
    assert kinds(report) == ["other-key"]
    assert report.exit_code == 1


def test_another_key_that_claims_to_be_this_one(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    """The hint of the key is not signed: with the right hint, another key's signature still fails."""
    private, _ = write_keys(tmp_path, "other")
    own = json.loads((signed / "model.sig").read_bytes())["verificationMaterial"]
    at.sign(signed, key=private, replace=True)
    forged = json.loads((signed / "model.sig").read_bytes())
    forged["verificationMaterial"] = own
    (signed / "model.sig").write_text(json.dumps(forged))
    assert kinds(at.verify(merged=signed, pubkey=keys[1])) == ["bad-signature"]


def test_a_signature_that_leaves_files_out(signed: Path, keys: tuple[Path, Path]) -> None:
    """Even the right key's signature does not pass if it is not over everything."""
    hashing = model_signing.hashing.Config().set_ignored_paths(paths=["model.sig", "merge_receipt.json"])
    config = model_signing.signing.Config().use_elliptic_key_signer(private_key=keys[0])
    config.set_hashing_config(hashing).sign(signed, signed / "model.sig")
    report = at.verify(merged=signed, pubkey=keys[1])
    assert [(problem.kind, problem.file) for problem in report.problems] == [
        ("not-covered", "merge_receipt.json")
    ]


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[]", b"\xff", b'{"mediaType": 1}', b'{"verificationMaterial": {}}', b'{"a": 1, "a": 2}'],
)
def test_a_broken_signature(signed: Path, keys: tuple[Path, Path], data: bytes) -> None:
    (signed / "model.sig").write_bytes(data)
    report = at.verify(merged=signed, pubkey=keys[1])
    assert not report.ok
    assert report.exit_code == 1
    assert all(problem.file == "model.sig" for problem in report.problems)


def test_a_symbolic_link(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    (signed / "config.json").rename(tmp_path / "config.json")
    (signed / "config.json").symlink_to(tmp_path / "config.json")
    report = at.verify(merged=signed, pubkey=keys[1])
    assert [(problem.kind, problem.file) for problem in report.problems] == [("symlink", "config.json")]
    (signed / "model.sig").unlink()
    with pytest.raises(FormatError, match=r"config\.json.*symbolic link"):
        at.sign(signed, key=keys[0])


def test_an_adapter_with_a_manifest(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    adapter = make_adapter(tmp_path / "adapter", hidden=32)
    at.init(adapter)
    report = at.sign(adapter, key=keys[0])
    assert report.path == str(adapter / "adapter_manifest.json.sig")
    assert set(report.files) >= {"adapter_manifest.json", "adapter_config.json", "adapter_model.safetensors"}
    assert at.verify(merged=adapter, pubkey=keys[1]).ok
    assert at.validate(adapter).ok
    with pytest.raises(StoreError, match="signed already"):
        at.sign(adapter, key=keys[0])
    assert at.sign(adapter, key=keys[0], replace=True).replaced


def test_nothing_is_written_where_the_key_is_wrong(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    base, adapter = make_base(tmp_path / "base", hidden=32), make_adapter(tmp_path / "adapter", hidden=32)
    ed, _ = write_keys(tmp_path, "ed", ed25519.Ed25519PrivateKey.generate())
    small, _ = write_keys(tmp_path, "k1", ec.generate_private_key(ec.SECP256K1()))
    locked = tmp_path / "locked.pem"
    locked.write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    for key in (ed, small, locked, keys[1]):
        with pytest.raises(FormatError, match="elliptic-curve key"):
            at.merge(base, adapter, tmp_path / "merged", sign=key)
        assert not (tmp_path / "merged").exists()
    with pytest.raises(StoreError):
        at.merge(base, adapter, tmp_path / "merged", sign=tmp_path / "none.pem")
    with pytest.raises(FormatError, match="public elliptic-curve key"):
        at.verify(merged=base, pubkey=keys[0])


def test_a_key_inside_the_folder(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    folder = make_base(tmp_path / "base", hidden=32)
    inside = folder / "key.pem"
    inside.write_bytes(keys[0].read_bytes())
    with pytest.raises(UnsupportedError, match="private key lies in the folder"):
        at.sign(folder, key=inside)


def test_without_the_extra(tmp_path: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = make_base(tmp_path / "base", hidden=32), make_adapter(tmp_path / "adapter", hidden=32)
    monkeypatch.setattr(signature, "find_spec", lambda name: None if name == "OpenSSL" else object())
    run = CliRunner().invoke(
        cli, ["merge", str(base), str(adapter), str(tmp_path / "m"), "--sign", str(keys[0])]
    )
    assert run.exit_code == 4
    assert "adaptertool[sign]" in run.output
    assert "OpenSSL" in run.output
    assert not (tmp_path / "m").exists()
    run = CliRunner().invoke(cli, ["verify", str(base), "--pubkey", str(keys[1])])
    assert run.exit_code == 10
    assert "adaptertool[sign]" in run.output


def test_the_command_line(signed: Path, keys: tuple[Path, Path]) -> None:
    run = CliRunner().invoke(cli, ["verify", str(signed), "--pubkey", str(keys[1]), "--json"])
    assert run.exit_code == 0
    found = json.loads(run.stdout)
    assert found["mode"] == "signature"
    assert "merge_receipt.json" in found["signed_files"]
    run = CliRunner().invoke(cli, ["sign", str(signed), "--key", str(keys[0])])
    assert run.exit_code == 8
    run = CliRunner().invoke(cli, ["sign", str(signed), "--key", str(keys[0]), "--replace", "--json"])
    assert run.exit_code == 0
    assert json.loads(run.stdout)["replaced"] is True
    assert CliRunner().invoke(cli, ["verify", str(signed)]).exit_code == 2


def test_no_network_is_asked(signed: Path, keys: tuple[Path, Path]) -> None:
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('a connection')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "import adapterhub_tools as at\n"
        "at.sign(sys.argv[1], key=sys.argv[2], replace=True)\n"
        "assert at.verify(merged=sys.argv[1], pubkey=sys.argv[3]).ok\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(signed), str(keys[0]), str(keys[1])], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_full_disk_at_the_signature(
    tmp_path: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receipt is written by then; still nothing appears."""
    base, adapter = make_base(tmp_path / "base", hidden=32), make_adapter(tmp_path / "adapter", hidden=32)
    (tmp_path / "place").mkdir()
    flushed, written = directory.flush, directory.StagedDirectory.write_bytes
    names: list[str] = []

    def full(descriptor: int) -> None:
        if names and names[-1] == "model.sig":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flushed(descriptor)

    def watched(staged: directory.StagedDirectory, relative: str, data: bytes) -> None:
        names.append(relative)
        written(staged, relative, data)

    monkeypatch.setattr(directory, "flush", full)
    monkeypatch.setattr(directory.StagedDirectory, "write_bytes", watched)
    with pytest.raises(StoreError, match=r"model\.sig: could not write it: No space left") as raised:
        at.merge(base, adapter, tmp_path / "place" / "merged", sign=keys[0])
    assert raised.value.problems[0].kind == "disk-full"
    assert names[-2:] == ["merge_receipt.json", "model.sig"]
    assert list((tmp_path / "place").iterdir()) == []


def test_a_broken_device_while_signing(
    tmp_path: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = make_base(tmp_path / "base", hidden=32), make_adapter(tmp_path / "adapter", hidden=32)
    (tmp_path / "place").mkdir()

    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(tmp_path / "somewhere"))

    monkeypatch.setattr(model_signing.signing.Config, "sign", broken)
    with pytest.raises(StoreError, match="could not sign it: Input/output error"):
        at.merge(base, adapter, tmp_path / "place" / "merged", sign=keys[0])
    with pytest.raises(StoreError, match="could not sign it"):
        at.sign(adapter, key=keys[0])
    assert list((tmp_path / "place").iterdir()) == []
    assert not (adapter / "model.sig").exists()


def test_killed_while_signing(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    """What stands there stays, and the next run removes what the killed one left."""
    base, adapter = make_base(tmp_path / "base", hidden=32), make_adapter(tmp_path / "adapter", hidden=32)
    place = tmp_path / "place"
    place.mkdir()
    code = (
        "import os, signal, sys, model_signing\n"
        "import adapterhub_tools as at\n"
        "model_signing.signing.Config.sign = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "at.merge(sys.argv[1], sys.argv[2], sys.argv[3], sign=sys.argv[4])\n"
    )
    paths = [str(base), str(adapter), str(place / "merged"), str(keys[0])]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (place / "merged").exists()
    at.merge(base, adapter, place / "merged", sign=keys[0])
    assert [path.name for path in place.iterdir()] == ["merged"]
    assert at.verify(merged=place / "merged", pubkey=keys[1], receipt=True).ok
