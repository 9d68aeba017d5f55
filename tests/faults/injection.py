"""Faults at chosen system calls of one thread, by strace."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tests.faults.forked_merges import TIMEOUT, Ended, Merge

if TYPE_CHECKING:
    from collections.abc import Iterator

# Of the calls on files and descriptors, those that change neither; the census fails on one that is in no
# list.
HARMLESS = {
    "access", "faccessat", "faccessat2", "fadvise64", "fcntl", "fgetxattr", "flistxattr", "fstat", "fstatfs",
    "futex", "getcwd", "getdents64", "ioctl", "lseek", "lstat", "mmap", "newfstatat", "poll", "pread64",
    "preadv", "preadv2", "pselect6", "read", "readlink", "readlinkat", "readv", "select", "stat", "statfs",
    "statx",
}  # fmt: skip
FLUSHES = {"fsync", "fdatasync", "sync_file_range", "syncfs", "msync"}
WRITES = {
    "copy_file_range", "fallocate", "ftruncate", "link", "linkat", "mkdir", "mkdirat", "pwrite64", "pwritev",
    "pwritev2", "rename", "renameat", "renameat2", "sendfile", "symlink", "symlinkat", "write", "writev",
}  # fmt: skip
OPENS = {"open", "openat", "openat2", "creat"}
REMOVALS = {"rmdir", "unlink", "unlinkat"}
OTHERS = {"chmod", "close", "dup", "dup3", "fchmod", "fchmodat", "flock", "fchown", "utimensat"}
CHANGING = FLUSHES | WRITES | OPENS | REMOVALS | OTHERS

_CALL = re.compile(r"^(?:\d+ +)?([a-z0-9_]+)\(")


@cache
def why_no_injection() -> str:
    """Returns why faults cannot be injected here, or an empty string if they can."""
    strace = shutil.which("strace")
    if strace is None:
        return "strace is not installed"
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        command = [strace, "-e", "trace=none", "-e", "inject=read:signal=SIGKILL:when=1", "-p"]
        tracer = subprocess.Popen(
            [*command, str(sleeper.pid)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert tracer.stderr is not None
        said = tracer.stderr.readline()
    finally:
        sleeper.kill()
        sleeper.wait()
    tracer.wait()
    return "" if "attached" in said else f"strace may not trace: {said.strip()}"


@contextmanager
def _traced(merge: Merge, log: Path, *options: str) -> Iterator[None]:
    """Attaches strace to the waiting thread alone, unless ``-f`` is among the options.

    strace says that it is attached once the kernel has been told to stop the thread at its next step, so no
    call after ``go`` escapes it.
    """
    thread = merge.until_waiting()
    tracer = subprocess.Popen(
        ["strace", "-y", "-o", str(log), *options, "-p", str(thread)], stderr=subprocess.PIPE, text=True
    )
    assert tracer.stderr is not None
    said = tracer.stderr.readline()
    assert "attached" in said, said
    try:
        yield
    finally:
        tracer.communicate(timeout=TIMEOUT)


def is_message(line: str) -> bool:
    """Returns whether a line of strace is of the pipe by which the test and the merging process talk."""
    return "<pipe:" in line


def census(merge: Merge, log: Path) -> tuple[Ended, Counter[str]]:
    """Runs a merge and counts the calls of its waiting thread on files and descriptors."""
    with _traced(merge, log, "-e", "trace=%file,%desc"):
        merge.go()
        ended = merge.end()
    lines = [line for line in log.read_text(errors="replace").splitlines() if not is_message(line)]
    counts = Counter(found[1] for line in lines if (found := _CALL.match(line)))
    unknown = set(counts) - HARMLESS - CHANGING
    assert not unknown, f"calls that are neither harmless nor injected: {sorted(unknown)}"
    return ended, counts


def record(merge: Merge, log: Path, calls: str) -> tuple[Ended, list[str]]:
    """Runs a merge and returns strace's lines of these calls of all its threads, without those cut in two."""
    with _traced(merge, log, "-f", "-s", "4096", "-e", f"trace={calls}"):
        merge.go()
        ended = merge.end()
    return ended, whole_lines(log.read_text(errors="replace"))


def whole_lines(text: str) -> list[str]:
    """Joins the two halves of a call that another thread's line came between.

    It stands where it ended, but a flush where it began: only what was written by then is sure to be flushed.
    """
    begun: dict[str, str] = {}
    lines = []
    for line in text.splitlines():
        thread, _, rest = line.partition(" ")
        if rest.endswith("<unfinished ...>") and rest.startswith(("fsync(", "fdatasync(")):
            lines.append(line)
        elif rest.endswith("<unfinished ...>"):
            begun[thread] = line.removesuffix("<unfinished ...>")
        elif " resumed>" in rest:
            if thread in begun:
                lines.append(begun.pop(thread) + rest.partition(" resumed>")[2])
        else:
            lines.append(line)
    return lines


def inject(
    merge: Merge, log: Path, call: str, when: int, fault: str, *, always: str = "", follow: bool = False
) -> tuple[Ended, str]:
    """Runs a merge with a fault at the ``when``-th call of a kind; that call is not executed.

    Args:
        merge: a waiting merge.
        log: where strace writes.
        call: the system call.
        when: which, from 1.
        fault: ``"signal=SIGKILL"`` or ``"error=ENOSPC"``.
        always: another call that fails each time, such as ``"renameat2:error=EINVAL"``.
        follow: trace the threads that the waiting one starts too; each then counts its calls for itself.

    Returns:
        How it ended, and strace's line of the call with the fault, with the paths of descriptors; empty if
        there was none.
    """
    traced = ",".join([call, *([always.partition(":")[0]] if always else [])])
    options = ["-e", f"trace={traced}", "-e", f"inject={call}:{fault}:when={when}"]
    options += ["-e", f"inject={always}"] if always else []
    options += ["-f"] if follow else []
    with _traced(merge, log, *options):
        merge.go()
        ended = merge.end()
    lines = log.read_text(errors="replace").splitlines()
    if fault.startswith("error"):
        hit = [line for line in lines if "(INJECTED)" in line]
    else:
        hit = [line for line in lines if _CALL.match(line)][-1:] if ended.killed else []
    return ended, hit[-1] if hit else ""
