"""Several changes of one tensor, by one adapter or by two: right, or refused before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import adapterhub_tools as at
from tests.parity.models import llama
from tests.parity.oracle import Case, adapt, check_parity, lora, refused, stored

ROWS = [3, 1]


def resized(rows: int) -> Any:
    def prepare(model: Any) -> None:
        model.resize_token_embeddings(rows, mean_resizing=False)

    return prepare


def tied() -> Any:
    return llama(tied=True)


ALONE = {"save_embedding_layers": False}
EMBED = Case(build=llama, config=lambda: lora(target_modules=["embed_tokens"]), save=ALONE)
HEAD = Case(build=llama, config=lambda: lora(target_modules=["lm_head"]), save=ALONE, seed=7)
TOKENS = Case(build=llama, config=lambda: lora(trainable_token_indices=ROWS), seed=5)
SHRUNK = Case(
    build=llama,
    config=lambda: lora(modules_to_save=["embed_tokens", "lm_head"]),
    prepare=resized(80),
    rows=80,
    seed=9,
)
TRAINED_LAST = Case(build=llama, config=lambda: lora(trainable_token_indices=[90, 1]))


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        (TRAINED_LAST, SHRUNK, "rows"),
        (EMBED, SHRUNK, "shape"),
        (HEAD, SHRUNK, "shape"),
        (EMBED, TOKENS, "rows"),
    ],
    ids=["a row beyond the end", "embedding", "head", "rows and delta"],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_two_adapters_that_do_not_fit_each_other(
    first: Case, second: Case, kind: str, swapped: bool, tmp_path: Path
) -> None:
    one, two = adapt(first, tmp_path / "1"), adapt(second, tmp_path / "2")
    adapters = [two.adapter, one.adapter] if swapped else [one.adapter, two.adapter]
    for dry_run in (True, False):
        with pytest.raises(at.MismatchError) as caught:
            at.merge(one.base, adapters, tmp_path / "out", dry_run=dry_run, accept_embeddings=True)
        assert kind in {problem.kind for problem in caught.value.problems}
    assert not (tmp_path / "out").exists()


def test_trained_rows_of_a_tied_embedding_below_a_delta_of_the_head_are_refused(tmp_path: Path) -> None:
    case = Case(
        build=tied, config=lambda: lora(target_modules=["lm_head"], trainable_token_indices=ROWS), size=0.1
    )
    adapted = adapt(case, tmp_path)
    refused(at.UnsupportedError, "tied-unsupported", adapted.base, adapted.adapter, tmp_path / "out")


def test_a_resized_tied_embedding_with_a_delta_starts_the_head_too(tmp_path: Path) -> None:
    case = Case(
        build=tied,
        config=lambda: lora(target_modules=["embed_tokens"]),
        prepare=resized(104),
        rows=104,
    )
    _, out = check_parity(case, tmp_path, reference_is_right=False)
    assert stored(out)["lm_head.weight"].shape[0] == 104


def test_two_adapters_that_each_carry_the_same_untouched_head_are_summed(tmp_path: Path) -> None:
    ranks = (2, 3)
    one, two = (
        adapt(
            Case(build=llama, config=lambda r=r: lora(target_modules=["lm_head"], r=r), seed=r),
            tmp_path,
            str(r),
        )
        for r in ranks
    )
    at.merge(one.base, [one.adapter, two.adapter], tmp_path / "both")
    at.merge(one.base, one.adapter, tmp_path / "first", dtype="float64")
    at.merge(one.base, two.adapter, tmp_path / "second", dtype="float64")
    base = stored(one.base)["lm_head.weight"].double()
    deltas = [stored(tmp_path / name)["lm_head.weight"] - base for name in ("first", "second")]
    found = stored(tmp_path / "both")["lm_head.weight"].double()
    torch.testing.assert_close(found, base + deltas[0] + deltas[1], rtol=1e-6, atol=1e-8)


def test_changed_counts_what_has_other_bytes(tmp_path: Path) -> None:
    adapted = adapt(Case(build=llama, config=lora), tmp_path)
    full = at.merge(adapted.base, adapted.adapter, tmp_path / "out")
    none = at.merge(adapted.base, adapted.adapter, tmp_path / "none", scale=0.0)
    assert full.changed == full.expected > 0
    assert (none.changed, none.expected) == (0, full.expected)
    assert none.digest == none.base_digest
