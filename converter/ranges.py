"""Read a file of the Hub by HTTP range requests: as it comes, ahead of the reader, through a fixed amount of memory."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Generator
from contextlib import closing
from queue import Empty, SimpleQueue
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np

from df11.formats import errors, hub
from df11.formats.record import Bytes

PIECE_BYTES: Final = 6 << 20
"""Bytes of a request: large enough for the time to its first byte not to matter much, small enough for several in little memory."""
PIECES: Final = 4
"""Requests in flight, as one connection alone rarely fills the line. With more, a conversion would not fit into its default of 256 MiB."""
LONGEST_CLOSE: Final = 1.0
"""Seconds that closing waits for requests that are under way."""
RING_MEMORY: Final = PIECES * PIECE_BYTES


class _Stopped(Exception):  # noqa: N818 - nobody waits any more: no error of anything
    pass


class RemoteFile:
    """A file of a repository at a commit. Its bytes come from where the Hub redirects to; that address is used until it expires."""

    def __init__(self, address: hub.Address, size: int) -> None:
        self.address = address
        self.size = size
        self.where = str(address)
        self._signed: str | None = None
        self._may_sign = True

    def fetch(self, start: int, out: Bytes, stopped: threading.Event | None = None) -> None:
        """Fill ``out`` with the bytes from ``start`` on. Tries again, from where it broke off, as long as something comes; raises a Df11Error.

        Ends early, with another error, when ``stopped`` is set.
        """
        stopped = stopped or threading.Event()
        view = memoryview(out)
        waits = iter(hub.WAITS)
        while view:
            before = len(view)
            try:
                with hub.explained(self.where), closing(self._stream(start, len(view))) as chunks:
                    for chunk in chunks:
                        if stopped.is_set():
                            raise _Stopped
                        view[: len(chunk)] = chunk
                        view, start = view[len(chunk) :], start + len(chunk)
                    if view:
                        raise hub.LaterError(
                            "the Hub's answer ends too early", file=self.where, hint="run the same command again"
                        )
            except errors.RetryLaterError as error:
                if len(view) < before:
                    waits = iter(hub.WAITS)
                wait = next(waits, None)
                if wait is None:
                    raise
                hub.pause(error, wait, sleep=stopped.wait)
                if stopped.is_set():
                    raise _Stopped from None

    def _stream(self, start: int, size: int) -> Generator[bytes]:
        signed = self._signed  # Other threads may change it.
        url, headers = hub.request(self.address) if signed is None else (signed, {})
        from huggingface_hub import get_session

        headers |= {"Range": f"bytes={start}-{start + size - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
            skip = self._check(response, start, by_signature=signed is not None)
            for chunk in response.iter_raw():
                if not size:
                    break
                chunk, skip = chunk[skip:][:size], max(0, skip - len(chunk))
                size -= len(chunk)
                yield chunk

    def _check(self, response: Any, start: int, *, by_signature: bool) -> int:
        # Refuse an answer that does not hold the bytes from start on; returns how many bytes come before them.
        from huggingface_hub import hf_raise_for_status

        status = response.status_code
        if status in (401, 403, 410) and (by_signature or response.history):
            # Not the Hub itself but its storage: the signed address is too old, or holds for one range only. The Hub gives another one.
            self._signed, self._may_sign = None, False
            wait = 0.0 if by_signature else None
            raise hub.LaterError(
                f"the Hub's storage does not accept the address that it was given ({status})",
                wait=wait,
                file=self.where,
                hint="run the same command again",
            )
        if status == 416:
            raise self._other_size(response.headers.get("content-range", "").rpartition("/")[2])
        if status not in (200, 206):
            self._signed = None
            hf_raise_for_status(response)
            raise hub.explain_status(status, response.headers, self.where)
        if status == 200:
            length = response.headers.get("content-length", str(self.size))
            skip = start
        else:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("content-range", ""))
            if not match or int(match[1]) != start:
                raise hub.LaterError(
                    "the Hub sends other bytes than were asked for", file=self.where, hint="run the same command again"
                )
            length = match[2]
            skip = 0
        if length not in (str(self.size), "*"):
            raise self._other_size(length)
        if response.history and self._may_sign and _origin(response.url) != _origin(response.history[0].url):
            self._signed = str(response.url)
        return skip

    def _other_size(self, found: str) -> errors.DifferenceError:
        return errors.DifferenceError(
            "the Hub sends a file of another size than it lists",
            file=self.where,
            expected=f"{self.size} bytes",
            found=found or "another",
        )


def _origin(url: object) -> tuple[str, str]:
    parts = urlsplit(str(url))
    return parts.scheme, parts.netloc


class _Piece:
    # A part of the file that is on its way into a buffer.
    def __init__(self, position: int, buffer: Bytes, size: int) -> None:
        self.position = position
        self.buffer = buffer
        self.data = buffer[:size]
        self.ready = threading.Event()
        self.unwanted = threading.Event()
        self.error: BaseException | None = None


class RangeReader:
    """Reads a :class:`RemoteFile` from byte ``start`` on: in sequence from pieces that are fetched ahead; after a jump, just what is asked for."""

    def __init__(self, file: RemoteFile, start: int) -> None:
        self._file = file
        self._start = start
        self._next = start
        self._reading = threading.Lock()
        self._state = threading.Lock()  # For what the fetching threads, and who stops them, change too.
        self._stopped = threading.Event()
        self._held: dict[int, _Piece] = {}
        self._free: SimpleQueue[Bytes] = SimpleQueue()
        self._wanted: SimpleQueue[_Piece | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def read(self, position: int, out: Bytes) -> None:
        """Fill ``out`` with the bytes from ``position`` on, not before ``start``. Raises a Df11Error; from :meth:`stop` on also another error."""
        with self._reading:
            if position == self._next:
                self._read_ahead(position, out)
            else:
                self._file.fetch(position, out, self._stopped)
            self._next = position + len(out)

    def _read_ahead(self, position: int, out: Bytes) -> None:
        while len(out):
            index, offset = divmod(position - self._start, PIECE_BYTES)
            piece = self._get(index)
            piece.ready.wait()
            if self._stopped.is_set():
                raise _Stopped
            if piece.error is not None:
                raise piece.error
            chunk = piece.data[offset : offset + len(out)]
            out[: len(chunk)] = chunk
            out, position = out[len(chunk) :], position + len(chunk)
            if offset + len(chunk) == len(piece.data) and position < self._file.size:
                self._get(index + 1)  # Its buffer can be used again at once.

    def _get(self, index: int) -> _Piece:
        # The piece, asked for if it was not; so are the ones after it, as far as there are buffers, and others are dropped.
        if not self._threads:
            self._start_threads()
        size = self._file.size - self._start
        window = range(index, min(index + PIECES, -(-size // PIECE_BYTES)))
        for other in [other for other in self._held if other not in window]:
            self._drop(other)
        for wanted in window:
            if wanted not in self._held:
                try:
                    buffer = self._free.get(block=wanted == index)
                except Empty:
                    break
                piece = _Piece(
                    self._start + wanted * PIECE_BYTES, buffer, min(PIECE_BYTES, size - wanted * PIECE_BYTES)
                )
                with self._state:
                    self._held[wanted] = piece
                    if self._stopped.is_set():
                        raise _Stopped
                self._wanted.put(piece)
        return self._held[index]

    def _start_threads(self) -> None:
        for number in range(PIECES):
            self._free.put(np.empty(PIECE_BYTES, np.uint8))
            # Daemons: a server that is silent when the command is interrupted must not hold it up.
            thread = threading.Thread(target=self._work, name=f"df11-fetch-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while (piece := self._wanted.get()) is not None:
            try:
                if not piece.unwanted.is_set():
                    self._file.fetch(piece.position, piece.data, piece.unwanted)
            except BaseException as error:
                piece.error = error
            with self._state:
                piece.ready.set()
                if piece.unwanted.is_set():
                    self._free.put(piece.buffer)

    def _drop(self, index: int) -> None:
        with self._state:
            piece = self._held.pop(index)
            if piece.ready.is_set():
                self._free.put(piece.buffer)
            piece.unwanted.set()

    def stop(self) -> None:
        """Let nobody wait any longer: reads raise an error from now on."""
        with self._state:
            self._stopped.set()
            for piece in self._held.values():
                piece.unwanted.set()
                piece.ready.set()
        self._free.put(np.empty(0, np.uint8))  # For one who waits for a buffer, to notice.

    def close(self) -> None:
        """End the threads; one whose server is silent ends later, on its own."""
        self.stop()
        for _ in self._threads:
            self._wanted.put(None)
        end = time.monotonic() + LONGEST_CLOSE
        for thread in self._threads:
            thread.join(timeout=max(0.0, end - time.monotonic()))
