"""Make splits of own arrays and torch data sets, check them, and describe what they hold.

Shapes: N samples, T time steps, C channels, H height, W width.
"""

from collections.abc import Sequence, Sized
from typing import Any, Literal, cast

import numpy as np

from multifire.datasets.registry import DatasetInfo
from multifire.datasets.splits import EventSplit, Split

Layout = Literal["NCHW", "NHWC"]
MAX_CHANNELS = 4
"""Number of channels of an image up to which its layout is told from its shape."""
BLOCK = 1024
"""Images that are measured at a time."""


def from_arrays(
    samples: Any, labels: Any, *, layout: Layout | None = None, where: str = "samples", labels_where: str = "labels"
) -> Split | EventSplit:
    """Return a split of own samples, without a copy where the arrays have the right types.

    Args:
        samples: images [N, C, H, W], [N, H, W, C] or [N, H, W], as bytes or as floats, which are used as they are; or
            event frames [N, T, 2, H, W], whose counts are whole numbers from 0 to 255. Arrays or tensors.
        labels: the class of each sample, whole numbers [N] or [N, 1] from 0 on.
        layout: order of the axes of images, needed where C is above 4 or where both ends could be channels.
        where: name of the samples in messages.
        labels_where: name of the labels in messages.

    Raises:
        ValueError: another shape or type, no samples, numbers that are not finite, or another number of labels.
    """
    array = _as_array(samples, where)
    if array.ndim not in (3, 4, 5) or min(array.shape) < 1:
        raise ValueError(
            f"{where} has the shape {list(array.shape)}, expected images [N, C, H, W], [N, H, W, C] or [N, H, W], "
            "or event frames [N, T, 2, H, W], with N >= 1"
        )
    numbers = check_labels(_as_array(labels, labels_where), len(array), where, labels_where)
    if array.ndim == 5:
        return _event_split(array, numbers, where)
    return Split(_pixels(_channels_first(array, layout, where), where), numbers)


def _as_array(values: Any, where: str) -> np.ndarray:
    if hasattr(values, "detach"):  # a tensor
        values = values.detach().cpu().numpy()
    try:
        array = np.asarray(values)
    except ValueError:  # lists of different lengths
        raise ValueError(f"{where}: its samples differ in shape, expected one array of numbers") from None
    if array.dtype.kind not in "buif":
        raise ValueError(f"{where} holds {array.dtype} values, expected numbers; nothing was unpickled")
    return array


def check_labels(labels: np.ndarray, count: int, where: str, labels_where: str) -> np.ndarray:
    """Return labels as int64 [count].

    Raises:
        ValueError: another shape, fractions, negative ones, or another number.
    """
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "bui":
        raise ValueError(
            f"{labels_where} is {labels.dtype} {list(labels.shape)}, expected whole numbers [N], one for each sample"
        )
    if len(labels) != count:
        raise ValueError(f"{where} holds {count:,} samples but {labels_where} {len(labels):,} labels; both must agree")
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= 1 << 31:
        wrong = int(np.flatnonzero((labels < 0) | (labels >= 1 << 31))[0])
        raise ValueError(f"{labels_where}: label {wrong:,} (the first is 0) is {labels[wrong]}, expected 0 or more")
    return labels.astype(np.int64)


def _channels_first(images: np.ndarray, layout: Layout | None, where: str) -> np.ndarray:
    if images.ndim == 3:
        return images[:, None]
    first, last = images.shape[1], images.shape[3]
    if layout is None:
        if (first <= MAX_CHANNELS) == (last <= MAX_CHANNELS):
            raise ValueError(
                f"{where} has the shape {list(images.shape)}: which axis holds the channels? Expected [N, C, H, W] or "
                f'[N, H, W, C] with C <= {MAX_CHANNELS} and larger images; from Python give layout="NCHW" or "NHWC"'
            )
        layout = "NCHW" if first <= MAX_CHANNELS else "NHWC"
    return images if layout == "NCHW" else images.transpose(0, 3, 1, 2)


def _pixels(images: np.ndarray, where: str) -> np.ndarray:
    """Return images as bytes if they are whole numbers, or else as float32."""
    if images.dtype.kind == "f":
        images = np.ascontiguousarray(images, dtype=np.float32)
        for start in range(0, len(images), BLOCK):
            if not np.isfinite(images[start : start + BLOCK]).all():
                raise ValueError(f"{where} holds values that are NaN, infinite or too large for float32; take them out")
        return images
    return np.ascontiguousarray(_bytes(images, where))


def _bytes(values: np.ndarray, where: str) -> np.ndarray:
    """Return whole numbers as bytes."""
    if values.dtype == np.uint8:
        return values
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 255):
        raise ValueError(f"{where} holds values from {low} to {high}, expected 0 to 255")
    return values.astype(np.uint8)


def _event_split(frames: np.ndarray, labels: np.ndarray, where: str) -> EventSplit:
    if frames.shape[2] != 2:
        raise ValueError(f"{where} has the shape {list(frames.shape)}, expected event frames [N, T, 2, H, W]")
    if frames.dtype.kind == "f":
        whole = all(
            (frames[i : i + BLOCK] == np.floor(frames[i : i + BLOCK])).all() for i in range(0, len(frames), BLOCK)
        )
        if not whole:
            raise ValueError(f"{where} holds fractions, expected counts of events, whole numbers from 0 to 255")
    frames = _bytes(frames, where)
    return EventSplit(frames, labels, np.array([f"{where} {i}" for i in range(len(labels))]), np.arange(len(labels)))


def from_dataset(dataset: Any, *, where: str = "the data set") -> Split | EventSplit:
    """Return a split with all samples of a torch Dataset of pairs (sample, label), read once into memory.

    Args:
        dataset: anything with a length and `dataset[i]` -> (sample, label). A sample is a tensor or array [C, H, W],
            [H, W] or [T, 2, H, W], or a Pillow image. What a random transform returns is kept for the whole run:
            give random changes as options of DataConfig, or as `augment`.
        where: name of the data set in messages.

    Raises:
        ValueError: no length, no samples, another kind of sample, or samples of different shapes.
    """
    if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
        raise ValueError(f"{where} is a {type(dataset).__name__}, expected a data set with a length and dataset[i]")
    if not len(dataset):
        raise ValueError(f"{where} holds no samples")
    samples, labels, first = None, [], None
    for i in range(len(dataset)):
        sample, label = _pair(cast(Any, dataset)[i], i, where)
        first = sample if first is None else first
        if sample.shape != first.shape or sample.dtype != first.dtype:
            raise ValueError(
                f"{where}: sample {i:,} is {sample.dtype} {list(sample.shape)}, the first is {first.dtype} "
                f"{list(first.shape)}; resize them to one shape"
            )
        if samples is None:
            samples = np.empty((len(dataset), *sample.shape), sample.dtype)
        samples[i] = sample
        labels.append(label)
    layout: Layout | None = "NCHW" if samples is not None and samples.ndim == 4 else None
    return from_arrays(samples, np.array(labels), layout=layout, where=where, labels_where=f"{where}'s labels")


def _pair(item: Any, i: int, where: str) -> tuple[np.ndarray, int]:
    """Return a sample, an image channels first, and its label."""
    if not isinstance(item, Sequence) or len(item) != 2:
        raise ValueError(f"{where}: item {i:,} is a {type(item).__name__}, expected a pair (sample, label)")
    sample, label = item
    if hasattr(sample, "getbands"):  # a Pillow image
        pixels = np.asarray(sample)
        return (pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)), _label(label, i, where)
    array = _as_array(sample, f"{where}: sample {i:,}")
    return array, _label(label, i, where)


def _label(label: Any, i: int, where: str) -> int:
    try:
        number = label.item() if hasattr(label, "item") else label
    except (ValueError, RuntimeError):
        number = label
    if isinstance(number, bool) or not isinstance(number, int):
        raise ValueError(f"{where}: label {i:,} is {str(label)[:40]!r}, expected a whole number")
    return number


def check_classes(train: Any, test: Any, classes: Sequence[str] | None, where: str) -> tuple[str, ...]:
    """Return the names of the classes; without names they are called by their numbers.

    Raises:
        ValueError: one class, a class without training samples, or a label beyond the classes.
    """
    present = np.unique(train.labels)
    count = int(present[-1]) + 1 if classes is None else len(classes)
    for part, name in ((train, "train"), (test, "test")):
        beyond = np.flatnonzero(part.labels >= count)
        if len(beyond):
            raise ValueError(
                f"{where}: {name} sample {beyond[0]:,} (the first is 0) has label {part.labels[beyond[0]]}, "
                f"expected 0 to {count - 1}, the {'classes' if classes else 'labels of the training samples'}"
            )
    if count < 2:
        raise ValueError(f"{where}: all training samples are of one class, expected at least two")
    if len(present) < count:
        missing = next(label for label in range(count) if label >= len(present) or present[label] != label)
        name = classes[missing] if classes else missing
        raise ValueError(
            f"{where}: class {name} has no training sample, expected labels 0 to {count - 1}, each at least once; "
            "number the classes from 0 without gaps"
        )
    return tuple(classes) if classes else tuple(map(str, range(count)))


def describe_splits(
    train: Any, test: Any, *, classes: Sequence[str] | None = None, about: str = "own data", where: str = "the data set"
) -> DatasetInfo:
    """Return the description of two splits: classes, channels, sizes, and mean and deviation of the training images.

    Raises:
        ValueError: the splits do not fit each other, or see `check_classes`.
    """
    names = check_classes(train, test, classes, where)
    events = isinstance(train, EventSplit)
    if events != isinstance(test, EventSplit):
        raise ValueError(f"{where}: one of train and test holds event frames and the other images")
    shapes = [part.frames.shape[1:] if events else part.images.shape[1:] for part in (train, test)]
    types = [part.frames.dtype if events else part.images.dtype for part in (train, test)]
    if shapes[0] != shapes[1] or types[0] != types[1]:
        raise ValueError(
            f"{where}: training samples are {types[0]} {list(shapes[0])}, test samples {types[1]} {list(shapes[1])}; "
            "both must agree"
        )
    channels, height, width = shapes[0][-3:]
    mean, std = ((), ()) if events else measure(train.images)
    return DatasetInfo(
        about=about,
        channels=channels,
        size=height,
        classes=names,
        mean=mean,
        std=std,
        published_sizes=(len(train), len(test)),
        events=events,
        width=width if width != height else None,
        timesteps=shapes[0][0] if events else None,
    )


def measure(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of images [N, C, H, W], bytes as 0..1; 1 if it is constant.

    Bytes are counted, so that the result does not depend on an order of sums.
    """
    channels = images.shape[1]
    if images.dtype == np.uint8:
        counts = np.zeros((channels, 256), np.int64)
        for start in range(0, len(images), BLOCK):
            for channel in range(channels):
                values = images[start : start + BLOCK, channel]
                counts[channel] += np.bincount(values.ravel(), minlength=256)
        values, total = np.arange(256) / 255, counts.sum(1)
        mean = counts @ values / total
        variance = counts @ values**2 / total - mean**2
    else:
        sums = np.zeros((2, channels))
        for start in range(0, len(images), BLOCK):
            block = images[start : start + BLOCK].astype(np.float64)
            sums += block.sum((0, 2, 3)), (block**2).sum((0, 2, 3))
        mean, square = sums / (images.size / channels)
        variance = square - mean**2
    std = np.sqrt(np.maximum(variance, 0))
    std = np.where(std > 1e-6 * np.maximum(np.abs(mean), 1e-6), std, 1.0)
    return tuple(map(float, mean)), tuple(map(float, std))


def normalise(images: np.ndarray, info: DatasetInfo) -> np.ndarray:
    """Return images as networks see them in training.

        x = (image / 255 - mean) / std   for each channel; images of floats are not divided by 255

    Args:
        images: [..., C, H, W], whole numbers from 0 to 255, or floats.
        info: the data set's mean and deviation.

    Returns:
        x [..., C, H, W] float32.

    Raises:
        ValueError: another number of channels.
    """
    if images.ndim < 3 or images.shape[-3] != info.channels:
        raise ValueError(f"found the shape {list(images.shape)}, expected [..., C, H, W] with C = {info.channels}")
    mean_C11, std_C11 = (np.array(values, np.float32)[:, None, None] for values in (info.mean, info.std))
    largest = 1 if images.dtype.kind == "f" else 255
    return images.astype(np.float32) * (1 / (largest * std_C11)) - mean_C11 / std_C11
