"""The native engine: runs exported int8 networks without torch, one call for each frame.

Shapes: T time steps, N samples, C channels, H rows, W columns, L classes.
"""

import ctypes
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LIBRARY = Path(os.environ.get("MULTIFIRE_ENGINE_LIBRARY", Path(__file__).with_name("_engine.so")))
NOT_BUILT = "the engine was not built when multifire was installed; install a C++ compiler, then multifire again"
STEPS_AT_ONCE = 16
"""Number of frames of a sample that `Engine.run` computes layer by layer; longer samples are cut."""

_Pointer = ctypes.c_void_p


class Info(NamedTuple):
    """What a network is."""

    in_channels: int
    classes: int
    levels: int
    layers: int
    """Number of layers of neurons."""
    counts: bool
    """True if frames are event counts, False if they are images."""
    size: tuple[int, int] | None
    """H, W of the stream's frames; None before the first frame, if neither the file nor the user said it."""
    bytes: int
    """Memory for weights, membranes and activations."""
    isa: str
    """Instruction set in use."""


class Layer(NamedTuple):
    """What a layer of the stream has computed since the first frame."""

    name: str
    shape: tuple[int, int, int, int]
    """Membranes, C, H, W."""
    frames: int
    sparse_frames: int
    """Frames that were computed from the list of non-zero inputs."""
    density: float | None
    """Fraction of the pairs or fours of input channels that were not zero; None if they were not counted."""


class _Info(ctypes.Structure):
    """`multifire_info` of multifire_engine.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("in_channels", "classes", "levels", "layers", "counts")),
        *((name, ctypes.c_int64) for name in ("height", "width", "bytes")),
        ("isa", ctypes.c_char_p),
    )


class _LayerInfo(ctypes.Structure):
    """`multifire_layer_info` of multifire_engine.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        *((name, ctypes.c_int64) for name in ("membranes", "channels", "height", "width", "frames", "sparse_frames")),
        ("density", ctypes.c_double),
    )


EVENT = np.dtype([("x", np.int32), ("y", np.int32), ("p", np.int32), ("count", np.int32)])
"""`multifire_event` of multifire_engine.h."""
_ARGUMENTS = {
    "load_file": (ctypes.c_char_p, _Pointer),
    "clone": (_Pointer, _Pointer),
    "prepare": (_Pointer, *[ctypes.c_int64] * 3),
    "reset": (_Pointer,),
    "step": (_Pointer, _Pointer, _Pointer),
    "step_events": (_Pointer, _Pointer, ctypes.c_size_t, _Pointer),
    "run": (_Pointer, _Pointer, *[ctypes.c_int64] * 4, _Pointer, _Pointer),
    "info": (_Pointer, _Pointer),
    "layer": (_Pointer, ctypes.c_int64, _Pointer),
    "state": (_Pointer, ctypes.c_int64, _Pointer),
}
_ERRORS = {1: FileNotFoundError, 2: ValueError, 3: ValueError, 4: MemoryError, 5: RuntimeError}


def _open_library() -> ctypes.CDLL | None:
    if not LIBRARY.exists():
        return None
    library = ctypes.CDLL(str(LIBRARY))
    for name, arguments in _ARGUMENTS.items():
        getattr(library, f"multifire_engine_{name}").argtypes = arguments
    library.multifire_engine_free.argtypes = (_Pointer,)
    library.multifire_engine_error.restype = ctypes.c_char_p
    return library


_LIBRARY = _open_library()


def is_built() -> bool:
    """Return True if the engine was compiled when the package was installed."""
    return _LIBRARY is not None


def _call(name: str, *arguments: Any, source: str = "") -> None:
    """Call a function of the engine; raise what its status stands for."""
    assert _LIBRARY is not None
    status = getattr(_LIBRARY, f"multifire_engine_{name}")(*arguments)
    if status:
        text = _LIBRARY.multifire_engine_error().decode(errors="replace")
        raise _ERRORS[status](f"{source}: {text}" if source and status == 2 else text)


class _Handle:
    """An engine of the library, prepared for frames of one size."""

    def __init__(self, pointer: ctypes.c_void_p):
        assert _LIBRARY is not None
        self.pointer, self._free = pointer, _LIBRARY.multifire_engine_free
        self._prepared: tuple[int, int, int] | None = None

    def __del__(self):
        self._free(self.pointer)

    def clone(self) -> "_Handle":
        pointer = ctypes.c_void_p()
        _call("clone", self.pointer, ctypes.byref(pointer))
        return _Handle(pointer)

    def prepare(self, size: tuple[int, int], steps: int) -> None:
        if self._prepared != (*size, steps):
            self._prepared = None
            _call("prepare", self.pointer, *size, steps)
            self._prepared = (*size, steps)

    def info(self) -> _Info:
        info = _Info()
        _call("info", self.pointer, ctypes.byref(info))
        return info


class Engine:
    """An int8 network that was exported by `multifire export RUN --to int8`, computed by the native engine.

    It computes the same bits as `mf.load_int8`. One engine is for one thread at a time.
    """

    def __init__(self, handle: _Handle, size: tuple[int, int] | None):
        self._handle, self._size = handle, size
        info = handle.info()
        self._channels, self._classes, self._counts = info.in_channels, info.classes, bool(info.counts)
        self._runners: list[_Handle] = []
        self._known_size = size

    @property
    def info(self) -> Info:
        """What the network is."""
        info = self._handle.info()
        size = (info.height, info.width) if info.height else self._size
        return Info(
            info.in_channels, info.classes, info.levels, info.layers, bool(info.counts), size, info.bytes,
            info.isa.decode(),
        )  # fmt: skip

    def reset(self) -> None:
        """Begin a new sample: set all membranes to zero."""
        if self._size is not None:
            self._handle.prepare(self._size, 1)
            _call("reset", self._handle.pointer)

    def step(self, frame_CHW: np.ndarray) -> np.ndarray:
        """Compute one frame of a stream; return the mean logits [L] of the frames since the reset.

        Raises:
            ValueError: not a frame [C, H, W] of finite numbers, of another size than the stream's first frame, or not
                event counts where the network expects them.
        """
        frame_CHW = self._floats(frame_CHW)
        if frame_CHW.ndim != 3 or frame_CHW.shape[0] != self._channels:
            raise ValueError(f"frame has shape {frame_CHW.shape}, expected [{self._channels}, H, W]")
        self._prepare_stream(frame_CHW.shape[1:])
        logits_L = np.empty(self._classes, np.float32)
        _call("step", self._handle.pointer, frame_CHW.ctypes.data, logits_L.ctypes.data)
        return logits_L

    def step_events(self, events: np.ndarray) -> np.ndarray:
        """Compute one frame of a stream, given as its events; return the mean logits [L] since the reset.

        Args:
            events: structured array with the fields x (column), y (row) and p (polarity) of a frame's cells, and
                optionally count; events of the same cell add up.

        Raises:
            ValueError: other fields, an event outside of the frame, or the size of the frames is not known.
        """
        events = _as_events(np.asarray(events))
        if self._size is None:
            raise ValueError("the size of the frames is not known; pass size=(H, W) to load")
        self._prepare_stream(self._size)
        events = np.ascontiguousarray(events)
        logits_L = np.empty(self._classes, np.float32)
        _call("step_events", self._handle.pointer, events.ctypes.data, len(events), logits_L.ctypes.data)
        return logits_L

    def run(self, frames_TNCHW: np.ndarray, *, per_step: bool = False, threads: int = 1) -> np.ndarray:
        """Return the logits [N, L] of samples; with `per_step`, those of each time step [T, N, L].

        It does not touch the stream. A still image is an array whose first dimension was broadcast.

        Args:
            frames_TNCHW: the samples.
            per_step: return the logits of each time step, not averaged.
            threads: number of threads, each of which computes a part of the samples.

        Raises:
            ValueError: not [T, N, C, H, W] of finite numbers, or not event counts where the network expects them.
        """
        frames_TNCHW = np.asarray(frames_TNCHW)
        if frames_TNCHW.ndim != 5 or frames_TNCHW.shape[0] < 1 or frames_TNCHW.shape[2] != self._channels:
            raise ValueError(f"frames have shape {frames_TNCHW.shape}, expected [T, N, {self._channels}, H, W]")
        if threads < 1:
            raise ValueError(f"threads is {threads}, expected at least 1")
        timesteps, samples, *_, height, width = frames_TNCHW.shape
        is_static = timesteps > 1 and frames_TNCHW.strides[0] == 0
        _check_size("frames are", (height, width), self._known_size)
        frames_TNCHW = self._floats(frames_TNCHW[:1] if is_static else frames_TNCHW)
        means_NL = np.empty((samples, self._classes), np.float32)
        logits_TNL = np.empty((timesteps, samples, self._classes), np.float32) if per_step else None
        parts = np.array_split(np.arange(samples), max(1, min(threads, samples)))
        while len(self._runners) < len(parts):
            self._runners.append(self._handle.clone())

        def compute(number: int) -> None:
            if len(part := parts[number]):
                handle, part = self._runners[number], slice(part[0], part[-1] + 1)
                handle.prepare((height, width), min(timesteps, STEPS_AT_ONCE))
                each = self._run(handle, frames_TNCHW[:, part], timesteps, means_NL[part], per_step)
                if logits_TNL is not None:
                    logits_TNL[:, part] = each

        if len(parts) == 1:
            compute(0)
        else:
            with ThreadPoolExecutor(len(parts)) as pool:
                list(pool.map(compute, range(len(parts))))
        return means_NL if logits_TNL is None else logits_TNL

    def _run(
        self, handle: _Handle, frames: np.ndarray, timesteps: int, means_NL: np.ndarray, per_step: bool
    ) -> np.ndarray | None:
        logits_TNL = np.empty((timesteps, *means_NL.shape), np.float32) if per_step else None
        time_stride = 0 if len(frames) < timesteps else frames.strides[0] // 4
        _call(
            "run", handle.pointer, frames.ctypes.data, timesteps, len(means_NL), time_stride, frames.strides[1] // 4,
            means_NL.ctypes.data, None if logits_TNL is None else logits_TNL.ctypes.data,
        )  # fmt: skip
        return logits_TNL

    def layers(self) -> list[Layer]:
        """Return what the layers of the stream have computed, in order of computation.

        Raises:
            ValueError: the stream has computed no frame.
        """
        self._require_stream()
        return [
            Layer(
                found.name.decode(),
                (found.membranes, found.channels, found.height, found.width),
                found.frames,
                found.sparse_frames,
                None if found.density < 0 else found.density,
            )
            for found in map(self._layer, range(self._handle.info().layers))
        ]

    def states(self) -> dict[str, np.ndarray]:
        """Return the membranes [K or 1, C, H, W] of each layer of the stream after the last step, by its name.

        Raises:
            ValueError: the stream has computed no frame.
        """
        self._require_stream()
        states = {}
        for number in range(self._handle.info().layers):
            found = self._layer(number)
            state = np.empty((found.membranes, found.channels, found.height, found.width), np.float32)
            _call("state", self._handle.pointer, number, state.ctypes.data)
            states[found.name.decode()] = state
        return states

    def _require_stream(self) -> None:
        if self._handle.info().height == 0:
            raise ValueError("the stream has computed no frame; call step() first, since run() does not count")

    def _layer(self, number: int) -> _LayerInfo:
        found = _LayerInfo()
        _call("layer", self._handle.pointer, number, ctypes.byref(found))
        return found

    def _floats(self, array: np.ndarray) -> np.ndarray:
        array = np.asarray(array)
        if array.dtype.kind not in "buif":
            raise ValueError(f"found values of type {array.dtype}, expected numbers")
        if not self._counts and array.dtype.kind != "f":
            raise ValueError(
                f"found pixels of type {array.dtype}, expected the floats on which the network was trained: "
                "(pixel / 255 - mean) / std, as mf.datasets.normalise makes them from its data"
            )
        return np.ascontiguousarray(array, np.float32)

    def _prepare_stream(self, size: tuple[int, ...]) -> None:
        height, width = size
        _check_size("frame is", (height, width), self._size)
        self._handle.prepare((height, width), 1)
        self._size = (height, width)


def load(path: str | Path, size: tuple[int, int] | None = None) -> Engine:
    """Load an int8 network that `multifire export RUN --to int8` wrote.

    Args:
        path: the file.
        size: H, W of the frames of a stream; None: that of training where the file says it, else of the first frame.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or a network that the engine does not run.
        RuntimeError: the engine is not built.
    """
    if _LIBRARY is None:
        raise RuntimeError(NOT_BUILT)
    pointer = ctypes.c_void_p()
    _call("load_file", os.fsencode(path), ctypes.byref(pointer), source=str(path))
    handle = _Handle(pointer)
    return Engine(handle, _trained_size(Path(path), bool(handle.info().counts)) if size is None else (size[0], size[1]))


def _trained_size(path: Path, counts: bool) -> tuple[int, int] | None:
    """Return the size of the frames that the file's network was trained on, if the file says it."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
    try:
        data = json.loads(header["provenance"])["config"]["data"]
        size = [data["frame_size"]] * 2 if counts else data["shape"][-2:]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(size) if len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size) else None


def _check_size(what: str, found: tuple[int, int], expected: tuple[int, int] | None) -> None:
    if expected not in (None, found):
        raise ValueError(f"{what} of size {found[0]} x {found[1]}, expected {expected[0]} x {expected[1]}")


def _as_events(events: np.ndarray) -> np.ndarray:
    if events.dtype == EVENT and events.ndim == 1:
        return events
    names = events.dtype.names or ()
    if events.ndim != 1 or not {"x", "y", "p"} <= set(names):
        found = f"events have the fields {names} and {events.ndim} dimensions"
        raise ValueError(f"{found}, expected x, y, p, and optionally count, and one dimension")
    cells = np.ones(len(events), EVENT)
    for name in EVENT.names or ():
        if name in names:
            cells[name] = events[name]
            if not np.array_equal(cells[name], events[name]):
                raise ValueError(f"{name} of the events, {events.dtype[name]}, is not integers of 32 bits")
    return cells
