"""Every adapter config of a corpus of real files is described or refused for a stated reason.

The corpus is not part of the repository; ADAPTERTOOL_CORPUS names its folder (default: ../shared/corpus
beside the repository). Without it there is nothing to test.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from adapterhub_tools.dialects import peft
from adapterhub_tools.errors import AdapterError
from adapterhub_tools.store.strict_json import read_json

CORPUS = Path(os.environ.get("ADAPTERTOOL_CORPUS", Path(__file__).parents[3] / "shared" / "corpus"))
FOLDERS = ("configs", "configs_from_results")

pytestmark = pytest.mark.skipif(not CORPUS.is_dir(), reason=f"no corpus of real configs at {CORPUS}")


def outcome(path: Path) -> str:
    """Returns how one config is handled, after checking what is said about it."""
    try:
        config = read_json(path)
    except AdapterError as error:
        return "refused: " + error.problems[0].kind
    if not isinstance(config, dict) or not peft.detect({}, config):
        return "another tool's"
    adapter, problems = peft.examine({}, config)
    for problem in problems:
        json.dumps(problem.to_json())
        assert problem.remedy
    kinds = sorted({p.kind for p in problems if p.severity == "error"} - {"empty"})
    blocked = sorted({kind for kind, _, _ in adapter.blockers})
    name = "LORA" if adapter.method in ("lora", "dora") else "other type"
    return f"{name}: {', '.join(kinds) or 'well-formed'}" + (
        f"; blocked: {', '.join(blocked)}" if blocked else ""
    )


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_config_is_handled(folder, capsys):
    paths = sorted((CORPUS / folder).glob("*.json"))
    assert paths, f"{CORPUS / folder} is empty"
    counts = Counter(outcome(path) for path in paths)
    with capsys.disabled():
        print(f"\n{folder}: {len(paths)} configs")
        for name, count in counts.most_common():
            print(f"  {count:4} {name}")
    assert sum(counts.values()) == len(paths)
    good = sum(count for name, count in counts.items() if ": well-formed" in name)
    assert good > len(paths) / 2
