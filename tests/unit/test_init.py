"""Init writes a manifest beside an adapter's own files, all or nothing, and keeps what no file can tell."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

import adapterhub_tools as at
from adapterhub_tools.store.schemas import check
from tests.tiny_files import (
    WIDTH,
    adapter_tensors,
    base_tensors,
    counted,
    make_adapter,
    make_base,
    write_safetensors,
)

NAME = "adapter_manifest.json"


def read(folder: Path) -> dict[str, object]:
    value = json.loads((folder / NAME).read_text(encoding="utf-8"))
    assert isinstance(value, dict)
    assert check(value, "adapter-manifest-1.0", NAME) == []
    return value


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_without_a_base(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", revision="abc")
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    report = at.init(adapter)
    data = read(adapter)
    assert data["base"] == {"id": "example/tiny", "revision": "abc"}
    assert data["digest"] == at.adapter_digest(adapter)
    assert not {"training", "history", "licence", "tags", "metrics"} & set(data)
    assert {path.name: path.read_bytes() for path in adapter.iterdir() if path.name != NAME} == before
    assert (adapter / NAME).read_bytes() == report.manifest.to_bytes()
    assert not report.replaced
    assert "4 target modules" in report.summary


def test_with_a_base(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "a")
    manifest = at.init(adapter, base=base, base_id="other/name", cache=False).manifest
    found = at.content_digest(base, cache=False)
    assert manifest.base.id == "other/name"
    assert manifest.base.architecture == "llama"
    assert manifest.base.dtype == "F32"
    assert manifest.base.digest == found.digest
    assert manifest.base.config_digest == found.config_digest
    assert manifest.base.parameters == found.bytes // 4
    assert [module.base_shape for module in manifest.adapter.modules] == [(8, 8), (4, 8)] * 2
    assert {module.kind for module in manifest.adapter.modules} == {"linear"}
    assert at.validate(adapter, base=base, cache=False).ok


def test_the_digest_of_the_targets_is_that_of_their_tensors_alone(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "a")
    manifest = at.init(adapter, base=base, cache=False).manifest
    targets = {n: t for n, t in base_tensors().items() if n.endswith(("q_proj.weight", "v_proj.weight"))}
    write_safetensors(tmp_path / "targets.safetensors", targets)
    assert (
        manifest.base.targets_digest
        == at.content_digest(tmp_path / "targets.safetensors", cache=False).digest
    )


def test_files_are_listed_with_size_and_sha256(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    for name in ("README.md", ".gitattributes", "tokenizer.json", f"{NAME}.sig"):
        (adapter / name).write_text(name, encoding="utf-8")
    (adapter / "checkpoint").mkdir()
    (adapter / "checkpoint" / "README.md").write_text("kept", encoding="utf-8")
    (adapter / ".cache").mkdir()
    (adapter / ".cache" / "x").write_text("x", encoding="utf-8")
    records = at.init(adapter).manifest.files
    expected = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoint/README.md",
        "tokenizer.json",
    ]
    assert [record.path for record in records] == expected
    for record in records:
        data = (adapter / record.path).read_bytes()
        assert (record.size, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_a_manifest_is_not_overwritten_without_replace(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    at.init(adapter, licence="mit")
    before = (adapter / NAME).read_bytes()
    with pytest.raises(at.StoreError, match="--replace"):
        at.init(adapter, licence="apache-2.0")
    assert (adapter / NAME).read_bytes() == before
    assert names_in(adapter) == {"adapter_config.json", "adapter_model.safetensors", NAME}


def test_a_rewrite_keeps_what_no_file_can_tell(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "a")
    at.init(
        adapter,
        base=base,
        licence="mit",
        tag=["a", "b"],
        training={"optimizer": "adamw", "epochs": 2},
        quantisation={"scheme": "bitsandbytes-nf4", "double": True},
        cache=False,
    )
    old = read(adapter)
    old["schema_version"] = "1.4"
    old["carbon"] = 12
    old["metrics"] = {"loss": 0.5}
    old["history"] = [{"operation": "x", "tool": "t", "tool_version": "1", "inputs": []}]
    (adapter / NAME).write_text(json.dumps(old), encoding="utf-8")

    report = at.init(adapter, replace=True, training={"epochs": 3, "galore": {"rank": 4}})
    assert report.replaced
    new = read(adapter)
    assert new["training"] == {"optimizer": "adamw", "epochs": 3, "galore": {"rank": 4}}
    for name in (
        "schema_version",
        "carbon",
        "metrics",
        "licence",
        "tags",
        "base",
        "targets",
        "digest",
        "method",
    ):
        assert new[name] == old[name], name
    assert new["history"] == [{**old["history"][0], "options": {}, "figures": {}}]  # type: ignore[index]


def test_another_base_id_forgets_what_was_known_of_the_old_base(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "a")
    at.init(adapter, base=base, cache=False)
    manifest = at.init(adapter, replace=True, base_id="another/one").manifest
    assert manifest.base.to_json() == {"id": "another/one"}


def test_changed_tensors_are_pointed_out(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    at.init(adapter, licence="mit")
    tensors = adapter_tensors()
    name = next(iter(tensors))
    tensors[name] = counted("F32", *tensors[name][1], start=5)
    write_safetensors(adapter / "adapter_model.safetensors", tensors)
    report = at.init(adapter, replace=True)
    assert any("differ" in note for note in report.notes)
    assert report.manifest.licence == "mit"


def test_an_adapter_that_does_not_fit_gets_no_manifest(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    tensors = {
        name: (counted("F32", 2, WIDTH + 1) if "lora_A" in name else tensor)
        for name, tensor in adapter_tensors().items()
    }
    adapter = make_adapter(tmp_path / "a", tensors=tensors)
    with pytest.raises(at.MismatchError) as caught:
        at.init(adapter, base=base, cache=False)
    assert len(caught.value.problems) >= 4
    assert NAME not in names_in(adapter)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("quantisation", {"bits": 4}),
        ("quantisation", {"scheme": "x", "typo": 1}),
        ("training", {"lora_plus_ratio": -1}),
        ("training", {"note": float("nan")}),
        ("licence", "bad \udc80 bytes"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    tmp_path: Path, option: str, value: object
) -> None:
    adapter = make_adapter(tmp_path / "a")
    with pytest.raises(at.FormatError):
        at.init(adapter, **{option: value})  # type: ignore[arg-type]
    assert names_in(adapter) == {"adapter_config.json", "adapter_model.safetensors"}


def test_broken_adapters_and_files_get_no_manifest(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", r=5)
    with pytest.raises(at.FormatError):
        at.init(adapter)
    with pytest.raises(at.UnsupportedError, match="folder"):
        at.init(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(at.UnsupportedError, match="pickle"):
        at.init(adapter)
    assert NAME not in names_in(adapter)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    (tmp_path / "secret").write_text("x", encoding="utf-8")
    (adapter / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(at.FormatError, match=r"notes\.txt"):
        at.init(adapter)


def test_the_adapter_digest_does_not_depend_on_names_or_padding(tmp_path: Path) -> None:
    plain = make_adapter(tmp_path / "plain")
    tensors = adapter_tensors()
    (tmp_path / "other").mkdir()
    shuffled = dict(sorted(tensors.items(), reverse=True))
    other = make_adapter(tmp_path / "other" / "a", lora_alpha=4.0, lora_dropout=0.5, inference_mode=True)
    write_safetensors(other / "adapter_model.safetensors", shuffled, pad=64)
    assert at.adapter_digest(other) == at.adapter_digest(plain)


@pytest.mark.parametrize("change", [{"lora_alpha": 5}, {"use_rslora": True}])
def test_the_adapter_digest_depends_on_the_scale(tmp_path: Path, change: dict[str, object]) -> None:
    plain, changed = make_adapter(tmp_path / "plain"), make_adapter(tmp_path / "changed", **change)
    assert at.adapter_digest(plain) != at.adapter_digest(changed)


def test_digests_of_targets_are_forgotten_with_the_targets(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "a")
    before = at.init(adapter, base=base, cache=False).manifest
    fewer = {name: tensor for name, tensor in adapter_tensors().items() if "q_proj" in name}
    other = make_adapter(tmp_path / "other", tensors=fewer, target_modules=["q_proj"])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_bytes((other / name).read_bytes())
    report = at.init(adapter, replace=True)
    assert before.base.targets_digest is not None
    assert report.manifest.base.targets_digest is None
    assert report.manifest.base.digest == before.base.digest
    assert any("targets_digest" in note for note in report.notes)
    assert at.validate(adapter, base=base, cache=False).ok
    assert at.merge(base, adapter, tmp_path / "out").changed == 2


def test_the_digest_of_the_same_targets_is_kept(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "a")
    before = at.init(adapter, base=base, cache=False).manifest
    (adapter / "adapter_config.json").write_bytes(
        (make_adapter(tmp_path / "other", lora_alpha=1) / "adapter_config.json").read_bytes()
    )
    assert at.init(adapter, replace=True).manifest.base == before.base
