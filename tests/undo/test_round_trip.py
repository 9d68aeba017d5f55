"""merge --undo, then unmerge: the base's folder again, file by file the same bytes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import adapterhub_tools as at
from adapterhub_tools.model.undo import UNDO_FILE
from tests.undo.models import VOCAB, files_of, make_adapter, make_base


def round_trip(folder: Path, base: Path, *adapters: Path, **options: object) -> at.MergeReport:
    """Merges with undo, undoes it, and compares the folders; returns what the merge reports."""
    before = files_of(base)
    report = at.merge(base, adapters, folder / "merged", undo=True, threads=1, **options)  # type: ignore[arg-type]
    undone = at.unmerge(folder / "merged", folder / "undone", adapter=adapters, threads=1)
    assert files_of(folder / "undone") == before
    assert undone.exact
    assert undone.digest == at.content_digest(base, cache=False).digest
    return report


@given(
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    factors=st.sampled_from(["float32", "bfloat16", "float16"]),
    delta=st.sampled_from([0.0, 1e-4, 0.01, 0.05, 0.2, 3.0]),
    seed=st.integers(0, 10**6),
    shards=st.integers(1, 3),
    rslora=st.booleans(),
    scale=st.sampled_from([1.0, 0.3, -1.7]),
    specials=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_lora(
    dtype: str, factors: str, delta: float, seed: int, shards: int, rslora: bool, scale: float, specials: bool
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = make_base(folder / "base", dtype=dtype, seed=seed, shards=shards, specials=specials)
        adapter = make_adapter(
            folder / "adapter", delta=delta, seed=seed + 1, dtype=factors, use_rslora=rslora
        )
        round_trip(folder, base, adapter, scale=scale)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_a_base_written_in_another_dtype(tmp_path: Path, dtype: str) -> None:
    """Where the output is narrower, the base's own bits are stored."""
    base = make_base(tmp_path / "base", dtype="float32")
    round_trip(tmp_path, base, make_adapter(tmp_path / "adapter"), dtype=dtype)


def test_a_cast_base_with_values_that_are_not_finite(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = make_base(tmp_path / "base", dtype="float32")
    tensors = load_file(base / "model.safetensors")
    norm = tensors["model.norm.weight"]
    norm[0], norm[1], norm[2] = float("nan"), float("inf"), 3e38
    norm[3:4].view(torch.int32)[0] = 0x7FC0_1234
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    round_trip(tmp_path, base, make_adapter(tmp_path / "adapter"), dtype="bfloat16")


def test_several_adapters_at_once(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    one = make_adapter(tmp_path / "one")
    two = make_adapter(tmp_path / "two", seed=5, targets=("v_proj", "k_proj"))
    before = files_of(base)
    at.merge(base, [one, two], tmp_path / "merged", scale=[0.5, 2.0], undo=True)
    at.unmerge(tmp_path / "merged", tmp_path / "undone", adapter=[two, one])
    assert files_of(tmp_path / "undone") == before


def test_untied_embeddings(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=True)
    report = round_trip(tmp_path, base, make_adapter(tmp_path / "adapter", head=True))
    assert report.tensors == 9
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert merged["tie_word_embeddings"] is False


def test_full_tensors(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    saved = {"lm_head": torch.randn(VOCAB, 32, generator=torch.Generator().manual_seed(3))}
    report = round_trip(tmp_path, base, make_adapter(tmp_path / "adapter", saved=saved))
    assert report.receipt is not None
    assert [t.name for t in report.receipt.tensors if t.action == "replace"] == ["lm_head.weight"]


def test_a_grown_vocabulary(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    generator = torch.Generator().manual_seed(3)
    saved = {
        name: torch.randn(VOCAB + 5, 32, generator=generator) for name in ("model.embed_tokens", "lm_head")
    }
    round_trip(tmp_path, base, make_adapter(tmp_path / "adapter", saved=saved))
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert merged["vocab_size"] == VOCAB + 5


def test_an_adapter_s_tokenizer(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter")
    (adapter / "tokenizer.json").write_text('{"version": "2.0"}')
    (adapter / "vocab.json").write_text("{}")
    round_trip(tmp_path, base, adapter, adapter_tokenizer=True)
    assert (tmp_path / "merged" / "vocab.json").exists()
    assert not (tmp_path / "undone" / "vocab.json").exists()


def test_merges_on_top_of_each_other(tmp_path: Path) -> None:
    """Each step back gives the folder before it, receipt and undo file included."""
    base = make_base(tmp_path / "0", shards=2)
    adapters = [make_adapter(tmp_path / f"adapter{i}", seed=i, delta=0.1) for i in range(1, 4)]
    for i, adapter in enumerate(adapters):
        at.merge(tmp_path / str(i), adapter, tmp_path / str(i + 1), undo=True)
    assert base == tmp_path / "0"
    at.unmerge(tmp_path / "3", tmp_path / "back2", adapter=adapters[2])
    at.unmerge(tmp_path / "back2", tmp_path / "back1", adapter=adapters[1])
    at.unmerge(tmp_path / "back1", tmp_path / "back0", adapter=adapters[0])
    for i in range(3):
        assert files_of(tmp_path / f"back{i}") == files_of(tmp_path / str(i))


def test_a_single_file_without_a_config(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    for path in base.iterdir():
        if path.name != "model.safetensors":
            path.unlink()
    round_trip(tmp_path, base, make_adapter(tmp_path / "adapter"))


def test_what_did_not_go_along_is_named(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter")
    (base / "README.md").write_text("# A base\n")
    at.merge(base, adapter, tmp_path / "merged", undo=True)
    undone = at.unmerge(tmp_path / "merged", tmp_path / "undone", adapter=adapter)
    assert undone.notes == ("does not come back: README.md",)


def test_the_bytes_do_not_depend_on_threads(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", shards=3)
    adapter = make_adapter(tmp_path / "adapter", delta=0.3)
    for threads in (1, 4):
        at.merge(base, adapter, tmp_path / str(threads), undo=True, threads=threads)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "4")
    at.unmerge(tmp_path / "1", tmp_path / "undone", adapter=adapter, threads=3)
    assert files_of(tmp_path / "undone") == files_of(base)


def test_a_plain_merge_writes_the_same_without_it(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    at.merge(base, adapter, tmp_path / "plain")
    at.merge(base, adapter, tmp_path / "undo", undo=True)
    plain, undo = files_of(tmp_path / "plain"), files_of(tmp_path / "undo")
    assert set(undo) - set(plain) == {UNDO_FILE}
    assert [name for name in plain if plain[name] != undo[name]] == ["merge_receipt.json"]


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    at.merge(base, adapter, tmp_path / "merged", undo=True)
    report = at.unmerge(tmp_path / "merged", tmp_path / "undone", adapter=adapter, dry_run=True)
    assert (report.restored, report.tensors) == (4, 9)
    assert not (tmp_path / "undone").exists()


def test_unmerge_does_not_change_its_inputs(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    at.merge(base, adapter, tmp_path / "merged", undo=True)
    before = files_of(tmp_path / "merged"), files_of(adapter)
    at.unmerge(tmp_path / "merged", tmp_path / "undone", adapter=adapter)
    assert (files_of(tmp_path / "merged"), files_of(adapter)) == before
