"""Clients in processes of their own: huggingface_hub reads its endpoint and its home when it is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

LIMIT_SECONDS = 60
PRELUDE = """
import json, os, sys
from pathlib import Path
import huggingface_hub as hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import *
api = HfApi()
args = json.loads(sys.argv[1])
def error_of(call, *a, **k):
    try:
        call(*a, **k)
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        return [type(error).__name__, status, str(error)]
    return None
"""


def real_client(code: str, env: Mapping[str, str], **args: object) -> Any:
    """Runs code that uses huggingface_hub in a process of its own, and returns what it puts into `result`.

    Args:
        code: sees `api` (HfApi), `hub` (the package), `args`, and `error_of(call, …)`: None, or class, status
            and text of the error.
        env: the environment, see `HubServer.env`.
        args: JSON values for the code.
    """
    script = f"{PRELUDE}\n{code}\nprint('RESULT' + json.dumps(result))"
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(args)],
        env=dict(env), capture_output=True, text=True, timeout=LIMIT_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.rpartition("RESULT")[2])
