"""The one system call that Python lacks: exchanging two folders atomically."""

from __future__ import annotations

import errno
import os
import platform
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h
_RENAME_SWAP = 2  # macOS, sys/stdio.h
_SYSCALL_NUMBERS = {"x86_64": 316, "aarch64": 276, "riscv64": 276, "ppc64le": 357, "s390x": 347}

UNSUPPORTED_ERRORS = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What ``exchange`` fails with where the system or the file system cannot do it."""


def exchange(first: Path, second: Path) -> None:
    """Exchanges two folders of one file system, so that at no moment either name is missing.

    Linux: renameat2 with RENAME_EXCHANGE; macOS: renamex_np with RENAME_SWAP.

    Raises:
        OSError: it failed; with an errno in UNSUPPORTED_ERRORS where it cannot be done.
    """
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    one, two = os.fsencode(first), os.fsencode(second)
    call: Any
    if sys.platform == "darwin":
        call = getattr(library, "renamex_np", None)
        result = -1 if call is None else call(one, two, ctypes.c_uint(_RENAME_SWAP))
    else:
        call = getattr(library, "renameat2", None)
        number = _SYSCALL_NUMBERS.get(platform.machine())
        if call is not None:
            result = call(_AT_FDCWD, one, _AT_FDCWD, two, ctypes.c_uint(_RENAME_EXCHANGE))
        elif number is not None and sys.platform == "linux":  # a C library older than the kernel
            call = library.syscall
            result = call(
                ctypes.c_long(number), _AT_FDCWD, one, _AT_FDCWD, two, ctypes.c_uint(_RENAME_EXCHANGE)
            )
        else:
            call, result = None, -1
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(first))
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(first))
