"""Independent pieces of work on several threads, their results in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from adapterhub_tools.linalg.factored_svd import one_thread

T = TypeVar("T")
R = TypeVar("R")


def in_order(work: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Yields ``work(item)`` for each item, in order, with so many items under way at a time.

    Each worker uses one BLAS thread, so that results do not depend on ``threads``. At most ``2·threads``
    results wait to be taken. The first error ends the others and is raised.

    Args:
        work: called from several threads.
        items: what to work on.
        threads: the number of workers, at least 1.
    """
    failed = threading.Event()

    def guarded(item: T) -> R | None:
        if failed.is_set():
            return None
        torch.set_num_threads(1)
        try:
            return work(item)
        except BaseException:
            failed.set()
            raise

    waiting: deque[Future[R | None]] = deque()

    def oldest() -> R:
        result = waiting.popleft().result()
        if failed.is_set():
            # An item that never began gives None; the one that failed is among the younger ones.
            for other in waiting:
                other.result()
        return result  # type: ignore[return-value]

    with one_thread(), ThreadPoolExecutor(max_workers=threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(guarded, item))
                if len(waiting) >= 2 * threads:
                    yield oldest()
            while waiting:
                yield oldest()
        except BaseException:
            failed.set()
            raise
