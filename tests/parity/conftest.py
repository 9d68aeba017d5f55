"""Keeps the reference libraries quiet: their advice concerns training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
from transformers.utils import logging


@pytest.fixture(autouse=True)
def quiet_references() -> Iterator[None]:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        for module in ("peft", "transformers", "torch"):
            warnings.filterwarnings("ignore", module=module)
        yield
