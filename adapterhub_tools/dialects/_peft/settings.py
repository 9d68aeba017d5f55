"""Rank, alpha and scaling of every LoRA module: PEFT's patterns resolved, and impossible values found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapterhub_tools.dialects._peft.patterns import key_matches
from adapterhub_tools.errors import FormatError, Problem, escape

MAX_ALPHA = 1e6
"""A larger alpha is taken for damage: at rank 1 it would scale the delta a million times."""

DEFAULT_RANK = 8
DEFAULT_ALPHA = 8


class Settings:
    """Rank, alpha and scaling of every module, patterns resolved.

    Attributes:
        ranks: module path -> rank by the config.
        alphas: module path -> alpha by the config, as the JSON number it is.
        problems: values and patterns that cannot be.
        notes: defaults that were filled in.
    """

    def __init__(self, config: Mapping[str, Any], paths: Sequence[str], file: str) -> None:
        """Resolves the patterns for the given module paths.

        Args:
            config: the adapter's config; empty if there is none.
            paths: the paths of all modules.
            file: the config file, for messages.
        """
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.file = file
        self.known = bool(config)
        self.rslora = config.get("use_rslora") is True
        self.fan_in_fan_out = config.get("fan_in_fan_out") is True
        self.blocks = isinstance(config.get("use_bdlora"), dict)
        self.enable_lora = config.get("enable_lora")
        self.merged_linear = bool(self.enable_lora)
        self.lora_bias = config.get("lora_bias") is True
        self.dora = config.get("use_dora") is True
        self.kasa = isinstance(config.get("kasa_config"), dict)
        rank = config.get("r")
        alpha = config.get("lora_alpha")
        for name, default in (("r", DEFAULT_RANK), ("lora_alpha", DEFAULT_ALPHA)):
            if config.get(name) is None and paths and config:
                self.notes.append(f'"{name}" is absent from {file}; PEFT\'s default {default} applies.')
        self.ranks = self._resolve(config, "rank_pattern", DEFAULT_RANK if rank is None else rank, paths)
        self.alphas = self._resolve(config, "alpha_pattern", DEFAULT_ALPHA if alpha is None else alpha, paths)
        self._check_values()

    def _resolve(
        self, config: Mapping[str, Any], name: str, default: Any, paths: Sequence[str]
    ) -> dict[str, Any]:
        pattern = config.get(name)
        if not isinstance(pattern, dict) or not pattern:
            return dict.fromkeys(paths or [""], default)
        keys = list(pattern)
        try:
            found = key_matches(keys, paths, file=self.file, loc=name)
        except FormatError as error:
            self.problems.extend(error.problems)
            return dict.fromkeys(paths, default)
        if name == "alpha_pattern":
            self._report_order(pattern, keys, dict(zip(paths, found, strict=True)))
        # PEFT looks up the path itself where no pattern matches, so a key may also be a literal path.
        return {
            path: pattern[keys[hits[0]]] if hits else pattern.get(path, default)
            for path, hits in zip(paths, found, strict=True)
        }

    def _report_order(
        self, pattern: Mapping[str, Any], keys: list[str], found: Mapping[str, list[int]]
    ) -> None:
        """Warns where the order of alphas decides: saving sorts the keys, so it may be another."""
        if keys != sorted(keys):
            return
        for path, hits in found.items():
            values = [pattern[keys[i]] for i in hits]
            if any(value != values[0] for value in values):
                message = (
                    f'{len(hits)} keys give different alphas for "{escape(path)}", for example '
                    f'"{escape(keys[hits[0]])}": {values[0]}, which comes first and counts, as in PEFT; '
                    "saving sorted the keys, so another may have come first in training."
                )
                remedy = (
                    'Compare with the training script; make the keys of "alpha_pattern" exclude each other.'
                )
                self.problems.append(
                    Problem(
                        kind="pattern-order",
                        message=message,
                        file=self.file,
                        loc="alpha_pattern",
                        remedy=remedy,
                        severity="warning",
                    )
                )
                return

    def _check_values(self) -> None:
        for rank in sorted({r for r in self.ranks.values() if isinstance(r, int) and r <= 0}):
            where = next(path for path, r in self.ranks.items() if r == rank)
            remedy = f'Correct "r" or "rank_pattern" in {self.file}.'
            self.problems.append(
                Problem(
                    kind="rank",
                    message=f"rank {rank}{_for(where)}; expected at least 1.",
                    file=self.file,
                    loc="r",
                    remedy=remedy,
                )
            )
        bad = {a for a in self.alphas.values() if isinstance(a, (int, float)) and not _good_alpha(a)}
        for alpha in sorted(bad, key=repr):
            where = next(path for path, a in self.alphas.items() if a is alpha or a == alpha)
            message = (
                f"lora_alpha {escape(alpha)}{_for(where)}; expected a number above 0 and up to {MAX_ALPHA:g}."
            )
            remedy = f'Correct "lora_alpha" or "alpha_pattern" in {self.file}.'
            self.problems.append(
                Problem(kind="scale", message=message, file=self.file, loc="lora_alpha", remedy=remedy)
            )

    def of(self, path: str, rank: int | None) -> dict[str, Any]:
        """Returns a module's hyperparameters; the rank is that of the tensors where they tell it."""
        hparams: dict[str, Any] = {"rank": self.ranks.get(path) if rank is None else rank}
        if self.known:
            hparams["alpha"] = self.alphas.get(path)
            hparams["scaling"] = "alpha/sqrt(rank)" if self.rslora else "alpha/rank"
        return hparams


def _for(path: str) -> str:
    return f' for "{escape(path)}"' if path else ""


def _good_alpha(alpha: float) -> bool:
    return 0 < alpha <= MAX_ALPHA  # false for NaN and infinity
