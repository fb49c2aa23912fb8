"""Load a data set by name, or make one of own arrays; describe it to a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from multifire.config import RECIPES, DataConfig, RunConfig, get_recipe
from multifire.config.architecture import GIVEN
from multifire.datasets.registry import OWN_DATA, REGISTERED, DatasetInfo, get_info, is_own
from multifire.datasets.splits import EventSplit, Split
from multifire.utils.log import log


@dataclass(frozen=True)
class Dataset:
    """A data set in memory, or mapped into it."""

    name: str
    info: DatasetInfo
    train: Any
    """A Split, or an EventSplit if `info.events`."""
    test: Any
    """A Split or EventSplit, like `train`."""
    augment: Callable[..., Any] | None = None
    """Called on the training batches, see `multifire.datasets.loader.Augment`."""


def load(name: str, root: str | Path = "data", cfg: DataConfig | None = None) -> Dataset:
    """Load a data set from `root/name`, or from `root` if its files lie there; prepared events are memory-mapped.

    Args:
        name: one of DATASETS or OWN_DATA, or a name that `register_dataset` has registered.
        root: folder of the data sets, or the .npz file; not used for embedded ones.
        cfg: how recordings are cut into frames (default: that of the recipe of the same name), what own data must be.

    Raises:
        ValueError: an unknown data set, one that was given as an object, or a damaged file; names the file and the
            damage.
        FileNotFoundError: missing, incomplete or unprepared files; names the searched folders and what to do.
    """
    if name.startswith(GIVEN):
        raise ValueError(
            f"the data set {name.removeprefix(GIVEN)!r} was given to mf.train as an object, so its run cannot load it; "
            "register it in a recipe file with @mf.register_dataset"
        )
    if cfg is None:
        cfg = get_recipe(name).data if name in RECIPES else DataConfig(name=name)
    if is_own(name):
        return _load_own(name, Path(root), cfg)
    info = get_info(name)
    _refuse_options(cfg, "classes", "shape", "size", "channels", "sensor")
    if info.events:
        from multifire.datasets import cache

        train, test = cache.load(name, Path(root), cfg)
    else:
        from multifire.datasets import images

        train, test = (Split(*arrays) for arrays in images.read(name, info, Path(root)))
    if not info.is_published(len(train), len(test)):
        log.warning(
            "%s holds %s training and %s test samples; the published data set has %s and %s",
            name, *(f"{count:,}" for count in (len(train), len(test), *info.published_sizes)),
        )  # fmt: skip
    return Dataset(name, _normalised(info, cfg), train, test)


def _refuse_options(cfg: DataConfig, *names: str) -> None:
    for name in names:
        if getattr(cfg, name) is not None:
            raise ValueError(f"data.{name} is given, but has no effect for {cfg.name}; leave it out")


def _load_own(name: str, root: Path, cfg: DataConfig) -> Dataset:
    if name in REGISTERED:
        data = _registered(name, cfg)
    elif name == "recordings":
        from multifire.datasets import cache, own_recordings

        _refuse_options(cfg, "size", "channels")
        info, splits = own_recordings.describe(root, cfg), cache.load(name, root, cfg)
        data = Dataset(name, *own_recordings.in_order(cfg.classes, info, *splits))
    elif name == "npz":
        from multifire.datasets import npz

        _refuse_options(cfg, "size", "channels", "sensor")
        train, test, classes, where = npz.read(root, cfg)
        data = make_dataset(name, train, test, classes=cfg.classes or classes, about=OWN_DATA[name], where=where)
    else:
        from multifire.datasets import pictures

        _refuse_options(cfg, "sensor")
        train, test, info = pictures.read(root, cfg)
        data = Dataset(name, info, train, test)
    return _as_expected(data, cfg)


def _registered(name: str, cfg: DataConfig) -> Dataset:
    made = REGISTERED[name](cfg)
    if isinstance(made, Dataset):
        return replace(made, name=name)
    try:
        train, test = made if isinstance(made, (tuple, list)) else (made.train, made.test)
    except (ValueError, AttributeError):
        raise ValueError(
            f"the data set {name!r} returned a {type(made).__name__}, expected a multifire.datasets.Dataset, a pair "
            "(train, test), or an object with the attributes train and test"
        ) from None
    classes = cfg.classes or getattr(made, "classes", None)
    return make_dataset(name, train, test, classes=classes, augment=getattr(made, "augment", None))


def make_dataset(
    name: str,
    train: Any,
    test: Any,
    *,
    classes: Sequence[str] | None = None,
    about: str = "own data",
    augment: Callable[..., Any] | None = None,
    where: str = "",
) -> Dataset:
    """Make a data set of own samples; classes, channels, sizes, mean and deviation come from them.

    Args:
        name: its name in the run and in messages.
        train: a Split, a pair (samples, labels) as for `from_arrays`, or a torch Dataset as for `from_dataset`.
        test: the same for the test.
        classes: names of the classes in the order of the labels (default: the numbers 0, 1, ...).
        about: one line that says what the data set holds.
        augment: called on training batches, see `multifire.datasets.loader.Augment`.
        where: the file that messages name (default: the name).

    Raises:
        ValueError: samples or labels of another shape, type or range than expected; the message says which.
    """
    from multifire.datasets.arrays import describe_splits

    parts = [as_split(part, f"{where or name}: {kind}") for part, kind in ((train, "train"), (test, "test"))]
    info = describe_splits(*parts, classes=classes, about=about, where=where or name)
    return Dataset(name, info, *parts, augment=augment)


def as_split(part: Any, where: str) -> Split | EventSplit:
    """Return a split as it is, or made of a pair of arrays or a torch Dataset; `where` names it in messages."""
    from multifire.datasets.arrays import from_arrays, from_dataset

    if isinstance(part, (Split, EventSplit)):
        return part
    if isinstance(part, (tuple, list)) and len(part) == 2:
        return from_arrays(*part, where=f"{where} samples", labels_where=f"{where} labels")
    return from_dataset(part, where=where)


def describe(cfg: DataConfig) -> DatasetInfo:
    """Return the description of a run's data set; own data are read, unless `complete` has filled in what they hold.

    Raises:
        ValueError, FileNotFoundError: see `load`.
    """
    if not is_own(cfg.name) and cfg.shape is None:
        return _normalised(get_info(cfg.name), cfg)
    if cfg.classes is None or cfg.shape is None:
        return load(cfg.name, cfg.root, cfg).info
    events = len(cfg.shape) == 4 or cfg.name == "recordings"
    channels, height, width = cfg.shape[-3:]
    return DatasetInfo(
        about=OWN_DATA.get(cfg.name, "own data"),
        channels=channels,
        size=height,
        classes=cfg.classes,
        mean=cfg.mean or (),
        std=cfg.std or (),
        published_sizes=(0, 0),
        events=events,
        width=width if width != height else None,
        timesteps=cfg.shape[0] if len(cfg.shape) == 4 else None,
    )


def input_size(cfg: DataConfig, info: DatasetInfo) -> tuple[int, int]:
    """Return height and width of what the network of a run gets: of images, or of frames."""
    return (cfg.frame_size, cfg.frame_size) if info.events and info.timesteps is None else info.height_width


def complete(cfg: RunConfig, data: Dataset) -> RunConfig:
    """Return the configuration with everything that comes from the data, so that it describes the run without them.

    For own data these are the network's channels and number of classes, the names of the classes, the shape, mean and
    deviation, and for event frames that were made elsewhere their number and size.

    Raises:
        ValueError: data.timesteps differs from the number of frames.
    """
    info, own = data.info, cfg.data
    if is_own(data.name) or own.name != data.name:
        frames = () if info.timesteps is None else (info.timesteps,)
        own = replace(own, name=data.name, classes=info.classes, shape=(*frames, info.channels, *info.height_width))
        if not info.events:
            own = replace(own, mean=info.mean, std=info.std)
        if info.timesteps is not None:
            _check_timesteps(own, info)
            own = replace(own, frame_size=info.size)
        cfg = fit_network(cfg, info)
    return replace(cfg, data=own)


def fit_network(cfg: RunConfig, info: DatasetInfo) -> RunConfig:
    """Return the configuration with the channels and the number of classes of the data."""
    model = replace(cfg.model, in_channels=info.channels, num_classes=len(info.classes))
    return replace(cfg, model=model)


def describe_run(cfg: RunConfig) -> tuple[RunConfig, DatasetInfo]:
    """Return the configuration, with what its network takes from own data, and the description of its data set.

    Raises:
        ValueError, FileNotFoundError: see `load`.
    """
    info = describe(cfg.data)
    return (fit_network(cfg, info) if is_own(cfg.data.name) else cfg), info


def _check_timesteps(cfg: DataConfig, info: DatasetInfo) -> None:
    if cfg.timesteps != info.timesteps:
        raise ValueError(
            f"data.timesteps is {cfg.timesteps}, but each sample of {cfg.name} has {info.timesteps} frames; "
            f"give --data.timesteps {info.timesteps}"
        )


def _as_expected(data: Dataset, cfg: DataConfig) -> Dataset:
    """Return the data set with the options of `cfg`, which may come from an earlier run on it."""
    info = data.info
    frames = () if info.timesteps is None else (info.timesteps,)
    for name, found in (("classes", info.classes), ("shape", (*frames, info.channels, *info.height_width))):
        expected = getattr(cfg, name)
        if expected is not None and tuple(expected) != found:
            raise ValueError(
                f"{data.name} in {cfg.root}: {name} {_short(found)}, expected data.{name} {_short(expected)}; "
                "give the data that the run was started with, or start another run"
            )
    return replace(data, info=_normalised(info, cfg))


def _short(values: Sequence[Any]) -> str:
    text = " ".join(map(str, values))
    return text if len(text) <= 80 else f"{text[:77]}..."


def _normalised(info: DatasetInfo, cfg: DataConfig) -> DatasetInfo:
    """Return the description with mean and deviation as `cfg` says."""
    for name in ("mean", "std"):
        values = getattr(cfg, name)
        if values is None:
            continue
        if info.events:
            raise ValueError(
                f"data.{name} is given, but {cfg.name} holds events, which are not normalised; leave it out"
            )
        if len(values) != info.channels:
            raise ValueError(
                f"data.{name} has {len(values)} numbers, but {cfg.name} has {info.channels} channels; give one for each"
            )
        info = replace(info, **{name: tuple(values)})
    return info
