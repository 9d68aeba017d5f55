"""Each rule of a scan finds what it is for, and nothing in folders that have nothing of it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

import adapterhub_tools as at
from adapterhub_tools.cli.main import cli
from adapterhub_tools.ops import scan_files, scan_rules
from tests.tiny_files import adapter_config, make_adapter, make_base, write_json

ELF = b"\x7fELF\x02\x01\x01" + bytes(57)
HUB_TOKEN = "hf_" + "aB3dE5gH7jK9mN1pQ2" * 2


def zipped(**members: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return made.getvalue()


def array(descr: str) -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': (1,), }}".encode()
    header += b" " * (118 - len(header) - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(8)


def found(folder: Path, **options: object) -> set[tuple[str, str]]:
    return {(p.kind, p.file) for p in at.scan(folder, **options).problems}  # type: ignore[arg-type]


# What one file gives: (rule, name, content).
FILES: list[tuple[str, str, bytes]] = [
    ("pickle", "training_args.bin", b"\x80\x04N."),
    ("pickle", "adapter_model.bin", zipped(**{"adapter_model/data.pkl": b"\x80\x02}q\x00."})),
    ("pickle", "notes", b"cos\nsystem\n(S'true'\ntR."),
    ("pickle", "empty.pt", b""),
    ("pickle", "values.npy", array("|O")),
    ("pickle", "values.npz", zipped(**{"a.npy": array("|O")})),
    ("pickle-code", "optimizer.pt", b"cos\nsystem\n(S'true'\ntR."),
    ("native-code", "kernel.so", ELF),
    ("native-code", "kernel.so.1", b"?"),
    ("native-code", "helper", ELF),
    ("native-code", "run.exe", b"MZ\x90\x00" + bytes(60)),
    ("executable-format", "model.keras", zipped(**{"config.json": b"{}"})),
    ("executable-format", "weights.h5", b"\x89HDF\r\n\x1a\n" + bytes(8)),
    ("executable-format", "saved_model.pb", b"\x08\x01"),
    ("remote-code", "config.json", b'{"auto_map": {"AutoModel": "modeling.X"}}'),
    ("remote-code", "tokenizer_config.json", b'{"a": [{"auto_map": ["x.Y", null]}]}'),
    ("remote-code", "config.json", b'{"custom_pipelines": {"x": {"impl": "p.P"}}}'),
    ("remote-code", "config.json", b'{"_attn_implementation": "someone/kernels@main:attention"}'),
    ("remote-code", "model_index.json", b'{"_class_name": ["my_pipeline", "P"]}'),
    ("foreign-import", "adapter_config.json", b'{"auto_mapping": {"parent_library": "evil.core"}}'),
    ("foreign-import", "adapter_config.json", b'{"megatron_core": "evil.core"}'),
    ("foreign-import", "modules.json", b'[{"idx": 0, "path": "", "type": "os.path.Transformer"}]'),
    ("foreign-import", "model_index.json", b'{"unet": ["subprocess", "Popen"]}'),
    ("template-code", "chat_template.jinja", b"{{ x.__class__ }}"),
    ("template-code", "tokenizer_config.json", b'{"chat_template": "{{ lipsum.x }}"}'),
    ("template-code", "chat_template.json", b'{"chat_template": "{{ x|attr(y) }}"}'),
    ("secret", "notes.md", b"use " + HUB_TOKEN.encode()),
    ("secret", "train.yaml", b"key: AKIA" + b"B2C3D4E5" * 2),
    ("secret", ".env", b"-----BEGIN OPENSSH PRIVATE KEY-----\n"),
    ("path-escape", "model.safetensors.index.json", b'{"weight_map": {"x": "../secret.safetensors"}}'),
    ("path-escape", "adapter_manifest.json", b'{"files": [{"path": "/etc/passwd"}]}'),
    ("archive", "data.zip", zipped(**{"a.txt": b"x"})),
    ("archive", "data.tar.gz", b"\x1f\x8b\x08" + bytes(20)),
    ("archive", "data", b"7z\xbc\xaf\x27\x1c" + bytes(20)),
    ("archive", "values.npz", zipped(**{"a.npy": array("<f4"), "run.py": b"print()"})),
    ("archive", "values.npz", b"PK\x03\x04" + bytes(40)),
    ("disguised", "tokenizer.json", ELF),
    ("disguised", "picture.png", zipped(**{"a.txt": b"x"})),
    ("disguised", "config.json", b"<!DOCTYPE html><html>404</html>"),
    ("disguised", "vocab.txt", b"a\0b"),
    ("disguised", "spiece.model", b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00N."),
    ("polyglot", "picture.png", b"\x89PNG\r\n\x1a\n" + zipped(**{"a.py": b"print()"})),
    ("broken-config", "config.json", b'{"model_type": "a", "model_type": "b"}'),
    ("broken-config", "adapter_config.json", b"{"),
    ("python-code", "modeling.py", b"import os\n"),
    ("python-code", "modeling.pyc", b"\xa7\x0d\x0d\x0a" + bytes(12)),
    ("notebook", "try.ipynb", b'{"cells": []}'),
    ("script", "setup.sh", b"true\n"),
    ("script", "setup", b"#!/bin/sh\ntrue\n"),
    ("hidden-file", ".env", b"A=1\n"),
    ("hidden-file", ".secret/notes.txt", b"x"),
    ("local-base", "adapter_config.json", b'{"base_model_name_or_path": "../models/mine"}'),
    ("local-base", "adapter_config.json", b'{"base_model_name_or_path": "https://host/x"}'),
]


@pytest.mark.parametrize(("rule", "name", "content"), FILES)
def test_a_file_that_should_be_found(tmp_path: Path, rule: str, name: str, content: bytes) -> None:
    adapter = make_adapter(tmp_path / "a")
    (adapter / name).parent.mkdir(exist_ok=True)
    (adapter / name).write_bytes(content)
    assert (rule, name) in found(adapter)
    expected = {item.id: item for item in scan_rules.RULES}[rule].severity
    report = at.scan(adapter)
    assert {p.severity for p in report.problems if p.kind == rule} == {expected}
    assert all(problem.remedy and problem.message for problem in report.problems)
    assert (rule in report.checked) == (expected == "warning")


# What no rule may find: (name, content).
HARMLESS: list[tuple[str, bytes]] = [
    (
        "README.md",
        b"# Card\n\n<html> and `x.__class__` and PK\x05\x06 in words, hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\n",
    ),
    ("README.md", b"<!DOCTYPE html>\n<p>made by a page</p>\n"),
    (
        "chat_template.jinja",
        b"{%- for m in messages %}{{ '<|' ~ m['role'] ~ '|>' + m.content | trim }}{% endfor %}",
    ),
    ("chat_template.jinja", b"the words __class__ and eval( outside; {# x.__class__ #}{{ bos_token }}"),
    ("tokenizer_config.json", b'{"chat_template": [{"name": "default", "template": "{{ messages[0]}}"}]}'),
    ("config.json", b'{"time_step_limit": [0.0, Infinity], "auto_map": null, "attn_implementation": "sdpa"}'),
    (
        "adapter_config.json",
        b'{"auto_mapping": {"parent_library": "transformers.models.llama.modeling_llama"}}',
    ),
    ("adapter_config.json", b'{"megatron_core": "megatron.core", "base_model_name_or_path": "owner/name"}'),
    ("modules.json", b'[{"type": "sentence_transformers.models.Transformer"}]'),
    ("model_index.json", b'{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "X"]}'),
    ("trainer_state.json", b'{"loss": NaN}'),
    ("values.npy", array("<f4")),
    ("values.npz", zipped(**{"a.npy": array("<f4")})),
    ("notes.txt", b"cat\nsat\non (the) mat.\n"),
    ("picture.png", b"\x89PNG\r\n\x1a\n" + bytes(40)),
    (".gitattributes", b"*.safetensors filter=lfs\n"),
    (".cache/huggingface/download/x.metadata", b"abc\n"),
]


@pytest.mark.parametrize(("name", "content"), HARMLESS)
def test_a_file_that_should_not_be_found(tmp_path: Path, name: str, content: bytes) -> None:
    adapter = make_adapter(tmp_path / "a")
    (adapter / name).parent.mkdir(exist_ok=True, parents=True)
    (adapter / name).write_bytes(content)
    assert found(adapter) == set()


def test_sound_folders_are_clean_and_every_rule_is_said_to_be_checked(tmp_path: Path) -> None:
    for folder in (make_adapter(tmp_path / "a"), make_base(tmp_path / "b")):
        report = at.scan(folder)
        assert report.ok
        assert report.findings == ()
        assert report.checked == tuple(rule.id for rule in scan_rules.RULES)
        assert report.exit_code == 0
        report.raise_for_problems()


def test_every_rule_has_a_test() -> None:
    elsewhere = {"special-file", "file-name", "broken-safetensors", "oversized", "symlink", "large-text"}
    assert {rule for rule, _, _ in FILES} | elsewhere == {rule.id for rule in scan_rules.RULES}
    assert len({rule.id for rule in scan_rules.RULES}) == len(scan_rules.RULES)


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda data: data + b"PK\x05\x06" + bytes(18), "trailing-data"),
        (lambda data: data.replace(b'"dtype": "F32"', b'"dtype": "F32", "dtype": "F32"', 1), "header"),
        (lambda data: data[:-1], "data-truncated"),
    ],
)
def test_weights_that_two_readers_would_understand_differently(
    tmp_path: Path, change: Callable[[bytes], bytes], kind: str
) -> None:
    adapter = make_adapter(tmp_path / "a")
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(change(weights.read_bytes()))
    problems = [p for p in at.scan(adapter).problems if p.kind == "broken-safetensors"]
    assert problems
    assert any(kind in p.message for p in problems)


def test_weights_under_another_kinds_bytes(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    (adapter / "adapter_model.safetensors").write_bytes(zipped(**{"x/data.pkl": b"\x80\x02N."}))
    kinds = {kind for kind, _ in found(adapter)}
    assert {"broken-safetensors", "disguised", "pickle"} <= kinds


def test_a_header_whose_length_reads_as_the_start_of_a_pickle_is_harmless(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    weights = adapter / "adapter_model.safetensors"
    data = weights.read_bytes()
    size = int.from_bytes(data[:8], "little")
    longer = 0x0280 + 0x10000  # the bytes 80 02
    text = data[8 : 8 + size] + b" " * (longer - size)
    weights.write_bytes(longer.to_bytes(8, "little") + text + data[8 + size :])
    assert weights.read_bytes()[:2] == b"\x80\x02"
    assert found(adapter) == set()


def test_what_git_lfs_left_out_could_not_be_looked_at(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    (adapter / "adapter_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    report = at.scan(adapter)
    assert report.exit_code == 10
    with pytest.raises(at.StoreError, match="git lfs pull"):
        report.raise_for_problems()


# --- names, links, sizes -------------------------------------------------------------------------


def test_links_pipes_and_names(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    (tmp_path / "outside.txt").write_text("x", encoding="utf-8")
    (adapter / "out.txt").symlink_to("../outside.txt")
    (adapter / "nowhere.txt").symlink_to("absent.txt")
    (adapter / "loop.txt").symlink_to("loop.txt")
    (adapter / "inside.json").symlink_to("adapter_config.json")
    os.mkfifo(adapter / "pipe")
    (adapter / "a\u202eb.txt").write_text("x", encoding="utf-8")
    (adapter / "Notes.md").write_text("x", encoding="utf-8")
    (adapter / "notes.md").write_text("x", encoding="utf-8")
    assert found(adapter) == {
        ("path-escape", "out.txt"),
        ("path-escape", "nowhere.txt"),
        ("path-escape", "loop.txt"),
        ("symlink", "inside.json"),
        ("special-file", "pipe"),
        ("file-name", "a\u202eb.txt"),
        ("file-name", "notes.md"),
    }


def test_a_snapshot_of_the_hub_cache_is_clean_and_its_content_is_looked_at(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    (adapter / "chat_template.jinja").write_text("{{ x.__class__ }}", encoding="utf-8")
    root = tmp_path / "models--owner--name"
    snapshot, blobs = root / "snapshots" / ("0" * 40), root / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in adapter.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert found(snapshot) == {("template-code", "chat_template.jinja")}


def test_too_much_of_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make_adapter(tmp_path / "a")
    with (adapter / "config.json").open("wb") as file:
        file.truncate((16 << 20) + 1)
    assert ("oversized", "config.json") in found(adapter)
    (adapter / "config.json").unlink()
    deep = adapter.joinpath(*["d"] * 18)
    deep.mkdir(parents=True)
    assert ("oversized", "d/" * 17) in found(adapter)
    monkeypatch.setattr(scan_files, "MAX_FILES", 1)
    assert {kind for kind, _ in found(adapter)} == {"oversized"}


def test_only_a_part_of_a_large_text_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make_adapter(tmp_path / "a")
    (adapter / "log.txt").write_text("x" * 100 + HUB_TOKEN, encoding="utf-8")
    monkeypatch.setattr("adapterhub_tools.ops.scan_file.MAX_TEXT_BYTES", 50)
    assert ("large-text", "log.txt") in found(adapter)


# --- reports -------------------------------------------------------------------------------------


@pytest.fixture
def leaking(tmp_path: Path) -> Path:
    adapter = make_adapter(tmp_path / "a")
    (adapter / "run.py").write_text(f"token = '{HUB_TOKEN}'\n", encoding="utf-8")
    # The secret stands also where other rules quote what they found.
    config = adapter_config(
        base_model_name_or_path=f"https://me:{HUB_TOKEN}@host/x",
        auto_mapping={"parent_library": HUB_TOKEN},
        auto_map={HUB_TOKEN: "x"},
    )
    write_json(adapter / "adapter_config.json", config)
    (adapter / "config.json").write_text(f'{{"{HUB_TOKEN}": 1, "{HUB_TOKEN}": 2}}', encoding="utf-8")
    return adapter


@pytest.mark.parametrize("form", ["text", "json", "junit", "sarif"])
def test_a_report_never_shows_a_secret(leaking: Path, form: str) -> None:
    result = CliRunner().invoke(cli, ["scan", str(leaking), "--format", form, "-v"])
    assert result.exit_code == 1
    assert "secret" in result.output
    assert HUB_TOKEN not in result.output
    assert HUB_TOKEN[:12] not in result.output
    report = at.scan(leaking)
    assert {"secret", "local-base", "foreign-import", "remote-code", "broken-config"} <= {
        p.kind for p in report.problems
    }
    with pytest.raises(at.AdapterError) as caught:
        report.raise_for_problems()
    assert HUB_TOKEN[:12] not in str(caught.value)


def test_sarif_has_the_line_and_the_rules_words(leaking: Path) -> None:
    result = CliRunner().invoke(cli, ["scan", str(leaking), "--format", "sarif"])
    (made,) = json.loads(result.output)["runs"]
    rules = {rule["id"]: rule for rule in made["tool"]["driver"]["rules"]}
    assert rules["secret"]["fullDescription"]["text"] == scan_rules.SECRET.finds
    assert rules["secret"]["help"]["text"] == scan_rules.SECRET.remedy
    (secret,) = [
        item
        for item in made["results"]
        if item["ruleId"] == "secret" and "run.py" in json.dumps(item["locations"])
    ]
    assert secret["level"] == "error"
    assert secret["locations"][0]["physicalLocation"]["region"]["startLine"] == 1


def test_ignored_rules_and_strict(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    (adapter / "run.py").write_text("x = 1\n", encoding="utf-8")
    (adapter / "optimizer.pt").write_bytes(b"\x80\x02N.")
    run = CliRunner().invoke
    assert run(cli, ["scan", str(adapter)]).exit_code == 1
    assert run(cli, ["scan", str(adapter), "--ignore", "pickle"]).exit_code == 0
    assert run(cli, ["scan", str(adapter), "--ignore", "pickle", "--strict"]).exit_code == 1
    assert run(cli, ["scan", str(adapter), "--ignore", "no-such"]).exit_code == 2
    report = at.scan(adapter, ignore=["pickle"], strict=True)
    assert report.skipped["pickle"] == "ignored"
    assert {p.kind for p in report.problems} == {"python-code"}
    with pytest.raises(at.UnsupportedError):
        report.raise_for_problems()
    with pytest.raises(ValueError, match="no-such"):
        at.scan(adapter, ignore=["no-such"])


def test_what_is_not_there_could_not_be_checked(tmp_path: Path) -> None:
    assert CliRunner().invoke(cli, ["scan", str(tmp_path / "absent")]).exit_code == 10
    assert at.scan(tmp_path / "absent").checked == ()


def test_one_file_can_be_scanned(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert found(tmp_path / "x.pt") == {("pickle", "x.pt"), ("pickle-code", "x.pt")}


def test_a_scan_loads_no_tensor_library(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    code = (
        "import sys, adapterhub_tools as at; at.scan(sys.argv[1]).raise_for_problems();"
        "assert not {'torch', 'numpy', 'jinja2', 'yaml'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(adapter)], check=True)


def test_the_table_in_the_docs_is_the_table_in_the_code() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "scan.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert rows == [f"| `{r.id}` | {r.severity} | {r.finds} | {r.remedy} |" for r in scan_rules.RULES]
