"""A remote file read by range: a few bytes of its header, or all of it once, ahead of who reads it."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from adapterhub_tools.errors import HubError, IntegrityError, Problem, StoreError, escape
from adapterhub_tools.hub.download import check_headers, require_partial
from adapterhub_tools.hub.patience import Deadline, TransientError, patiently
from adapterhub_tools.hub.repository import Repository
from adapterhub_tools.hub.transport import bad_answer
from adapterhub_tools.hub.trees import ContentCheck, RemoteFile

HEAD_BYTES = 64 << 10
"""Read at once from the beginning, so that most headers need one request."""
WINDOW_BYTES = 4 << 20
"""Bytes of one request while a file is streamed."""
WINDOWS_AHEAD = 8
"""Windows that are fetched while an earlier one is being used."""


class RangeSource:
    """A file of a commit as a Source.

    The beginning is kept, because a header is read in two steps. The commit pins the content; only reading
    all of it can check it (``StreamedSource``).
    """

    def __init__(self, repository: Repository, commit: str, file: RemoteFile, *, name: str) -> None:
        self._repository = repository
        self._commit = commit
        self.file = file
        self._name = name
        self._head = b""
        self._signed: str | None = None
        self._etag = ""
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return self._name

    @property
    def length(self) -> int:
        """The number of bytes, as the commit says."""
        return self.file.size

    def read(self, offset: int, length: int) -> bytes:
        """Returns exactly ``length`` bytes from ``offset``.

        Raises:
            HubError: they cannot be had.
            StoreError: the file has fewer.
        """
        if offset + length > self.length:
            message = f"byte {offset + length} was asked for; the file has {self.length}."
            raise StoreError.of("read-past-end", message, file=self._name)
        end = offset + length
        if offset <= len(self._head) and end > len(self._head):
            begin = len(self._head)
            wanted = min(max(end - begin, HEAD_BYTES), self.length - begin)
            self._head += self.fetch(begin, wanted)
        if end <= len(self._head):
            return self._head[offset:end]
        return self.fetch(offset, length)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fills ``view`` from ``offset``; as ``read``."""
        view[:] = self.read(offset, len(view))

    def check_unchanged(self) -> None:
        """Does nothing: the commit pins the file."""

    def close(self) -> None:
        """Does nothing: connections are shared."""

    def __enter__(self) -> RangeSource:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the file."""
        self.close()

    def fetch(self, offset: int, length: int) -> bytes:
        """Returns a range, resumed where a connection breaks off.

        Raises:
            HubError: it cannot be had, or the server ignores ranges.
        """
        if length == 0:
            return b""
        transport = self._repository.transport
        deadline = transport.patience.deadline(length)
        taken = bytearray()
        patiently(
            lambda: self._ask(offset, length, taken, deadline),
            transport.patience,
            deadline,
            progress=lambda: len(taken),
        )
        return bytes(taken)

    def _ask(self, offset: int, length: int, taken: bytearray, deadline: Deadline) -> None:
        """Asks once for what is still missing of a range, and adds what comes to ``taken``."""
        transport = self._repository.transport
        what = f"reading {escape(self._name)}"
        own = self._repository.content_url(self._commit, self.file.path)
        signed = self._signed
        begin, missing = offset + len(taken), length - len(taken)
        with transport.open(
            "GET",
            signed or own,
            what=what,
            deadline=deadline,
            headers={"range": f"bytes={begin}-{begin + missing - 1}"},
            other_hosts=True,
            signed=signed is not None,
            raw=True,
        ) as answer:
            if signed is not None and answer.status in (401, 403, 404, 410):
                self._signed = None  # the signature ran out: ask the Hub for a new one
                problem = Problem(kind="expired", message=f"{what}: the link ran out.", remedy="Try again.")
                raise TransientError(problem, wait_seconds=0)
            if answer.status not in (200, 206):
                raise transport.refusal(answer, what)
            if (begin, missing) != (0, self.length):
                require_partial(answer, self.file)
            check_headers(answer, self._commit, self.file, begin, missing)
            self._check_etag(answer.headers.get("etag", ""))
            if not transport.endpoint.is_own(answer.url):
                self._signed = answer.url
            for piece in answer.pieces:
                if len(taken) + len(piece) > length:
                    raise bad_answer(f"more bytes of {escape(self._name)!r} came than were asked for")
                taken += piece
        if len(taken) < length:
            message = f"{what}: {len(taken):,} of {length:,} bytes came before the connection ended."
            raise TransientError(Problem(kind="connection-lost", message=message, remedy="Try again."))

    def _check_etag(self, etag: str) -> None:
        with self._lock:
            if self._etag and etag and etag != self._etag:
                raise HubError.of(
                    "changed",
                    "its content changed while it was being read.",
                    file=escape(self._name),
                    remedy="Try again.",
                )
            self._etag = etag or self._etag


class StreamedSource(RangeSource):
    """A file that is read from front to back, by range requests that run ahead.

    Windows of WINDOW_BYTES are fetched ahead by the threads of a pool and hashed in their order.
    ``check_unchanged``, which a run calls before its output becomes visible, fetches what was left out and
    compares the digest of the whole file with the one the commit names. The header, which was read before,
    and windows that are fetched once more have to be the same bytes. One object serves all readers of a file,
    one after another.

    Memory: WINDOWS_AHEAD + 1 windows while it is being read.
    """

    def __init__(
        self, repository: Repository, commit: str, file: RemoteFile, *, name: str, pool: ThreadPoolExecutor
    ) -> None:
        super().__init__(repository, commit, file, name=name)
        self._pool = pool
        self._windows: dict[int, Future[bytes]] = {}
        self._current: tuple[int, bytes] = (-1, b"")
        self._count = -(-file.size // WINDOW_BYTES)
        self._check = ContentCheck(file)
        self._hashed = 0  # windows that the check has taken, in their order
        self._digests: dict[int, bytes] = {}
        self._in_order = threading.Lock()

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fills ``view`` from ``offset``; reading forward is fast, going back asks again.

        Raises:
            HubError: the bytes cannot be had.
            IntegrityError: they are not the ones that were read before.
        """
        done = 0
        while done < len(view):
            index, within = divmod(offset + done, WINDOW_BYTES)
            if index >= self._count:
                raise StoreError.of("read-past-end", "there are no bytes so far back.", file=self._name)
            window = self._window(index)
            piece = memoryview(window)[within : within + len(view) - done]
            if not piece:
                raise StoreError.of("read-past-end", "there are no bytes so far back.", file=self._name)
            view[done : done + len(piece)] = piece
            done += len(piece)

    def check_unchanged(self) -> None:
        """Compares the whole content with the commit.

        Raises:
            IntegrityError: it is other content.
            HubError: the rest of it cannot be had.
        """
        while self._hashed < self._count:
            self._window(self._hashed)
        self._check.raise_if_other()

    def close(self) -> None:
        """Gives up what was fetched ahead."""
        with self._in_order:
            for window in self._windows.values():
                window.cancel()
            self._windows.clear()
            self._current = (-1, b"")

    def _window(self, index: int) -> bytes:
        """Returns a window, begins the ones after it, and forgets the ones before."""
        with self._in_order:
            # A small gap is hashed too, in its order; a large one only if the whole file is checked.
            if index - self._hashed <= WINDOWS_AHEAD:
                for number in range(self._hashed, index):
                    self._take(number)
            return self._take(index)

    def _take(self, index: int) -> bytes:
        if self._current[0] == index:
            return self._current[1]
        for number in range(index, min(index + 1 + WINDOWS_AHEAD, self._count)):
            if number not in self._windows:
                self._windows[number] = self._pool.submit(self._load, number)
        data = self._windows[index].result()
        self._verify(index, data)
        self._current = (index, data)
        for number in [number for number in self._windows if number <= index]:
            del self._windows[number]
        return data

    def _verify(self, index: int, data: bytes) -> None:
        """Hashes a window that is new; compares one that was there before, and the header."""
        from blake3 import blake3

        digest = blake3(data).digest()
        begin = index * WINDOW_BYTES
        head = self._head[begin : begin + len(data)]
        if self._digests.setdefault(index, digest) != digest or head != data[: len(head)]:
            raise self._other_bytes()
        if index == self._hashed:
            self._check.update(data)
            self._hashed += 1

    def _other_bytes(self) -> IntegrityError:
        return IntegrityError.of(
            "content",
            "the same range gave other bytes the second time.",
            file=escape(self._name),
            remedy="Try again; if it stays so, the server or a cache before it gives damaged content.",
        )

    def _load(self, index: int) -> bytes:
        begin = index * WINDOW_BYTES
        return self.fetch(begin, min(WINDOW_BYTES, self.length - begin))
