"""Reader of AEDAT4 (iniVation) and of EVT2 and EVT3 (Prophesee), by the library faery: the extra `cameras`.

Why faery: it alone reads both families (`aedat` and `dv-processing` read AEDAT4 and nothing of Prophesee's), packet by
packet, so that a sound file needs little memory; it needs NumPy alone, comes as a wheel for every Python from 3.9 on,
and is kept by people of the field. It is under the LGPL 3, as a library that a user installs beside multifire, and is
no part of it.

A damaged file ends in a ValueError here too, but what the library does before that is its own: of 300 damaged AEDAT4
files of 9 KB, faery 0.7.1 took up to 3.6 s and 2.5 GB for one, and some end the whole process (a panic while it cleans
up after another). Read AEDAT4 from strangers in a process of its own, under a limit of memory.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from multifire.events.recording import Packed, Recording, pack

INSTALL = "pip install 'multifire[cameras]'"


def kind_of(head: bytes) -> str | None:
    """ "aedat4" or "evt" where a file that begins with `head` is one of them."""
    if head.startswith(b"#!AER-DAT4."):
        return "aedat4"
    if head.startswith(b"%") and re.search(rb"^% *(?:format *EVT|evt )[23]", head, re.MULTILINE | re.IGNORECASE):
        return "evt"
    return None


def open_camera_file(path: Path, kind: str) -> Recording:
    """Open a recording of `kind`, as `kind_of` told it.

    Raises:
        ValueError: the extra is not installed, the file is damaged, or it holds the events of no or several cameras.
    """
    try:
        import faery  # pyright: ignore[reportMissingImports] - an extra
    except ImportError:
        raise ValueError(f"{path}: reading {kind} needs the library faery; {INSTALL}") from None
    with _told(path):
        if kind == "aedat4":
            decoder = faery.aedat.Decoder(path)
            tracks = [track for track in decoder.tracks() if track.data_type == "events"]
            if len(tracks) != 1:
                raise ValueError(f"holds the events of {len(tracks)} cameras, expected one")
            (width, height), events = tracks[0].dimensions, _of_aedat4(decoder)
        else:
            decoder = faery.evt.Decoder(path, None, None)
            (width, height), events = decoder.dimensions, _of_evt(decoder)
            kind = decoder.version
    return Recording(str(path), kind, (height, width), _packed(path, (height, width), events))


def _of_aedat4(decoder: Any) -> Iterator[np.ndarray]:
    for track, packet in decoder:
        if track.data_type == "events":
            yield packet


def _of_evt(decoder: Any) -> Iterator[np.ndarray]:
    for packet in decoder:
        if "events" in packet:
            yield packet["events"]


def _packed(path: Path, size: tuple[int, int], packets: Iterator[np.ndarray]) -> Iterator[Packed]:
    first = 0
    while True:
        with _told(path):
            events = next(packets, None)
        if events is None:
            return
        t, x, y, p = (events[name].astype(np.int64) for name in ("t", "x", "y", "on"))
        yield pack(str(path), size, first, t, x, y, p)
        first += len(t)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the library raises, as a ValueError that names the file."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{path}: {error}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # how Rust fails: of no class that can be imported
            raise
        raise ValueError(f"{path}: damaged ({error})") from None
