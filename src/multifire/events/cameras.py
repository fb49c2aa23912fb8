"""Reader of AEDAT4 (iniVation) and of EVT2 and EVT3 (Prophesee), by the library faery: the extra `cameras`.

Why faery: it alone reads both families (`aedat` and `dv-processing` read AEDAT4 and nothing of Prophesee's), packet by
packet, so that a sound file needs little memory; it needs NumPy alone, comes as a wheel for every Python from 3.9 on,
and is kept by people of the field. It is under the LGPL 3, as a library that a user installs beside multifire, and is
no part of it.

Some damaged files make it end the whole process (a panic while it cleans up after another), or take seconds and
gigabytes. So it runs in a process of its own, which sends the events through a pipe and is ended where it passes a
limit (they stand in `camera_process.py`): computing, 1 s for a packet, 1 s and 1 s more for each MB for the file;
memory, ten times the file, but 64 MB at least and 1 GB at most (on Linux; other systems do not hold to it). Whatever
ends it, this process raises one ValueError. A sound file is decoded while its events are counted here; to start costs
a few tenths of a second.
"""

import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from re import IGNORECASE, MULTILINE, search

import numpy as np

from multifire.events import camera_process
from multifire.events.camera_process import CUT, EVENT, EVENTS, HEAD, MB, WRONG
from multifire.events.recording import Packed, Recording, pack
from multifire.utils.log import log

INSTALL = "pip install 'multifire[cameras]'"

SILENCE_S = 60
"""Without a sign of life from the process, on a machine however busy: its limits of computing come long before."""
MOST_PIXELS = 4096
"""Of a side of a sensor; no camera has more, and frames take a table of all pixels."""
EVENTS_PER_BYTE = {"aedat4": 2, "evt": 6}
"""At most. EVT3 packs 32 events in 6 bytes; AEDAT4 is compressed, a row that lights up regularly to 1.2 for a byte."""
SMALL_FILE = 1 << 15  # bytes that a smaller one counts as


def kind_of(head: bytes) -> str | None:
    """ "aedat4" or "evt" where a file that begins with `head` is one of them."""
    if head.startswith(b"#!AER-DAT4."):
        return "aedat4"
    if head.startswith(b"%") and search(rb"^% *(?:format *EVT|evt )[23]", head, MULTILINE | IGNORECASE):
        return "evt"
    return None


def open_camera_file(path: Path, kind: str) -> Recording:
    """Open a recording of `kind`, as `kind_of` told it.

    Raises:
        ValueError: the extra is not installed, the file is damaged, or it holds the events of no or several cameras.
    """
    if importlib.util.find_spec("faery") is None:
        raise ValueError(f"{path}: reading {kind} needs the library faery; {INSTALL}")
    if not path.is_file():  # what came first of a pipe is already read
        raise ValueError(f"{path}: {kind} is read from a file of its own only; write it to one first")
    decoder = Decoder(path, kind)
    try:
        found = json.loads(decoder.message()[1])
        width, height = found["width_height"]
        if not (0 < width <= MOST_PIXELS and 0 < height <= MOST_PIXELS):
            raise ValueError(
                f"{path}: says that its sensor has {width} × {height} pixels, expected 1 to {MOST_PIXELS} a side; "
                "the file is damaged"
            )
    except BaseException:
        decoder.close()
        raise
    return Recording(str(path), found["format"], (height, width), _packed(decoder, (height, width)), decoder)


class Decoder:
    """The process that decodes a file, and its messages."""

    def __init__(self, path: Path, kind: str):
        self.path = path
        self.bytes = path.stat().st_size
        self.most_events = EVENTS_PER_BYTE[kind] * max(self.bytes, SMALL_FILE)
        self._process = subprocess.Popen(  # noqa: S603 - no shell, and the file's name is no option
            [sys.executable, "-P", camera_process.__file__, kind, path],  # -P: what lies beside it hides no library
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "RUST_BACKTRACE": "0"},
            process_group=0,  # Ctrl-C is for this process, which then ends that one
        )
        assert self._process.stdout
        self._pipe = self._process.stdout.fileno()
        self._poll = select.poll()
        self._poll.register(self._pipe, select.POLLIN)

    def message(self) -> tuple[bytes, bytearray]:
        """The next one's letter and payload.

        Raises:
            ValueError: the process says what is wrong with the file, or has ended.
        """
        letter, length = HEAD.unpack(self._take(HEAD.size))
        payload = self._take(length)
        if letter == WRONG:
            raise ValueError(f"{self.path}: {payload.decode(errors='replace')}")
        return letter, payload

    def _take(self, count: int) -> bytearray:
        data = bytearray(count)
        done = 0
        while done < count:
            if not any(self._poll.poll(1000) for _ in range(SILENCE_S)):  # what this process is stopped for counts once
                raise ValueError(f"{self.path}: nothing could be read of it for {SILENCE_S} s; is its disk at fault?")
            got = os.readv(self._pipe, [memoryview(data)[done:]])
            if not got:
                raise self._ended()
            done += got
        return data

    def _ended(self) -> ValueError:
        code = self._process.wait()
        if -code == signal.SIGPROF:
            how = "takes far longer to decode than a sound file of its size"
        elif code < 0:
            megabytes = camera_process.memory_for(self.bytes) // MB
            how = f"ends the process that decodes it ({signal.Signals(-code).name}), which may take {megabytes:,} MB"
        else:
            how = f"ends the process that decodes it (code {code})"
        return ValueError(f"{self.path}: {how}; the file is damaged")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()


def _packed(decoder: Decoder, size: tuple[int, int]) -> Iterator[Packed]:
    first = 0
    try:
        while (message := decoder.message())[0] == EVENTS:
            events = np.frombuffer(message[1], EVENT)
            t = events["t"].astype(np.int64)
            x, y = events["x"].astype(np.int32), events["y"].astype(np.int32)
            if len(t) and t.min() < 0:
                raise ValueError(f"{decoder.path}: an event has the time {t.min():,} µs; the file is damaged")
            if first + len(t) > decoder.most_events:
                raise ValueError(
                    f"{decoder.path}: holds more than {decoder.most_events:,} events in {decoder.bytes:,} bytes, more "
                    "than any camera's; the file is damaged"
                )
            yield pack(str(decoder.path), size, first, t, x, y, events["on"] != 0)
            first += len(t)
        if message[0] == CUT:
            log.warning("%s: cut short within a packet; all whole packets before it are kept", decoder.path)
    finally:
        decoder.close()
