"""Reader of AEDAT4 (iniVation) with the library faery, the extra `cameras`.

faery reads packet by packet, so that a valid file needs little memory. It depends only on NumPy, has wheels for every
Python from 3.9 on, and is maintained by people of the field. Its licence is the LGPL 3; users install it beside
multifire, which does not contain it.

Some damaged files make it end the whole process (a panic during clean-up), or take seconds and gigabytes. So it runs in
a process of its own, which sends events through a pipe and is ended at its limits (in `aedat4_process.py`): 1 s of
computing for a packet; 1 s plus 1 s for each MB for the file; memory of ten times the file, at least 64 MB and at most
1 GB (enforced on Linux). However the process ends, a damaged file raises one ValueError. A valid file is decoded while
its events are counted in this process; starting takes a few tenths of a second.
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

import numpy as np

from multifire.events import aedat4_process
from multifire.events.aedat4_process import CUT, EVENT, EVENTS, HEAD, MB, WRONG
from multifire.events.columns import LATEST
from multifire.events.recording import Packed, Packer, Recording, Stray, check_side
from multifire.utils.log import log

INSTALL = "pip install 'multifire[cameras]'"

SILENCE_S = 60
"""Maximum time without a message from the process; its limits of computing time end it long before."""
MAGIC = b"#!AER-DAT4."
EVENTS_PER_BYTE = 2
"""Maximum events for a byte of the file; regular rows compress to 1.2."""
SMALL_FILE = 1 << 15  # smaller files count as this many bytes


def open_aedat4(path: Path, stray: Stray = "refuse") -> Recording:
    """Open an AEDAT4 recording.

    Raises:
        ValueError: the extra is not installed, the file is damaged, or it has events of no or of several cameras.
    """
    if importlib.util.find_spec("faery") is None:
        raise ValueError(f"{path}: reading AEDAT4 needs the library faery; {INSTALL}")
    if not path.is_file():  # the beginning of a pipe has already been read
        raise ValueError(f"{path}: AEDAT4 is read from a file of its own only; write it to one first")
    decoder = Decoder(path)
    try:
        found = json.loads(decoder.message()[1])
        width, height = found["width_height"]
        check_side(str(path), (height, width))
    except BaseException:
        decoder.close()
        raise
    packer = Packer(str(path), (height, width), stray)
    return Recording(str(path), "aedat4", (height, width), _packed(decoder, packer), decoder, packer=packer)


class Decoder:
    """The decoding process and its messages."""

    def __init__(self, path: Path):
        self.path = path
        self.bytes = path.stat().st_size
        self.most_events = EVENTS_PER_BYTE * max(self.bytes, SMALL_FILE)
        self._process = subprocess.Popen(  # noqa: S603 - no shell; the file's name is not an option
            [sys.executable, "-P", aedat4_process.__file__, path],  # -P: files beside it shadow no library
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "RUST_BACKTRACE": "0"},
            process_group=0,  # Ctrl-C reaches only this process, which then ends the other
        )
        assert self._process.stdout
        self._pipe = self._process.stdout.fileno()
        self._poll = select.poll()
        self._poll.register(self._pipe, select.POLLIN)

    def message(self) -> tuple[bytes, bytearray]:
        """Return letter and payload of the next message.

        Raises:
            ValueError: the process reports an error of the file, or has ended.
        """
        letter, length = HEAD.unpack(self._take(HEAD.size))
        payload = self._take(length)
        if letter == WRONG:
            raise ValueError(f"{self.path}: {_explained(payload.decode(errors='replace'))}")
        return letter, payload

    def _take(self, count: int) -> bytearray:
        data = bytearray(count)
        done = 0
        while done < count:
            if not any(
                self._poll.poll(1000) for _ in range(SILENCE_S)
            ):  # time in which this process is suspended counts once
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
            megabytes = aedat4_process.memory_for(self.bytes) // MB
            how = f"ends the process that decodes it ({signal.Signals(-code).name}), which may take {megabytes:,} MB"
        else:
            how = f"ends the process that decodes it (code {code})"
        return ValueError(f"{self.path}: {how}; the file is damaged")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()


def _explained(message: str) -> str:
    """Return the process's message; say what to do where faery refuses a file for an event beside the sensor."""
    if " overflow (" not in message:
        return message
    return (
        f"an event lies beside the sensor ({message.partition(' overflow (')[2].partition(')')[0]}), and the library "
        "faery refuses such a file, whatever --data.stray says; leave the event out with DV or dv-processing"
    )


def _packed(decoder: Decoder, packer: Packer) -> Iterator[Packed]:
    try:
        while (message := decoder.message())[0] == EVENTS:
            events = np.frombuffer(message[1], EVENT)
            t = events["t"].astype(np.int64)
            x, y = events["x"].astype(np.int32), events["y"].astype(np.int32)
            if len(t) and not (t.min() >= 0 and t.max() < LATEST):
                wrong = t.min() if t.min() < 0 else t.max()
                raise ValueError(
                    f"{decoder.path}: an event has the time {wrong:,} µs, expected 0 to 2^62; the file is damaged"
                )
            if packer.seen + len(t) > decoder.most_events:
                raise ValueError(
                    f"{decoder.path}: holds more than {decoder.most_events:,} events in {decoder.bytes:,} bytes, more "
                    "than any camera's; the file is damaged"
                )
            yield packer.pack(t, x, y, events["on"] != 0)
        if message[0] == CUT:
            log.warning("%s: cut short within a packet; all whole packets before it are kept", decoder.path)
    finally:
        decoder.close()
