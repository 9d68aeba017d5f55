"""Every fault that is put in is found and explained, in merges of this tool and of others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import adapterhub_tools as at
from adapterhub_tools.model.receipt import RECEIPT_FILE
from tests.undo.models import make_adapter, make_base
from tests.verify.faults import FAULTS, HIDDEN, K0, Q0, Models

RANK = 6  # with 4, alpha/√rank would be the same as twice
DTYPES = ["bfloat16", "float16", "float32"]


def scene(folder: Path, *, dtype: str = "bfloat16", delta: float = 0.2, rslora: bool = False) -> Models:
    base = make_base(folder / "base", dtype=dtype, hidden=HIDDEN)
    adapter = make_adapter(folder / "adapter", hidden=HIDDEN, rank=RANK, delta=delta, use_rslora=rslora)
    at.merge(base, adapter, folder / "merged")
    return Models(folder)


def check(folder: Path, *, sample: str = "rows", **options: object) -> at.VerifyReport:
    return at.verify(
        base=folder / "base",
        adapter=folder / "adapter",
        merged=folder / "merged",
        sample=sample,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("own", [True, False], ids=["ours", "of another tool"])
def test_found_and_explained(tmp_path: Path, fault: str, dtype: str, rslora: bool, own: bool) -> None:
    models = scene(tmp_path, dtype=dtype, rslora=rslora)
    if not own:
        (tmp_path / "merged" / RECEIPT_FILE).unlink()
    assert check(tmp_path, seed=1).ok
    put, explanation = FAULTS[fault]
    put(models)
    models.save()
    for sample in ("rows", "full"):
        report = check(tmp_path, sample=sample, seed=2)
        assert report.exit_code == 1, report.summary
        text = " ".join(str(problem) for problem in report.problems)
        assert explanation in text, text
    assert not at.verify(merged=tmp_path / "merged", receipt=True).ok


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flips", [1, 5, 20])
def test_one_bit(tmp_path: Path, dtype: str, flips: int) -> None:
    """Any bit of any weight, in full mode; the weight is named."""
    models = scene(tmp_path, dtype=dtype)
    chooser = torch.Generator().manual_seed(flips)
    clean = models.now[Q0].clone()
    kind, width = (torch.int32, 32) if dtype == "float32" else (torch.int16, 16)
    for _ in range(flips):
        row, column, bit = (
            int(torch.randint(0, n, (1,), generator=chooser)) for n in (HIDDEN, HIDDEN, width - 1)
        )
        models.now[Q0] = clean.clone()
        models.now[Q0].view(kind)[row, column] ^= 1 << bit
        models.save()
        report = check(tmp_path, sample="full")
        assert report.exit_code == 1
        text = str(report.problems[0])
        assert f"[{row}, {column}] is" in text or "NaN" in text, text
        assert "one bit is flipped" in text or "NaN" in text, text


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_ulp_in_full_mode(tmp_path: Path, dtype: str) -> None:
    models = scene(tmp_path, dtype=dtype)
    models.now[Q0][7, 9] = torch.nextafter(
        models.now[Q0][7, 9], torch.tensor(9.0, dtype=models.now[Q0].dtype)
    )
    models.save()
    report = check(tmp_path, sample="full")
    assert report.exit_code == 1
    assert "1 single weights differ: [7, 9]" in str(report.problems[0])


def test_one_ulp_in_sampled_mode_has_the_stated_probability(tmp_path: Path) -> None:
    """2 of 128 rows are recomputed (1 %, rounded up): a single ulp is seen in about that share of runs."""
    models = scene(tmp_path)
    models.now[Q0][7, 9] = torch.nextafter(models.now[Q0][7, 9], torch.tensor(9.0, dtype=torch.bfloat16))
    models.save()
    runs = 200
    found = sum(not check(tmp_path, seed=seed, threads=1).ok for seed in range(runs))
    expected = runs * 2 / 128
    print(f"found in {found} of {runs} runs, {expected:.1f} expected")
    assert abs(found - expected) <= 5 * expected**0.5
    report = check(tmp_path, seed=next(s for s in range(runs) if check(tmp_path, seed=s, threads=1).ok))
    assert any("is not seen" in note for note in report.notes)


def test_an_untouched_tensor_is_compared_whole(tmp_path: Path) -> None:
    models = scene(tmp_path)
    models.now[K0].view(torch.int16)[63, 127] ^= 1
    models.save()
    report = check(tmp_path)
    assert "1 values differ, the first at [63, 127], by at most 1" in str(report.problems[0])


def test_another_base(tmp_path: Path) -> None:
    scene(tmp_path)
    other = make_base(tmp_path / "other", hidden=HIDDEN, seed=8)
    report = at.verify(base=other, adapter=tmp_path / "adapter", merged=tmp_path / "merged")
    assert {problem.kind for problem in report.problems} >= {"tensor", "other-base"}


def test_another_adapter_than_the_receipt_s(tmp_path: Path) -> None:
    scene(tmp_path)
    other = make_adapter(tmp_path / "other", hidden=HIDDEN, seed=8, delta=0.2)
    report = at.verify(base=tmp_path / "base", adapter=other, merged=tmp_path / "merged")
    kinds = {problem.kind for problem in report.problems}
    assert {"receipt-adapter", "every-target", "tensor"} <= kinds


def test_a_changed_config(tmp_path: Path) -> None:
    scene(tmp_path)
    path = tmp_path / "merged" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "hidden_size": 64}))
    report = check(tmp_path)
    assert [problem.loc for problem in report.errors] == ["/hidden_size"]
    assert [p.kind for p in at.verify(merged=tmp_path / "merged", receipt=True).problems] == [
        "file-digest",
        "config-digest",
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stale_and_a_truncated_shard(tmp_path: Path, dtype: str) -> None:
    base = make_base(tmp_path / "base", dtype=dtype, shards=3, hidden=HIDDEN)
    adapter = make_adapter(tmp_path / "adapter", hidden=HIDDEN, delta=0.2)
    at.merge(base, adapter, tmp_path / "merged")
    shard = next(
        path for path in sorted((tmp_path / "merged").glob("*.safetensors")) if Q0 in load_file(path)
    )
    good = shard.read_bytes()
    shard.write_bytes((base / shard.name).read_bytes())
    report = check(tmp_path)
    assert report.exit_code == 1
    assert "the adapter is not applied" in str(report.problems[0])
    for length in (0, 7, 100, len(good) - 1):
        shard.write_bytes(good[:length])
        for verdict in (check(tmp_path), at.verify(merged=tmp_path / "merged", receipt=True)):
            assert verdict.exit_code == 1
            assert shard.name in str(verdict.problems[0])
    shard.write_bytes(good)
    assert check(tmp_path).ok


@pytest.mark.parametrize("field", ["digest", "tensors", "side_files", "files", "config_digest"])
def test_an_edited_receipt(tmp_path: Path, field: str) -> None:
    scene(tmp_path)
    path = tmp_path / "merged" / RECEIPT_FILE
    receipt = json.loads(path.read_text())
    output = receipt["output"]
    if field == "tensors":
        output["tensors"][Q0]["digest"] = output["tensors"][K0]["digest"]
    elif field == "side_files":
        output["side_files"]["config.json"]["sha256"] = "0" * 64
    elif field == "files":
        output["files"]["model.safetensors"]["size"] += 1
    else:
        output[field] = output[field][:-1] + ("0" if output[field][-1] != "0" else "1")
    path.write_text(json.dumps(receipt))
    assert at.verify(merged=tmp_path / "merged", receipt=True).exit_code == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_undo_file_of_another_merge(tmp_path: Path, dtype: str) -> None:
    base = make_base(tmp_path / "base", dtype=dtype, hidden=HIDDEN)
    for name, seed in (("adapter", 1), ("other", 2)):
        adapter = make_adapter(tmp_path / name, hidden=HIDDEN, seed=seed)
        at.merge(base, adapter, tmp_path / f"merged-{name}", undo=True)
    assert at.verify(merged=tmp_path / "merged-adapter", receipt=True).ok
    (tmp_path / "merged-adapter" / "merge.undo").write_bytes(
        (tmp_path / "merged-other" / "merge.undo").read_bytes()
    )
    report = at.verify(merged=tmp_path / "merged-adapter", receipt=True)
    assert [(p.kind, p.file) for p in report.problems] == [("file-digest", "merge.undo")]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sample", ["rows", "full"])
def test_cuda_gives_the_verdicts_of_the_cpu(tmp_path: Path, dtype: str, sample: str) -> None:
    models = scene(tmp_path, dtype=dtype)
    for fault in (None, *FAULTS):
        if fault is not None:
            models = Models(tmp_path)
            FAULTS[fault][0](models)
            models.save()
        reports = [check(tmp_path, sample=sample, seed=3, device=device) for device in ("cpu", "cuda")]
        assert reports[0].tensors == reports[1].tensors
        assert reports[1].device == torch.cuda.get_device_name()
        if fault is not None:
            at.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", replace=True)


def test_the_command_line(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from adapterhub_tools.cli.main import cli

    models = scene(tmp_path)
    names = [str(tmp_path / name) for name in ("base", "adapter", "merged")]
    result = CliRunner().invoke(cli, ["verify", *names])
    assert result.exit_code == 0, result.output
    assert "verified: 9 tensors on sampled rows and probes on cpu" in result.output
    result = CliRunner().invoke(cli, ["verify", names[2], "--receipt"])
    assert result.exit_code == 0, result.output
    FAULTS["merged twice"][0](models)
    models.save()
    assert CliRunner().invoke(cli, ["verify", *names]).exit_code == 1
    assert CliRunner().invoke(cli, ["verify", names[2], "--receipt"]).exit_code == 1
    assert CliRunner().invoke(cli, ["verify", names[2]]).exit_code == 2
    assert CliRunner().invoke(cli, ["verify", names[0], str(tmp_path / "no"), names[2]]).exit_code == 10
    result = CliRunner().invoke(cli, ["verify", names[0], str(tmp_path / "no"), names[2], "--json"])
    assert result.exit_code == json.loads(result.stdout)["exit_code"] == 10
