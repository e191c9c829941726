"""Read a file of the Hub by HTTP range requests: ahead of the reader, through a fixed amount of memory."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Generator
from contextlib import closing
from queue import Empty, SimpleQueue
from typing import Any, Final

import numpy as np

from df11.formats import errors
from df11.storage import client
from df11.storage.address import Address, origin_of
from df11.storage.answers import AGAIN, LaterError, explain_response
from df11.storage.file import Bytes, File

RANGE_BYTES: Final = 6 << 20
"""Bytes per request: enough to hide the time to the first byte, and few enough for several requests in memory."""
RANGES: Final = 4
"""Requests in flight, as one connection rarely fills the line. With more, a conversion would not fit into 256 MiB."""
SLOW_AFTER: Final = 120.0
LEAST_RATE: Final = 1000.0
"""Bytes per second that must come after SLOW_AFTER seconds of a request; else it is made again. If fewer have come
between two breaks, with all waits, the second counts as the next one in a row."""
LONGEST_CLOSE: Final = 1.0
"""Seconds that closing waits for requests in flight."""
RING_MEMORY: Final = RANGES * RANGE_BYTES
CLIENT_MEMORY: Final = 25 << 20
"""Bytes that huggingface_hub and its connections take: 18 MiB measured without TLS."""


class _Stopped(Exception):  # noqa: N818 - not an error: nobody is waiting any more
    pass


class RemoteFile:
    """A file of a repository at a commit. The Hub redirects to its storage; that URL is used until it expires."""

    def __init__(self, address: Address, size: int) -> None:
        self.address = address
        self.size = size
        self.where = str(address)
        self._signed: str | None = None
        self._may_sign = True

    def fetch(self, start: int, out: Bytes, stopped: threading.Event | None = None) -> None:
        """Fill ``out`` with the bytes from ``start`` on. Raises a Df11Error.

        If a response breaks off, it continues from there, as long as bytes keep coming at LEAST_RATE.

        Ends early, with another error, when ``stopped`` is set.
        """
        stopped = stopped or threading.Event()
        view = memoryview(out)
        waits = iter(client.WAITS)
        since, earned = time.monotonic(), 0
        while view:
            size, error = self._fetch_once(start, view, stopped)
            view, start, earned = view[size:], start + size, earned + size
            if error is not None:
                if earned and earned >= LEAST_RATE * (time.monotonic() - since):
                    waits, since, earned = iter(client.WAITS), time.monotonic(), 0
                wait = next(waits, None)
                if wait is None:
                    raise error
                client.pause(error, wait, sleep=stopped.wait)
            if stopped.is_set():
                raise _Stopped

    def _fetch_once(
        self, start: int, view: memoryview, stopped: threading.Event
    ) -> tuple[int, errors.RetryLaterError | None]:
        # How many bytes have come, and why not all of them have.
        got = 0

        def patience() -> float:
            return max(SLOW_AFTER, got / LEAST_RATE)

        try:
            with client.asking(self.where, patience=patience), closing(self._stream(start, len(view))) as chunks:
                for chunk in chunks:
                    if stopped.is_set():
                        break
                    view[got : got + len(chunk)] = chunk
                    got += len(chunk)
                else:
                    if got < len(view):
                        raise LaterError("the Hub's response ends too early", file=self.where, hint=AGAIN)
        except errors.RetryLaterError as error:
            return got, error
        return got, None

    def _stream(self, start: int, size: int) -> Generator[bytes]:
        signed = self._signed  # Other threads may change it.
        url, headers = client.request(self.address) if signed is None else (signed, {})
        from huggingface_hub import get_session

        headers["Range"] = f"bytes={start}-{start + size - 1}"
        with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
            skip = self._check(response, start, by_signature=signed is not None)
            for chunk in response.iter_raw():
                if not size:
                    break
                chunk, skip = chunk[skip:][:size], max(0, skip - len(chunk))
                size -= len(chunk)
                yield chunk

    def _check(self, response: Any, start: int, *, by_signature: bool) -> int:
        # Refuse a response that does not hold the bytes from start on. Returns how many bytes come before them.
        from huggingface_hub import hf_raise_for_status

        status = response.status_code
        if status in (401, 403, 410) and (by_signature or response.history):
            # From the Hub's storage: the signed URL has expired, or is for one range only. The Hub gives another one.
            self._signed, self._may_sign = None, False
            wait = 0.0 if by_signature else None
            raise LaterError(
                f"the Hub's storage rejects the signed URL ({status})",
                wait=wait,
                file=self.where,
                hint=AGAIN,
            )
        if status == 416:
            raise self._other_size(response.headers.get("content-range", "").rpartition("/")[2])
        if status not in (200, 206):
            self._signed = None
            hf_raise_for_status(response)
            raise explain_response(response, self.where)
        if status == 200:
            length = response.headers.get("content-length", str(self.size))
            skip = start
        else:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("content-range", ""))
            if not match or int(match[1]) != start:
                raise LaterError("the Hub sent other bytes than requested", file=self.where, hint=AGAIN)
            length = match[2]
            skip = 0
        if length not in (str(self.size), "*"):
            raise self._other_size(length)
        if (
            response.history
            and self._may_sign
            and origin_of(str(response.url)) != origin_of(str(response.history[0].url))
        ):
            self._signed = str(response.url)
        return skip

    def _other_size(self, found: str) -> errors.DifferenceError:
        return errors.DifferenceError(
            "the Hub sent a file of a different size than it lists",
            file=self.where,
            expected=f"{self.size} bytes",
            found=found or "another",
        )


class _Range:
    # A part of the file on its way into a buffer.
    def __init__(self, position: int, buffer: Bytes, size: int) -> None:
        self.position = position
        self.buffer = buffer
        self.data = buffer[:size]
        self.ready = threading.Event()
        self.unwanted = threading.Event()
        self.error: BaseException | None = None


class RangeReader:
    """Reads a :class:`RemoteFile` from byte ``start`` on, up to ``end`` or its own.

    In sequence it fetches ahead; after a jump it fetches just what is requested.
    """

    def __init__(self, file: RemoteFile, start: int, end: int | None = None) -> None:
        self._file = file
        self._start = start
        self._end = file.size if end is None else end
        self._next = start
        self._reading = threading.Lock()
        self._state = threading.Lock()  # Guards what the fetching threads and stop() also change.
        self._stopped = threading.Event()
        self._held: dict[int, _Range] = {}
        self._free: SimpleQueue[Bytes] = SimpleQueue()
        self._wanted: SimpleQueue[_Range | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def read(self, position: int, out: Bytes) -> None:
        """Fill ``out`` with the bytes from ``position``, which is at least ``start``, on.

        Raises a Df11Error; after :meth:`stop` possibly another error.
        """
        with self._reading:
            if position == self._next and position + len(out) <= self._end:
                self._read_in_sequence(position, out)
            else:
                self._file.fetch(position, out, self._stopped)
            self._next = position + len(out)

    def _read_in_sequence(self, position: int, out: Bytes) -> None:
        while len(out):
            index, offset = divmod(position - self._start, RANGE_BYTES)
            part = self._get(index)
            part.ready.wait()
            if self._stopped.is_set():
                raise _Stopped
            if part.error is not None:
                raise part.error
            chunk = part.data[offset : offset + len(out)]
            out[: len(chunk)] = chunk
            out, position = out[len(chunk) :], position + len(chunk)
            if offset + len(chunk) == len(part.data) and position < self._end:
                self._get(index + 1)  # Its buffer is free again.

    def _get(self, index: int) -> _Range:
        # The part, requested now if necessary. Also requests the next parts while there are buffers; drops all others.
        if not self._threads:
            self._start_threads()
        size = self._end - self._start
        window = range(index, min(index + RANGES, -(-size // RANGE_BYTES)))
        for other in [other for other in self._held if other not in window]:
            self._drop(other)
        for wanted in window:
            if wanted not in self._held:
                try:
                    buffer = self._free.get(block=wanted == index)
                except Empty:
                    break
                part = _Range(self._start + wanted * RANGE_BYTES, buffer, min(RANGE_BYTES, size - wanted * RANGE_BYTES))
                with self._state:
                    self._held[wanted] = part
                    if self._stopped.is_set():
                        raise _Stopped
                self._wanted.put(part)
        return self._held[index]

    def _start_threads(self) -> None:
        for number in range(RANGES):
            self._free.put(np.empty(RANGE_BYTES, np.uint8))
            # Daemons: a silent server must not delay an interrupted command.
            thread = threading.Thread(target=self._work, name=f"df11-fetch-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while (part := self._wanted.get()) is not None:
            try:
                if not part.unwanted.is_set():
                    self._file.fetch(part.position, part.data, part.unwanted)
            except BaseException as error:
                part.error = error
            with self._state:
                part.ready.set()
                if part.unwanted.is_set():
                    self._free.put(part.buffer)

    def _drop(self, index: int) -> None:
        with self._state:
            part = self._held.pop(index)
            if part.ready.is_set():
                self._free.put(part.buffer)
            part.unwanted.set()

    def stop(self) -> None:
        """Wake all threads that wait for bytes: from now on, reads raise an error."""
        with self._state:
            self._stopped.set()
            for part in self._held.values():
                part.unwanted.set()
                part.ready.set()
        self._free.put(np.empty(0, np.uint8))  # Wakes a reader that waits for a buffer.

    def close(self) -> None:
        """End the threads. One whose server is silent ends later, on its own."""
        self.stop()
        for _ in self._threads:
            self._wanted.put(None)
        end = time.monotonic() + LONGEST_CLOSE
        for thread in self._threads:
            thread.join(timeout=max(0.0, end - time.monotonic()))


class RangeFile(File):
    """A file of a repository at a commit, read as it arrives. Nothing is checked here: the caller knows its hash."""

    memory = CLIENT_MEMORY + RING_MEMORY

    def __init__(self, address: Address, size: int) -> None:
        self.label = str(address)
        self.size = size
        self._remote = RemoteFile(address, size)
        self._reader: RangeReader | None = None

    def expect(self, position: int, end: int | None = None) -> None:
        """Fetch ahead from ``position`` on, up to ``end``, once the first bytes there are requested."""
        self._close_reader()
        self._reader = RangeReader(self._remote, position, end)

    def read(self, position: int, out: Bytes) -> None:
        """Fill ``out`` with the bytes from ``position`` on."""
        if self._reader is None:
            self._remote.fetch(position, out)
        else:
            self._reader.read(position, out)

    def changed(self, tensor: str | None = None) -> errors.Df11Error:
        """The error for bytes that differ when read twice. A commit does not change, so they are damaged."""
        what = "the second download differs from the first"
        return errors.DifferenceError(what, file=self.label, tensor=tensor, hint=AGAIN)

    def stop(self) -> None:
        """Wake all threads that wait for bytes: from now on, reads raise an error."""
        if self._reader is not None:
            self._reader.stop()

    def close(self) -> None:
        """Stop fetching."""
        self._close_reader()

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
