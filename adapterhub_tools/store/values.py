"""What only the data of a safetensors file can show."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterhub_tools.errors import Problem

if TYPE_CHECKING:
    from adapterhub_tools.model.protocols import Source
    from adapterhub_tools.store.header import SafetensorsHeader

_CHUNK = 4 * 1024 * 1024


def bool_problems(source: Source, header: SafetensorsHeader) -> list[Problem]:
    """Returns a problem for each BOOL tensor that holds a byte other than 0 and 1; readers disagree on those.

    Memory: 4 MiB.

    Raises:
        StoreError: the data cannot be read.
    """
    problems = []
    for name, spec in header.tensors.items():
        if spec.dtype != "BOOL":
            continue
        for start in range(0, spec.nbytes, _CHUNK):
            chunk = source.read(header.offsets[name] + start, min(_CHUNK, spec.nbytes - start))
            others = chunk.translate(None, b"\x00\x01")
            if others:
                index = start + chunk.index(others[0])
                message = f"element {index} is {others[0]}; a BOOL is 0 or 1."
                remedy = "The file is damaged; get it again from its source."
                problems.append(
                    Problem(kind="bool-value", message=message, file=header.name, loc=name, remedy=remedy)
                )
                break
    return problems
