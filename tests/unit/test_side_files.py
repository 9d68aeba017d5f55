"""Which files go with a merged model."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub_tools.store.side_files import classify, is_tokenizer_file, side_file_names

COPIED = [
    "config.json",
    "configuration.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "qwen.tiktoken",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "normalizer.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "additional_chat_templates/tool_use.jinja",
    "LICENSE",
    "LICENSE.txt",
    "license.md",
    "LICENCE",
    "COPYING",
    "NOTICE",
    "Notice.txt",
    "USE_POLICY.md",
    "LICENSE-MODEL",
]

LEFT = [
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "adapter_model.safetensors",
    "model.gguf",
    "model.onnx",
    "tf_model.h5",
    "flax_model.msgpack",
    "rust_model.ot",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "model.pt",
    "model.pth",
    "x.ckpt",
    "x.pkl",
    "training_args.bin",
    "optimizer.pt",
    "modeling_custom.py",
    "run.sh",
    "notebook.ipynb",
    "lib.so",
    "archive.zip",
    "archive.tar.gz",
    "x.7z",
    "adapter_config.json",
    "adapter_manifest.json",
    "merge_receipt.json",
    "model.sig",
    "x.sigstore",
    "README.md",
    "readme.txt",
    ".gitattributes",
    ".gitignore",
    "quantize_config.json",
    "trainer_state.json",
    "all_results.json",
    "params.json",
    "data_config.json",
    "unknown",
    "tokenizer.json.bak",
    "xconfig.json",
    "config.json.orig",
    "1_Pooling/model.safetensors",
]


def fill(root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"{}")


@pytest.mark.parametrize("name", COPIED)
def test_copied(tmp_path: Path, name: str) -> None:
    fill(tmp_path, [name])
    found = classify(tmp_path)
    assert (found.copy, found.left) == ((name,), ())


@pytest.mark.parametrize("name", LEFT)
def test_left_behind_with_a_reason(tmp_path: Path, name: str) -> None:
    fill(tmp_path, [name])
    found = classify(tmp_path)
    assert found.copy == ()
    assert [left for left, _ in found.left] == [name]
    assert all(reason for _, reason in found.left)


def test_every_name_is_in_one_of_the_two(tmp_path: Path) -> None:
    names = [*COPIED, *LEFT]
    fill(tmp_path, names)
    found = classify(tmp_path)
    assert found.copy == tuple(sorted(COPIED))
    assert {*found.copy, *(name for name, _ in found.left)} == set(names) == set(side_file_names(tmp_path))


def test_folders_stay(tmp_path: Path) -> None:
    fill(tmp_path, ["runs/x", "onnx/config.json", "config.json/x", "LICENSE/x"])
    found = classify(tmp_path)
    assert found.copy == ()
    assert dict(found.left) == {
        "LICENSE/": "a folder",
        "config.json/": "a folder",
        "onnx/": "a folder",
        "runs/": "belongs to a training run",
    }


def test_some_names_only(tmp_path: Path) -> None:
    fill(tmp_path, ["config.json", "vocab.txt", "x"])
    assert classify(tmp_path, ["vocab.txt"]).copy == ("vocab.txt",)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x80\x04x", "it is a Python pickle"),
        (b"PK\x03\x04", "it is a ZIP archive, such as a PyTorch checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer in place of the file"),
    ],
)
def test_what_only_bears_the_name(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    assert classify(tmp_path).left == (("tokenizer.model", reason),)


def test_links(tmp_path: Path) -> None:
    """Inside the folder, or inside the blobs of its Hub repository, they are followed; others stay."""
    root = tmp_path / "models--o--n" / "snapshots" / "rev"
    fill(tmp_path / "models--o--n" / "blobs", ["f00"])
    fill(tmp_path, ["secret"])
    fill(root, ["vocab.txt"])
    (root / "config.json").symlink_to("../../blobs/f00")
    (root / "merges.txt").symlink_to("vocab.txt")
    (root / "tokenizer.json").symlink_to("../../../secret")
    (root / "added_tokens.json").symlink_to("nowhere")
    (root / "vocab.json").symlink_to("vocab.json")
    found = classify(root)
    assert found.copy == ("config.json", "merges.txt", "vocab.txt")
    assert [name for name, _ in found.left] == ["added_tokens.json", "tokenizer.json", "vocab.json"]
    reasons = dict(found.left)
    assert reasons["added_tokens.json"] == "a symbolic link to nothing"
    assert "out of its folder" in reasons["tokenizer.json"]
    assert "back to itself" in reasons["vocab.json"]


def test_tokenizer_files() -> None:
    yes = [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "vocab.txt",
        "spiece.model",
        "merges.txt",
    ]
    no = ["config.json", "LICENSE", "adapter_config.json", "generation_config.json", "model.safetensors"]
    assert [is_tokenizer_file(name) for name in yes + no] == [True] * len(yes) + [False] * len(no)
