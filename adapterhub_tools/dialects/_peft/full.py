"""Tensors that a PEFT adapter carries in full, each allowed only where the config says so."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from adapterhub_tools.architectures import embedding_names
from adapterhub_tools.dialects._peft.declared import TASK_HEADS, from_config
from adapterhub_tools.dialects._peft.keys import without_base_layer
from adapterhub_tools.dialects._peft.targets import TargetRule
from adapterhub_tools.errors import Problem, escape
from adapterhub_tools.model.adapter import FullTensor
from adapterhub_tools.model.tensor import FLOAT_DTYPES, TensorSpec

_PEFT_EMBEDDINGS = ("embed_tokens", "lm_head")
"""Names that make PEFT save the embeddings whole when ``target_modules`` has them."""

_TOKEN_DELTA = ".token_adapter.trainable_tokens_delta"
_TOKEN_BASE = ".token_adapter.base_layer"
_ACCEPT = (
    "Pass --accept-embeddings if the adapter was trained with a grown vocabulary or saved so on purpose."
)


class FullTensors:
    """Sorts the tensors that are no factors.

    Attributes:
        full: what was allowed, or only needs a flag, ordered by target.
        problems: everything else.
        notes: what was resolved by rule.
        copies: stored names of untouched copies of the base that wrappers saved.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        rule: TargetRule,
        modules: Collection[str],
        *,
        file: str,
        names: Collection[str] = (),
    ) -> None:
        """Prepares the rules of one adapter.

        Args:
            config: the adapter's config.
            rule: its target rule.
            modules: paths of the modules that have factors.
            file: the tensors' file, for messages.
            names: adapter names that stand in keys.
        """
        self._config, self._rule, self._modules, self._file = config, rule, modules, file
        self._names = {"default", *names}
        self._declared = from_config(config)
        self._listed = rule.modules_to_save
        self._embeddings = embedding_names()
        self._tied = config.get("ensure_weight_tying") is True and any(
            self._is_embedding(name) for name in rule.modules_to_save
        )
        self._hit: set[str] = set()
        self.full: list[FullTensor] = []
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.copies: list[str] = []

    def add(self, rest: Mapping[str, TensorSpec]) -> None:
        """Sorts the tensors of ``keys.split``'s rest, then checks that nothing declared is missing."""
        for key, spec in sorted(rest.items()):
            self._add(key, spec, rest)
        self._check_declared()
        self.full.sort(key=lambda f: (f.target, f.role))
        seen: dict[tuple[str, bool], FullTensor] = {}
        for item in self.full:
            slot = (item.target, item.role == "token_rows")
            if slot in seen:
                message = f'"{escape(seen[slot].tensor.name)}" and this both replace "{escape(item.target)}".'
                self._problem("duplicate-key", message, item.tensor, "Remove one of them.")
            seen[slot] = item

    def _add(self, key: str, spec: TensorSpec, rest: Mapping[str, TensorSpec]) -> None:
        if key.endswith(_TOKEN_DELTA) or f"{_TOKEN_DELTA}." in key:
            self._token_rows(key.partition(_TOKEN_DELTA)[0], spec)
            return
        owner, wrapper, inner = _wrapped(key, self._names)
        if wrapper == "original_module":
            self._original(owner, inner, spec, rest)
            return
        target = f"{owner}.{inner}" if wrapper else key
        path, _, leaf = target.rpartition(".")
        if wrapper and target in rest:
            # bias="all" and saved embeddings write such a tensor twice; PEFT reads the one without wrapper.
            self.copies.append(spec.name)
            return
        saved = self._declared.saved_entries(path)
        if saved:
            self._hit.update(saved)
            self._keep(without_base_layer(target), "modules_to_save", spec)
        elif wrapper == "modules_to_save":
            self._refuse(key, spec)
        elif leaf == "bias" and self._bias_allowed(path):
            self._keep(f"{path.removesuffix('.base_layer')}.bias", "bias", spec, floating=True)
        elif self._tied and self._is_embedding(path):
            self.notes.append(f'"{escape(target)}" is replaced because it is tied ("ensure_weight_tying").')
            self._keep(without_base_layer(target), "modules_to_save", spec, floating=True)
        elif leaf in ("weight", "bias") and self._is_embedding(path):
            self._embedding(path, leaf, spec)
        elif (
            leaf == "weight" and path.endswith(_TOKEN_BASE) and self._is_embedding(path[: -len(_TOKEN_BASE)])
        ):
            self._embedding(path[: -len(_TOKEN_BASE)], leaf, spec)
        else:
            self._refuse(key, spec)

    def _bias_allowed(self, path: str) -> bool:
        if self._declared.bias == "all":
            return True
        return self._declared.bias == "targets" and path.removesuffix(".base_layer") in self._modules

    def _is_embedding(self, path: str) -> bool:
        return path.removesuffix(".base_layer").rpartition(".")[2] in self._embeddings

    def _embedding(self, path: str, leaf: str, spec: TensorSpec) -> None:
        """Keeps a saved embedding; without the config's word it needs the user's."""
        module = path.removesuffix(".base_layer")
        self._keep(f"{module}.{leaf}", "saved_embedding", spec, floating=True)
        if path.endswith(".base_layer") and self._targets_embeddings(module):
            return
        message = (
            f'the file carries the embedding "{escape(module)}" in full, and the config does not say that it '
            "was trained or resized."
        )
        self._problem("saved-embedding", message, spec, _ACCEPT)

    def _targets_embeddings(self, module: str) -> bool:
        """Tells whether the config makes PEFT save this embedding: a target, with a name PEFT looks for."""
        targets = self._rule.target_modules
        if isinstance(targets, str):
            named = module.rpartition(".")[2] in _PEFT_EMBEDDINGS
        else:
            named = any(name in (targets or ()) for name in _PEFT_EMBEDDINGS)
        return named and not self._rule.needs_base and module in self._modules

    def _token_rows(self, module: str, spec: TensorSpec) -> None:
        """Keeps trained token rows: their indices stand in the config only."""
        indices = self._config.get("trainable_token_indices")
        remedy = f'Correct "trainable_token_indices" in {self._rule.file}, or save the adapter again.'
        if isinstance(indices, dict):
            names = [name for name in indices if module.endswith(name)]
            indices = indices[names[0]] if len(names) == 1 else None
            if len(names) == 1:
                self._hit.add(f"tokens:{names[0]}")
        elif indices is not None:
            self._hit.add("tokens:")
        if not isinstance(indices, list):
            message = f'trained token rows for "{escape(module)}", for which the config gives no indices.'
            self._problem("token-rows", message, spec, remedy)
            return
        rows = tuple(i for i in indices if isinstance(i, int) and i >= 0)
        if len(rows) != len(indices) or len(set(rows)) != len(rows):
            self._problem("token-rows", "the token indices hold a negative or repeated number.", spec, remedy)
        if len(spec.shape) != 2 or spec.shape[0] != len(indices):
            message = (
                f"trained token rows have shape {list(spec.shape)}; the config gives {len(indices)} indices."
            )
            self._problem("token-rows", message, spec, remedy)
        self._keep(f"{module}.weight", "token_rows", spec, rows=rows, floating=True)

    def _original(self, owner: str, inner: str, spec: TensorSpec, rest: Mapping[str, TensorSpec]) -> None:
        """Sets an untouched copy of the base aside if the trained tensor stands beside it."""
        trained = f"{owner}.modules_to_save."
        if (
            any(key.startswith(trained) and key.endswith(f".{inner}") for key in rest)
            or f"{owner}.{inner}" in rest
        ):
            self.copies.append(spec.name)
            return
        message = "a wrapper's copy of the base, without the trained tensor that should stand beside it."
        self._problem("unknown-key", message, spec, "The file is incomplete; save the adapter again.")

    def _refuse(self, key: str, spec: TensorSpec) -> None:
        if any(part.startswith("lora_") for part in key.split(".")):
            message = "no known kind of LoRA tensor; PEFT 0.21 writes none with this name."
            self._problem("unknown-key", message, spec, "Use a newer adaptertool, or remove the tensor.")
            return
        message = (
            f'it would replace the base tensor "{escape(without_base_layer(key))}", and the config '
            "does not say so."
        )
        remedy = (
            f'List its module under "modules_to_save" in {self._rule.file} if it was trained, or remove '
            "the tensor."
        )
        self._problem("base-overwrite", message, spec, remedy)

    def _check_declared(self) -> None:
        """Reports what the config declares and the file lacks."""
        missing = [name for name in self._listed if name not in self._hit and name not in _HEADS]
        for name in missing:
            message = (
                f'"modules_to_save" lists "{escape(name)}", but the file has no tensor of it; the base\'s '
                "stay."
            )
            self.problems.append(
                Problem(
                    kind="missing-tensor",
                    message=message,
                    file=self._file,
                    loc=name,
                    severity="warning",
                    remedy="If it was trained, gather the shards and save the adapter again.",
                )
            )
        indices = self._config.get("trainable_token_indices")
        got = {name for name in self._hit if name.startswith("tokens:")}
        if indices and not got:
            self._incomplete(
                "the config trains token rows, but the file has none.", "trainable_token_indices"
            )
            return
        # PEFT skips a tied module of the same indices; whether it is tied, only the base tells.
        tokens = self._declared.tokens
        present = [rows for name, rows in tokens.items() if f"tokens:{name}" in got]
        for name, rows in tokens.items():
            if rows and rows not in present:
                message = (
                    f'the config trains {len(rows)} token rows of "{escape(name)}", but the file has none.'
                )
                self._incomplete(message, f"trainable_token_indices.{name}")

    def _incomplete(self, message: str, loc: str) -> None:
        remedy = f"The file is incomplete: save the adapter again, or correct {self._rule.file}."
        self.problems.append(
            Problem(kind="missing-tensor", message=message, file=self._file, loc=loc, remedy=remedy)
        )

    def _keep(
        self,
        target: str,
        role: str,
        spec: TensorSpec,
        *,
        rows: tuple[int, ...] | None = None,
        floating: bool = False,
    ) -> None:
        if floating and spec.dtype not in FLOAT_DTYPES:
            message = f"dtype {spec.dtype}; expected one of {', '.join(FLOAT_DTYPES)}."
            self._problem("dtype", message, spec, "Save the adapter in BF16, F16 or F32.")
        self.full.append(FullTensor(target=target, role=role, tensor=spec, rows=rows))

    def _problem(self, kind: str, message: str, spec: TensorSpec, remedy: str) -> None:
        self.problems.append(
            Problem(kind=kind, message=message, file=self._file, loc=spec.name, remedy=remedy)
        )


_HEADS = {name for names in TASK_HEADS.values() for name in names}


def _wrapped(key: str, names: Collection[str]) -> tuple[str, str, str]:
    """Splits ``P.modules_to_save.NAME.rest`` and ``P.original_module.rest`` into P, wrapper and rest.

    All three are empty for other keys. The name is left out in files whose writer removed it.
    """
    parts = key.split(".")
    for i, part in enumerate(parts[:-1]):
        if i and part in ("modules_to_save", "original_module"):
            inner = parts[i + 1 :]
            if part == "modules_to_save" and len(inner) > 1 and inner[0] in names:
                inner = inner[1:]
            return ".".join(parts[:i]), part, ".".join(inner)
    return "", "", ""
