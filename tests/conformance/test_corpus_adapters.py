"""Every real adapter of the corpus is described, or refused with a reason; none gives a traceback.

The corpus is a folder of files from public repositories, beside this repository or at $ADAPTERTOOL_CORPUS. It
is not part of the project, so these tests are skipped where it is absent.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

import adapterhub_tools as at

ROOT = Path(__file__).resolve().parents[2]
CORPUS = Path(os.environ.get("ADAPTERTOOL_CORPUS", ROOT.parent / "shared" / "corpus")) / "adapters"
WEIGHTS = {".safetensors", ".bin", ".npz"}

pytestmark = pytest.mark.skipif(not CORPUS.is_dir(), reason="the corpus of real adapters is not here")

# What is known of single folders, from reading them: (folder, class of the refusal, a part of the reason).
REFUSED = (
    ("Hirvita6__LoRA-flower-diffusion/lora_weights", at.FormatError, "2 bytes"),
    ("Srikanth1408__Stable_Diffusion-Hackathon", at.FormatError, "ends at byte"),
    ("wellCh4n__pokemon-diffusers", at.UnsupportedError, "naming scheme"),
)
NOT_MERGEABLE = (
    ("AnHu2410__MD_crosslingual/adapter", "layers of its own"),
    ("ekgus9__Legal_Domain_PEFT/final_adapter", "layers of its own"),
    ("D-Yurtaev__test-generation/final_model", "rank"),
    ("Kuntya__Udacity/trainer_peft", "modules_to_save.lora_A"),
)


def folders() -> list[Path]:
    return sorted({file.parent for file in CORPUS.rglob("*") if file.suffix in WEIGHTS})


def outcome_of(path: Path) -> tuple[str, tuple[at.Problem, ...]]:
    """What inspect makes of a path: how it is described, or the class of the refusal and its problems."""
    try:
        report = at.inspect(path).to_json()
    except at.AdapterError as error:
        return type(error).__name__, error.problems
    return ("described, mergeable" if report["mergeable"] else "described, not mergeable"), ()


def test_every_adapter_is_described_or_refused_with_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes: Counter[str] = Counter()
    assert len(folders()) >= 30
    for folder in folders():
        for path in (folder, *sorted(folder.glob("*.safetensors"))):
            outcome, problems = outcome_of(path)
            outcomes[outcome] += 1
            assert all(problem.message and problem.kind and problem.remedy for problem in problems), path
    with capsys.disabled():
        print(f"\ncorpus adapters: {dict(sorted(outcomes.items()))}")
    assert outcomes["described, mergeable"] >= 10


@pytest.mark.parametrize(("folder", "error", "reason"), REFUSED)
def test_broken_and_foreign_files_are_refused_by_name(
    folder: str, error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        at.inspect(CORPUS / folder)


@pytest.mark.parametrize(("folder", "reason"), NOT_MERGEABLE)
def test_oddities_are_found(folder: str, reason: str) -> None:
    report = at.validate(CORPUS / folder)
    assert not report.ok
    assert any(reason in str(problem) for problem in report.problems)


def test_every_adapter_can_be_validated(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes: Counter[str] = Counter()
    for folder in folders():
        report = at.validate(folder)
        outcomes["valid" if report.ok else "invalid"] += 1
        assert report.ok or all(p.message and p.kind for p in report.problems), folder
    with capsys.disabled():
        print(f"\ncorpus adapters validated: {dict(outcomes)}")
    assert outcomes["valid"] >= 10
