"""Show prepared events: counts and rates, a contact sheet, an animation."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from multifire.config import DataConfig
from multifire.datasets import own_recordings
from multifire.datasets.cache import OWN, SPLITS, cache_folder, frame_options, open_split, read_record
from multifire.datasets.registry import DatasetInfo, get_info
from multifire.datasets.splits import EventSplit
from multifire.events.frames import say_fit
from multifire.utils import images

SAMPLES_OF_A_CLASS = 8
WIDTH = 256
"""Minimum width of an animation in pixels."""


@dataclass(frozen=True)
class ClassFigures:
    name: str
    train: int
    test: int
    events: float
    """Mean number of events of a sample."""
    rate: float
    """Mean events per second."""


@dataclass(frozen=True)
class Figures:
    simulated: bool
    frames: str
    train: int
    test: int
    rows: list[ClassFigures]
    lines: list[str]


def describe(cfg: DataConfig, folder: Path) -> Figures:
    """Return counts and event rates from the cache's record.

    Raises:
        FileNotFoundError, ValueError: see `multifire.datasets.cache.read_record`.
    """
    info, record = _info(cfg), read_record(folder, cfg, Path(cfg.root))
    train, test = (record.splits[split] for split in SPLITS)
    labels, events, span_us, clipped = (
        np.array([*getattr(train, name), *getattr(test, name)]) for name in ("labels", "events", "span_us", "clipped")
    )
    rows = []
    for label, name in enumerate(info.classes):
        of_class = labels == label
        seconds = max(span_us[of_class].sum() / 1e6, 1e-6)
        rows.append(
            ClassFigures(
                name,
                train.labels.count(label),
                test.labels.count(label),
                float(events[of_class].mean()) if of_class.any() else 0.0,
                float(events[of_class].sum() / seconds),
            )
        )
    slices = f"of {cfg.duration_us / 1000:g} ms" if cfg.slicing == "duration" else f"of equal {cfg.slicing}"
    fit = say_fit(info.height_width, frame_options(cfg))
    lines = [
        f"sensor {info.width or info.size}×{info.size}{f', {fit}' * bool(fit)}, "
        f"frames [T, 2, H, W] = [{', '.join(map(str, train.shape[1:]))}], {slices}",
        f"made from {', '.join(record.source_names)}; cells that saw more than 255 events: {clipped.sum():,}",
    ]
    if info.simulated:
        lines.append("these events are simulated")
    frames = f"{cfg.timesteps} frames of {cfg.frame_size}×{cfg.frame_size}"
    return Figures(info.simulated, frames, len(train.labels), len(test.labels), rows, lines)


def contact_sheet(cfg: DataConfig, folder: Path) -> Path:
    """Write a picture with the frame of most events of the first samples of each class; return its file."""
    split = _open(cfg, folder, "train")
    rows = []
    for label in range(len(_info(cfg).classes)):
        chosen = split.rows[split.labels == label][:SAMPLES_OF_A_CLASS]
        rows.append([images.paint(_busiest(split.frames[row])) for row in chosen])
    path = folder / "contact-sheet.png"
    images.save(path, images.enlarge(images.tile(rows), 4 * WIDTH)[None], 0)
    return path


def _busiest(frames_TCHW: np.ndarray) -> np.ndarray:
    return frames_TCHW[frames_TCHW.sum((1, 2, 3), dtype=np.int64).argmax()]


def animate(cfg: DataConfig, name: str, index: int, out: Path) -> str:
    """Write sample `index` of a split as an animation to `out`; return a description of the sample.

    Raises:
        ValueError: no such sample, or `out` ends in neither .gif nor .png.
    """
    split = _open(cfg, cache_folder(cfg, Path(cfg.root)), name)
    if not 0 <= index < len(split):
        raise ValueError(f"sample {index}, expected 0 to {len(split) - 1:,} of {cfg.name}'s {name} split")
    frames = images.paint(np.asarray(split.frames[split.rows[index]]))
    milliseconds = max(round(cfg.duration_us / 1000), 50) if cfg.slicing == "duration" else 100
    images.save(out, images.enlarge(frames, WIDTH), milliseconds)
    info = _info(cfg)
    simulated = ", simulated" if info.simulated else ""
    return f"{split.names[index]}: {info.classes[split.labels[index]]}{simulated}"


def _info(cfg: DataConfig) -> DatasetInfo:
    return own_recordings.describe(Path(cfg.root), cfg) if cfg.name == OWN else get_info(cfg.name)


def _open(cfg: DataConfig, folder: Path, name: str) -> EventSplit:
    root = Path(cfg.root)
    return open_split(folder, name, read_record(folder, cfg, root), cfg, root)
