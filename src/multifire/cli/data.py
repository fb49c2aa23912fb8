"""multifire data: list, download, prepare and show data sets."""

import argparse
import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from multifire.cli import recordings
from multifire.cli.options import add_data_root
from multifire.cli.output import print_lines, print_table
from multifire.config import DataConfig, RunConfig, get_recipe
from multifire.utils.progress import Bar

FRAME_FIELDS = (
    "timesteps",
    "frame_size",
    "bin_factor",
    "slicing",
    "duration_us",
    "binary",
    "split_seed",
    "test_share",
    "sensor",
    "stray",
    "fit",
    "flip_x",
    "flip_y",
    "hot_pixels",
)


def add_parser(commands) -> None:
    """Add the command, its subcommands and their options to the parser."""
    parser = commands.add_parser("data", help="list, download, prepare and show data sets")
    subcommands = parser.add_subparsers(metavar="command", required=True)
    subcommands.add_parser("list", help="list the data sets").set_defaults(run=list_data)
    downloading = subcommands.add_parser("download", help="download a data set; resumes an interrupted download")
    downloading.add_argument("name", help="data set; see `multifire data list`")
    add_data_root(downloading)
    downloading.set_defaults(run=download)
    preparing = subcommands.add_parser("prepare", help="cut event recordings into frames; resumes where it stopped")
    _add_frame_options(preparing)
    preparing.add_argument("--source", type=Path, help="archive or folder with the recordings (default: ROOT/NAME)")
    preparing.add_argument("--rebuild", action="store_true", help="delete the prepared frames, and prepare them again")
    preparing.add_argument("--workers", type=int, help="number of processes (default: one for each core)")
    preparing.set_defaults(run=prepare)
    info = subcommands.add_parser("info", help="describe prepared frames and draw some, or describe a recording")
    _add_frame_options(info, "data set of events, or file with a recording; its hot pixels are named")
    info.set_defaults(run=show_info)
    showing = subcommands.add_parser("show", help="save a prepared sample as an animated picture")
    _add_frame_options(showing)
    showing.add_argument("index", type=int, help="number of the sample in its split; the first is 0")
    showing.add_argument("--split", choices=("train", "test"), metavar="split", default="train", help="train or test")
    showing.add_argument("--out", type=Path, help="file that ends in .gif or .png (default: NAME-SPLIT-INDEX.gif)")
    showing.set_defaults(run=show)
    recordings.add_parsers(subcommands)


def _add_frame_options(
    parser: argparse.ArgumentParser, name_help: str = "data set of events; see `multifire data list`"
) -> None:
    """Add the name of the data set, its root, and the options that decide how frames are cut."""
    parser.add_argument("name", help=name_help)
    add_data_root(parser)
    frames = parser.add_argument_group("frames", "default: the values of the recipe of the same name")
    frames.add_argument("--timesteps", type=int, help="frames of a sample")
    frames.add_argument("--frame-size", type=int, help="height and width of a frame")
    frames.add_argument("--bin-factor", type=float, help="sensor pixels per cell (default: sensor size / frame size)")
    slicing_help = (
        "duration: frames of --duration-us from the first event on; time, count: frames of equal time or count"
    )
    frames.add_argument("--slicing", choices=("duration", "time", "count"), metavar="slicing", help=slicing_help)
    frames.add_argument("--duration-us", type=int, help="length of a frame in µs, for slicing by duration")
    frames.add_argument("--binary", action=argparse.BooleanOptionalAction, help="store 0 or 1 instead of event counts")
    frames.add_argument("--split-seed", type=int, help="data without an official split: draw it with this seed")
    frames.add_argument("--test-share", type=float, help="data without an official split: fraction held out")
    frames.add_argument("--sensor", help="recordings: width and height of the sensor, such as 346x260")
    recordings.add_stray(frames)
    fits = ("pad", "crop", "stretch")
    frames.add_argument("--fit", choices=fits, metavar="fit", help="how a sensor that is not square fills a frame: "
                        "pad, crop or stretch")  # fmt: skip
    recordings.add_turns(frames)


def list_data(args: argparse.Namespace) -> int:
    """Print the table of data sets."""
    from multifire.datasets.registry import DATASETS, OWN_DATA, REGISTERED

    rows = []
    for name, info in DATASETS.items():
        size = sum(download.size for download in info.downloads)
        train, test = (f"{count:,}" for count in info.published_sizes)
        shape = f"{'T×' * info.events}{info.channels}×{'×'.join(map(str, info.height_width))}"
        how = f"{size / 1e6:,.0f} MB" if size else "by hand" if info.fetch else "embedded"
        rows.append([name, shape, train, test, how])
    print_table(["data set", "shape", "train", "test", "download"], rows, text_columns=2)
    print_lines(f"{name}: {info.about}" for name, info in DATASETS.items())
    print_lines(f"{name}: {about}" for name, about in OWN_DATA.items())
    print_lines(f"{name}: registered" for name in REGISTERED)
    print_lines(["next: multifire data download NAME; for events also multifire data prepare NAME"])
    return 0


def download(args: argparse.Namespace) -> int:
    """Download a data set; show a progress bar for each file."""
    from multifire.datasets.download import download

    with contextlib.ExitStack() as stack:
        bars: dict[str, Bar] = {}

        def show(filename: str, done: int, total: int) -> None:
            if filename not in bars:
                bars[filename] = stack.enter_context(Bar(filename, total, done))
            bars[filename].update(done, f"{done / 1e6:.1f} of {total / 1e6:.1f} MB")

        folder = download(args.name, args.root, show)
    print(f"{args.name}: complete in {folder}")
    return 0


def prepare(args: argparse.Namespace) -> int:
    """Cut the recordings into frames, and print their counts and event rates."""
    cfg = _data_config(args)
    folder = prepare_with_bar(cfg, source=args.source, rebuild=args.rebuild, workers=args.workers)
    return _print_info(cfg, folder)


def prepare_with_bar(cfg: DataConfig, **options: Any) -> Path:
    """Return the folder of the prepared frames; if they are missing, prepare them and show a progress bar."""
    from multifire.datasets.prepare import prepare

    with contextlib.ExitStack() as stack:
        bars: list[Bar] = []

        def show(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(Bar(f"preparing {cfg.name}", total, done)))
            bars[0].update(done, f"{done:,} of {total:,} recordings")

        return prepare(cfg, Path(cfg.root), on_progress=show, **options)


def show_info(args: argparse.Namespace) -> int:
    """Print counts and event rates of prepared frames, or what a recording holds."""
    if Path(args.name).is_file():
        for name in FRAME_FIELDS:
            if name not in ("sensor", "stray") and getattr(args, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{option} has no effect for a recording, which is described as it is; leave it out")
        return recordings.describe(args)
    from multifire.datasets.cache import cache_folder

    cfg = _data_config(args)
    return _print_info(cfg, cache_folder(cfg, args.root))


def _print_info(cfg: DataConfig, folder: Path) -> int:
    from multifire.datasets.look import contact_sheet, describe

    figures = describe(cfg, folder)
    rows = [
        [row.name, *(f"{value:,.0f}" for value in (row.train, row.test, row.events, row.rate))] for row in figures.rows
    ]
    title = f"{cfg.name}{' (simulated)' * figures.simulated}: {figures.frames}"
    print_table(["class", "train", "test", "events", "events/s"], rows, title=title)
    print_lines(figures.lines)
    print(f"{cfg.name}: {figures.train:,} training and {figures.test:,} test samples in {folder}")
    print(f"picture: {contact_sheet(cfg, folder)}")
    return 0


def show(args: argparse.Namespace) -> int:
    """Save a prepared sample as an animated picture."""
    from multifire.datasets.look import animate

    cfg = _data_config(args)
    out = args.out or Path(f"{args.name}-{args.split}-{args.index}.gif")
    print(f"{animate(cfg, args.split, args.index, out)}; written to {out}")
    return 0


def _data_config(args: argparse.Namespace) -> DataConfig:
    """Return the recipe's DataConfig, for own recordings the default one, with the values from the command line."""
    from multifire.datasets import DATASETS, get_info, is_own

    if args.name != "recordings" and (is_own(args.name) or not get_info(args.name).events):
        event_sets = ", ".join([*(name for name, info in DATASETS.items() if info.events), "recordings"])
        raise ValueError(f"{args.name} holds images, which need no preparation; event sets: {event_sets}")
    given = {name: getattr(args, name) for name in FRAME_FIELDS if getattr(args, name) is not None}
    recipe = RunConfig(data=DataConfig(name=args.name)) if args.name == "recordings" else get_recipe(args.name)
    cfg = dataclasses.replace(recipe.data, root=str(args.root), **given)
    return dataclasses.replace(recipe, data=cfg).data  # RunConfig checks the values
