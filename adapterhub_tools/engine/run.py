"""Runs a plan with threads of this process.

Each worker takes the next tensor in file order, so reads and writes move forward through the files; torch
releases the interpreter's lock in its kernels, as BLAKE3 and the system calls do. The bytes do not depend
on the number of threads: every value is the correctly rounded one, and every step owns its range of the
output.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from adapterhub_tools import registry
from adapterhub_tools.engine.buffers import CHUNK_BYTES, Buffers
from adapterhub_tools.engine.combined import panel_bytes
from adapterhub_tools.engine.requantise import run_packed
from adapterhub_tools.engine.sources import Sources
from adapterhub_tools.engine.tensor_job import Stopped, Surroundings, hash_range, run_step
from adapterhub_tools.engine.undo_keep import UndoJob
from adapterhub_tools.linalg.factored_svd import one_thread
from adapterhub_tools.linalg.rounding import BLOCK_ELEMENTS
from adapterhub_tools.model.plan import ByteRange, Plan, Step, Term
from adapterhub_tools.model.protocols import OpenSource, Progress
from adapterhub_tools.store.writer import RangeWriter

MAX_DEFAULT_THREADS = 8
MAX_COMBINING_THREADS = 4
_BLOCK_BYTES = BLOCK_ELEMENTS * (8 + 4 + 4 + 2 + 1 + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run gave.

    Attributes:
        outputs: output tensor -> digest.
        base: base tensor -> digest, for those asked for.
        resolved: how many values were decided by exact arithmetic.
    """

    outputs: dict[str, bytes]
    base: dict[str, bytes]
    resolved: int


def default_threads(*, combining: bool = False) -> int:
    """Returns the number of processors this process may use, at most MAX_DEFAULT_THREADS.

    Args:
        combining: True where steps have a combination, whose panels take up to 80 MB a thread: then at most
            MAX_COMBINING_THREADS, so that the whole process stays below 600 MB.
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, MAX_COMBINING_THREADS if combining else MAX_DEFAULT_THREADS)


def buffer_bytes(steps: tuple[Step, ...], threads: int) -> int:
    """Estimates the memory that the buffers and factors of a run need, start-up excluded."""
    specs = [[item.spec for term in step.terms for item in _held(term)] for step in steps]
    factors = [sum(spec.elements * 8 + spec.nbytes for spec in of_step) for of_step in specs]
    panels = max((panel_bytes(step) for step in steps), default=0)
    own = threads * (2 * CHUNK_BYTES + _BLOCK_BYTES + panels)
    return own + sum(sorted(factors, reverse=True)[:threads])


def _held(term: Term) -> Iterator[ByteRange]:
    """Yields the factors that a method has in memory whole."""
    method = registry.load("methods", term.method).IMPLEMENTATION
    by_rows = getattr(method, "row_roles", ())
    yield from (item for role, item in term.factors.items() if role not in by_rows)


def run(
    plan: Plan,
    *,
    folder: Path,
    sources: Mapping[str, Callable[[], OpenSource]],
    hash_base: Callable[[str], bool],
    algorithm: str,
    threads: int,
    device: str,
    progress: Progress,
    undo: Mapping[str, UndoJob] | None = None,
) -> RunResult:
    """Writes every file of the plan into a folder, durably.

    Args:
        plan: what to do.
        folder: an existing empty folder that only this run writes to.
        sources: uri -> how to open it; each is opened once and checked at the end to be unchanged.
        hash_base: says of a base tensor's name whether its digest is wanted.
        algorithm: the digest algorithm.
        threads: the number of workers, at least 1.
        device: ``"cpu"`` or ``"cuda"``.
        progress: told the bytes read.
        undo: output tensor -> what to keep of its step, so that it can be undone.

    Raises:
        FormatError: NaN or infinity in an input that is computed with.
        LossyError: a result overflows.
        StoreError: an input cannot be read or has changed.
        OSError: an output cannot be written.
    """
    opened = Sources(lambda uri: sources[uri]())
    lock = threading.Lock()
    failed = threading.Event()
    around = Surroundings(
        algorithm=algorithm,
        device=device,
        hash_base=hash_base,
        open_source=opened.open,
        advance=progress.advance,
        stopped=failed.is_set,
    )
    result = RunResult(outputs={}, base={}, resolved=0)
    drop = plan.written_bytes > _drop_above()
    writers: dict[str, RangeWriter] = {}
    resolved = 0
    try:
        for file in plan.files:
            writers[file.name] = RangeWriter(folder / file.name, file.length, drop_pages=drop)
            writers[file.name].write(memoryview(file.header), 0)
        progress.start("merging", plan.read_bytes)
        jobs: list[Step | ByteRange] = [*plan.steps, *plan.digest_only]
        counts = _in_threads(
            jobs,
            lambda job, buffers: _run_job(job, writers, around, buffers, result, lock, undo or {}),
            threads,
            failed,
        )
        with closing(counts):  # an interruption waits for the workers before their files are closed
            for count in counts:
                resolved += count
        for writer in writers.values():
            writer.finish()
        opened.check_unchanged()
        progress.finish()
    finally:
        for writer in writers.values():
            writer.close()
        opened.close()
    return RunResult(outputs=result.outputs, base=result.base, resolved=resolved)


def _run_job(
    job: Step | ByteRange,
    writers: Mapping[str, RangeWriter],
    around: Surroundings,
    buffers: Buffers,
    result: RunResult,
    lock: threading.Lock,
    undo: Mapping[str, UndoJob],
) -> int:
    if isinstance(job, ByteRange):
        digest = hash_range(job, around, buffers)
        with lock:
            result.base[job.spec.name] = digest
        return 0
    if job.packed is not None:
        made = run_packed(job, job.packed, writers, around)
        with lock:
            result.outputs.update(made.outputs)
        return made.resolved
    outcome = run_step(job, writers[job.file], around, buffers, undo.get(job.output.name))
    with lock:
        result.outputs[job.output.name] = outcome.output_digest
        if job.base_name is not None and outcome.base_digest is not None:
            result.base[job.base_name] = outcome.base_digest
    return outcome.resolved


def _in_threads(
    jobs: list[Step | ByteRange],
    work: Callable[[Step | ByteRange, Buffers], int],
    threads: int,
    failed: threading.Event,
) -> Generator[int, None, None]:
    """Runs the jobs in order, ``threads`` at a time; the first error ends the others and is raised."""
    queue = iter(jobs)
    lock = threading.Lock()

    def worker() -> int:
        torch.set_num_threads(1)
        buffers, total = Buffers(), 0
        while not failed.is_set():
            with lock:
                job = next(queue, None)
            if job is None:
                break
            try:
                total += work(job, buffers)
            except Stopped:
                break
            except BaseException:
                failed.set()
                raise
        return total

    with one_thread(), ThreadPoolExecutor(max_workers=threads) as pool:
        futures = [pool.submit(worker) for _ in range(threads)]
        try:
            yield from (future.result() for future in futures)
        except BaseException:
            failed.set()
            raise


def _drop_above() -> int:
    """Returns the output size from which written pages are dropped: a sixteenth of the memory."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 16
    except (ValueError, OSError):
        return 0
