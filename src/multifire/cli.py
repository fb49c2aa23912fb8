"""The command line. Torch is imported only by the commands that compute, so that help and tables answer at once."""

import argparse
import contextlib
import dataclasses
import io
import itertools
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from rich.markup import escape
from rich.table import Table

from multifire import __version__
from multifire.config import DataConfig, RunConfig, TrainOptions, nearest, parse_model_name, unknown
from multifire.progress import CONSOLE, Bar
from multifire.recipes import RECIPES, count_parameters, get_recipe
from multifire.runtime import keep_freed_memory

USER_ERROR = 2
INTERRUPTED = 130
FAILED = 1
"""Some runs of a sweep failed, and the others are there."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 with one line on standard error for anything that the user can mend."""
    _set_up_log()
    argv = sys.argv[1:] if argv is None else list(argv)
    _share_the_cores()
    keep_freed_memory()
    try:
        overridable = {"train": _train, "bench": _bench, "sweep": _sweep}
        if argv and argv[0] in overridable:  # their overrides are tyro's to parse
            return overridable[argv[0]](argv[1:])
        args = _parser().parse_args(argv or ["--help"])
        return args.run(args)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; there is nobody left to tell
        return 0
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        print(f"multifire: error: {_one_line(error)}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("multifire: stopped", file=sys.stderr)
        return INTERRUPTED


def _share_the_cores() -> None:
    """Let OpenMP's threads wait asleep rather than awake, unless the user has said how they shall wait.

    On a machine with anything else to do, a thread that spins at a barrier keeps the one that it waits for from
    running: a training step beside one busy process took 1.6 s spinning and 0.28 s asleep (two cores). Torch reads this
    when it is imported.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "passive"


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is one line, and a misspelt command is met with the nearest one."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see `{self.prog} --help`")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise unknown(str(action.metavar or action.dest), str(value), map(str, action.choices))


def _parser() -> _Parser:
    parser = _Parser(
        prog="multifire",
        description="Train, examine and deploy deep spiking networks of multi-level firing neurons.",
        epilog="Start with `multifire demo`. `multifire COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"multifire {__version__}")
    commands = parser.add_subparsers(metavar="command", title="commands")

    demo = commands.add_parser("demo", help="train on the embedded digits; nothing to download, a few minutes")
    demo.add_argument("--out", type=Path, help="run folder (default: runs/demo-DATE-TIME)")
    demo.add_argument("--events", action="store_true", help="see the digits as an event camera would (simulated)")
    demo.set_defaults(run=_demo)

    commands.add_parser("train", help="train a recipe, with overrides", add_help=False)
    commands.add_parser("sweep", help="train a recipe many times with varied fields, and make a table", add_help=False)
    commands.add_parser("bench", help="time a recipe's network beside its convolutions alone", add_help=False)

    evaluate = commands.add_parser("eval", help="score a run's checkpoint on the test set")
    evaluate.add_argument("folder", type=Path, metavar="RUN", help="run folder")
    evaluate.add_argument("--checkpoint", choices=("best", "last"), metavar="checkpoint",
                          help="best or last (default: the one that summary.json's accuracy is of)")  # fmt: skip
    evaluate.add_argument("--root", help="folder of the data sets (default: the one that the run was trained from)")
    evaluate.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    evaluate.add_argument("--batch-size", type=int, help="images in one step (default: the run's)")
    evaluate.add_argument("--margin", type=float, nargs="+", default=[], metavar="M",
                          help="what it would cost and save to stop at these margins, as `run` does")  # fmt: skip
    evaluate.set_defaults(run=_eval)

    play = commands.add_parser("run", help="play a recording, or follow a camera, through a run's network")
    play.add_argument("folder", type=Path, metavar="RUN", help="run folder")
    play.add_argument("source", type=Path, nargs="?", metavar="RECORDING",
                      help="recording of any known format; .npy of frames [T, C, H, W]; folder of .npy")  # fmt: skip
    play.add_argument("--follow", action="store_true",
                      help="read events from standard input as they come: records of 13 bytes, little-endian, "
                      "t [us, int64], x, y [int16], p [int8]")  # fmt: skip
    play.add_argument("--udp", type=int, metavar="PORT",
                      help="with --follow: read packets of such records from this port of 127.0.0.1")  # fmt: skip
    play.add_argument("--margin", type=float, metavar="M",
                      help="decide once the likeliest class leads the next by more than this probability")  # fmt: skip
    play.add_argument("--checkpoint", choices=("best", "last"), metavar="checkpoint",
                      help="best or last (default: the one that summary.json's accuracy is of)")  # fmt: skip
    play.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    play.set_defaults(run=_play)

    compare = commands.add_parser("compare", help="finished runs as a table: where they differ, and what came of it")
    compare.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="run folder")
    compare.add_argument("--csv", type=Path, help="write the table to this file too")
    compare.set_defaults(run=_compare)

    report = commands.add_parser("report", help="one HTML page about runs, and every chart as a picture and as CSV")
    report.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="run folder")
    report.add_argument("--out", type=Path, help="file of the page (default: RUN/report.html; of several: report.html)")
    report.add_argument("--figures", type=Path, metavar="DIR", help="write each chart as PNG, SVG and CSV too")
    report.add_argument("--root", help="folder of the data sets (default: the one that the run was trained from)")
    report.add_argument(
        "--no-measure", action="store_true", help="leave checkpoints and data alone: recorded figures only"
    )
    report.set_defaults(run=_report)

    summary = commands.add_parser("summary", help="a network's layers, parameters, operations, energy and memory")
    summary.add_argument("what", metavar="RECIPE|RUN", help="recipe, or run folder")
    summary.add_argument("--root", help="folder of the data sets (default: the recipe's or the run's)")
    summary.set_defaults(run=_summary)

    export = commands.add_parser("export", help="write a run's network as a file for use outside the trainer")
    export.add_argument("folder", type=Path, metavar="RUN", help="run folder")
    formats = ("int8", "onnx", "onnx-int8", "nir", "pretrained")
    export.add_argument("--to", choices=formats, metavar="format", required=True,
                        help="int8: weights in 8 bits, which `mf.load_int8` runs on a CPU; "
                        "onnx, onnx-int8: for what runs ONNX; nir: for neuromorphic simulators and hardware; "
                        "pretrained: a folder to share, for `mf.from_pretrained` and `mf.push_to_hub`")  # fmt: skip
    export.add_argument("--out", type=Path, help="file to write (default: RUN/CHECKPOINT and the format's ending)")
    export.add_argument("--step", action="store_true",
                        help="onnx, onnx-int8: one time step, with the state in and out, not a sequence")  # fmt: skip
    export.add_argument("--checkpoint", choices=("best", "last"), metavar="checkpoint",
                        help="best or last (default: the one that summary.json's accuracy is of)")  # fmt: skip
    export.add_argument(
        "--measure", action="store_true", help="score what is written on the test set, for its passport"
    )
    export.add_argument("--root", help="folder of the data sets (default: the one that the run was trained from)")
    export.set_defaults(run=_export)

    inspect = commands.add_parser(
        "inspect", help="say where a checkpoint or an exported file came from; check it whole"
    )
    inspect.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="a run's checkpoint, an exported file, or a folder that `--to pretrained` wrote",
    )
    inspect.set_defaults(run=_inspect)

    recipes = commands.add_parser("recipes", help="list the recipes")
    recipes.set_defaults(run=_recipes)

    data = commands.add_parser("data", help="list, download, prepare and look at data sets")
    data_commands = data.add_subparsers(metavar="command", required=True)
    listing = data_commands.add_parser("list", help="list the data sets")
    listing.set_defaults(run=_data_list)
    download = data_commands.add_parser("download", help="download a data set; resumes where it stopped")
    download.add_argument("name", help="data set; see `multifire data list`")
    download.add_argument("--root", type=Path, default=Path("data"), help="folder of the data sets (default: data)")
    download.set_defaults(run=_data_download)
    prepare = data_commands.add_parser("prepare", help="cut event recordings into frames; resumes where it stopped")
    _add_frame_options(prepare)
    prepare.add_argument("--source", type=Path, help="archive or folder with the recordings (default: ROOT/NAME)")
    prepare.add_argument("--rebuild", action="store_true", help="throw away what is there, and start anew")
    prepare.add_argument("--workers", type=int, help="processes (default: one for each core)")
    prepare.set_defaults(run=_data_prepare)
    info = data_commands.add_parser("info", help="counts and event rates of prepared frames; a picture of them")
    _add_frame_options(info)
    info.set_defaults(run=_data_info)
    show = data_commands.add_parser("show", help="save a prepared sample as an animated picture")
    _add_frame_options(show)
    show.add_argument("index", type=int, help="number of the sample in its split; the first is 0")
    show.add_argument("--split", choices=("train", "test"), metavar="split", default="train", help="train or test")
    show.add_argument("--out", type=Path, help="file that ends in .gif or .png (default: NAME-SPLIT-INDEX.gif)")
    show.set_defaults(run=_data_show)
    return parser


def _add_frame_options(parser: argparse.ArgumentParser) -> None:
    """A data set of events, and what of its recipe's DataConfig decides which cache is meant."""
    parser.add_argument("name", help="data set of events; see `multifire data list`")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the data sets (default: data)")
    frames = parser.add_argument_group("frames", "by default as the recipe of the same name has them")
    frames.add_argument("--timesteps", type=int, help="frames of a sample")
    frames.add_argument("--frame-size", type=int, help="height and width of a frame")
    frames.add_argument("--bin-factor", type=float, help="pixels to a cell (default: sensor's size over the frame's)")
    frames.add_argument("--slicing", choices=("duration", "time", "count"), metavar="slicing",
                        help="duration (from the first event on), or equal shares of time or count")  # fmt: skip
    frames.add_argument("--duration-us", type=int, help="length of a frame in µs, where slicing is by duration")
    frames.add_argument("--binary", action="store_const", const=True, help="whether there was an event, not how many")
    frames.add_argument("--split-seed", type=int, help="cifar10-dvs: draw the training recordings by this seed")


def _data_config(args: argparse.Namespace) -> DataConfig:
    """The recipe's DataConfig with what the command line says."""
    from multifire.datasets import get_info

    if not get_info(args.name).events:
        raise ValueError(f"{args.name} holds images, which need no preparation; event sets: {', '.join(_event_sets())}")
    names = ("timesteps", "frame_size", "bin_factor", "slicing", "duration_us", "binary", "split_seed")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    recipe = get_recipe(args.name)
    cfg = dataclasses.replace(recipe.data, root=str(args.root), **given)
    return dataclasses.replace(recipe, data=cfg).data  # which checks the values


def _event_sets() -> list[str]:
    from multifire.datasets import DATASETS

    return [name for name, info in DATASETS.items() if info.events]


def printable(text: str) -> str:
    """Text from a file with its control characters spelt out: a terminal would obey them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _set_up_log() -> None:
    from rich.logging import RichHandler

    log = logging.getLogger("multifire")
    if not log.handlers:
        log.addHandler(RichHandler(console=CONSOLE, show_time=False, show_path=False))
        log.setLevel(logging.INFO)


def _demo(args: argparse.Namespace) -> int:
    out = args.out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    cfg = get_recipe("digits-dvs" if args.events else "digits")
    return _until_stopped(lambda: _run_training(cfg, out, TrainOptions()))


def _train(rest: Sequence[str]) -> int:
    if _asks_for_help(rest):
        print(_TRAIN_HELP.format(recipes=", ".join(RECIPES)))
        return 0
    cfg, chosen = parse_overrides(_recipe_of(rest, "train"), rest[1:])
    if chosen.dry_run:
        return _dry_run(cfg)
    options = TrainOptions(**{field.name: getattr(chosen, field.name) for field in dataclasses.fields(TrainOptions)})
    out = chosen.out or Path("runs") / cfg.recipe
    if chosen.seeds:
        return _until_stopped(lambda: _train_seeds(cfg, out, options, chosen.seeds))
    return _until_stopped(lambda: _run_training(cfg, out, options))


def _train_seeds(cfg: RunConfig, out: Path, options: TrainOptions, seeds: str) -> int:
    """A run for each seed in a folder of its own, and what they have in common."""
    if options.resume == "yes":  # where it stopped, the later seeds had not begun
        options = dataclasses.replace(options, resume="auto")
    numbers = _seeds(seeds)
    folders = [out / f"seed-{number}" for number in numbers]
    for number, folder in zip(numbers, folders, strict=True):
        _run_training(dataclasses.replace(cfg, seed=number), folder, options)
    return 0 if CONSOLE.quiet else _show_runs(folders, out / "seeds.csv", out / "seeds.json")


def _seeds(text: str) -> list[int]:
    numbers = [number.strip() for number in text.split(",")]
    if not all(number.isdecimal() for number in numbers) or len(set(map(int, numbers))) < len(numbers):
        raise ValueError(f"seeds is {text!r}, expected different numbers such as 0,1,2")
    return [int(number) for number in numbers]


def _compare(args: argparse.Namespace) -> int:
    return _show_runs(args.folders, args.csv)


def _report(args: argparse.Namespace) -> int:
    from multifire.report import write_report

    out = args.out or (args.folders[0] if len(args.folders) == 1 else Path()) / "report.html"
    with Bar("looking into the runs", len(args.folders)) as bar:
        notes = write_report(args.folders, out, args.figures, not args.no_measure, args.root, bar.advance)
    for note in notes:
        CONSOLE.print(f"missing: {note}", highlight=False, markup=False, soft_wrap=True)
    print(f"written to {out}" + (f", figures to {args.figures}" if args.figures else ""))
    return 0


def _sweep(rest: Sequence[str]) -> int:
    from multifire import sweep

    if len(rest) < 2 or _asks_for_help(rest):
        print(_SWEEP_HELP.format(recipes=", ".join(RECIPES)))
        return 0 if not rest or _asks_for_help(rest) else USER_ERROR
    kind, args = rest[0], rest[1:]
    if kind not in sweep.KINDS:
        raise unknown("sweep", kind, sweep.KINDS)
    cfg, options = parse_overrides(_recipe_of(args, f"sweep {kind}"), args[1:], "sweep")
    if options.jobs < 1:
        raise ValueError(f"jobs is {options.jobs}, expected at least 1")
    out = options.out or Path("runs") / f"{kind}-{cfg.recipe}"
    fields = sweep.variations(kind, cfg, options.vary)
    cells = sweep.cells_of(cfg, fields, _seeds(options.seeds), out, lambda base, said: parse_overrides(base, said)[0])
    if options.dry_run:
        for cell in cells:
            print(cell.name)
        print(f"{len(cells)} runs; nothing was written")
        return 0
    _prepare_all(cells)
    outcomes, stopped = sweep.sweep(cells, out, budget=options.budget, jobs=options.jobs, cost=_cost, say=print)
    return _finish_sweep(outcomes, stopped, out)


def _prepare_all(cells: Sequence[Any]) -> None:
    """The frames of every cell, before many processes would make them at once."""
    from multifire.datasets import get_info

    for data in {repr(cell.cfg.data): cell.cfg.data for cell in cells}.values():
        if get_info(data.name).events:
            _prepare(data)


def _cost(cfg: RunConfig) -> tuple[float, float]:
    from multifire.plan import plan

    found = plan(cfg)
    return found.start_seconds, found.epoch_seconds


def _finish_sweep(outcomes: Sequence[Any], stopped: int, out: Path) -> int:
    """The table and the report of the finished runs, and what failed."""
    from multifire.sweep import finish

    count = sum(outcome.error is None for outcome in outcomes)
    if count:
        names, lines = finish(outcomes, out, with_report=not stopped)
        table = Table(*map(escape, names), pad_edge=False)
        for line in lines:
            table.add_row(*map(escape, line))
        CONSOLE.print(table)
        print(
            f"runs finished: {count}; table.md, table.csv, table.tex{', report.html, figures' * (not stopped)} in {out}"
        )
    if stopped:
        print(f"multifire: stopped; the same command goes on in {out}", file=sys.stderr)
        return 128 + stopped
    failed = [outcome for outcome in outcomes if outcome.error]
    for outcome in failed:
        print(f"multifire: failed: {outcome.cell.name}: {outcome.error}", file=sys.stderr)
    return FAILED if failed else 0


def _show_runs(folders: Sequence[Path], csv: Path | None, summary: Path | None = None) -> int:
    from multifire.compare import compare, mean_and_deviation, write_csv
    from multifire.runtime import write_json

    rows = compare(folders)
    table = Table(pad_edge=False)
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*("-" if value is None else escape(str(value)) for value in row.values()))
    CONSOLE.print(table)
    mean, deviation = mean_and_deviation([row["test accuracy %"] for row in rows])
    print(f"test accuracy {mean:.2f} ± {deviation:.2f} % (mean and standard deviation of {len(rows)} runs)")
    if csv:
        write_csv(csv, rows)
        print(f"written to {csv}")
    if summary:
        write_json(summary, {"test accuracy %": {"mean": mean, "standard deviation": deviation}, "runs": rows})
        print(f"written to {summary}")
    return 0


def _dry_run(cfg: RunConfig) -> int:
    from multifire.plan import plan
    from multifire.progress import format_seconds

    found = plan(cfg)
    peak = "unknown" if found.peak_bytes is None else f"{found.peak_bytes / 1e6:,.0f} MB"
    for line in (
        f"{cfg.model.name}, {found.parameters:,} parameters; {cfg.data.name}, batches of {cfg.optim.batch_size}",
        f"a training step: {1e3 * found.step_seconds:,.0f} ms, peak memory {peak} over the interpreter's, "
        f"of which {found.kept_bytes / 1e6:,.0f} MB wait for the backward pass",
        f"an epoch: {found.steps_per_epoch:,} steps, about {format_seconds(found.epoch_seconds)} with its evaluation",
        f"the run: {cfg.optim.epochs} epochs, about {format_seconds(found.run_seconds)}",
        f"a checkpoint: {found.checkpoint_bytes / 1e6:,.1f} MB",
        "nothing was written",
    ):
        CONSOLE.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def _spell_resume(args: Sequence[str]) -> list[str]:
    """`--resume` alone means `--resume yes`."""
    spelt = []
    for arg, following in itertools.zip_longest(args, args[1:], fillvalue=""):
        spelt += [arg, "yes"] if arg == "--resume" and following not in ("no", "yes", "auto") else [arg]
    return spelt


_TRAIN_HELP = """usage: multifire train RECIPE [--overrides] [--out FOLDER] [--resume [auto]]

Train a recipe: {recipes}.

`multifire train RECIPE --help` lists every override with the recipe's value, for example
  multifire train digits --optim.epochs 3 --model.levels 1 --out runs/lif
  multifire train digits --out runs/lif --optim.epochs 3 --model.levels 1 --resume"""


_SWEEP_HELP = """usage: multifire sweep KIND RECIPE [--overrides] [--vary FIELD=V1,V2] [--seeds 0,1,2] [--jobs N]

Train a recipe many times, side by side, and write a table and a report of all. What is finished is kept: the same
command goes on where it was stopped.
  ablation  plain and DS blocks, each with K = 1, 2, 3 firing levels
  depth     plain and DS blocks, each at depth 14, 20, 32, 44, 68
  grid      the values that --vary names, in every combination
Recipes: {recipes}.

`multifire sweep KIND RECIPE --help` lists every override and option, for example
  multifire sweep ablation cifar10-small --seeds 0,1,2 --jobs 2 --budget 4h
  multifire sweep grid digits --vary model.levels=1,2,3 --vary optim.lr=0.1,0.05 --budget '3 epochs'"""


def _asks_for_help(rest: Sequence[str]) -> bool:
    return not rest or rest[0] in ("-h", "--help")


def _recipe_of(rest: Sequence[str], command: str) -> RunConfig:
    if rest[0].startswith("-"):
        usage = f"multifire {command} RECIPE [--overrides]"
        raise ValueError(f"expected a recipe before {rest[0]}: {usage}; recipes: {', '.join(RECIPES)}")
    return get_recipe(rest[0])


def _bench(rest: Sequence[str]) -> int:
    if _asks_for_help(rest):
        print(_BENCH_HELP.format(recipes=", ".join(RECIPES)))
        return 0
    cfg, options = parse_overrides(_recipe_of(rest, "bench"), rest[1:], "bench")
    if options.runs < 1:
        raise ValueError(f"runs is {options.runs}, expected at least 1")
    from multifire.bench import bench
    from multifire.runtime import write_json

    with Bar("measuring", 2 * (options.runs + 2)) as bar:
        figures = bench(cfg, options.runs, bar.advance, options.reference)
    path = options.out or Path(f"bench-{cfg.recipe}.json")
    write_json(path, figures)
    _print_bench(figures)
    print(f"written to {path}")
    return 0


_BENCH_HELP = """usage: multifire bench RECIPE [--overrides] [--runs N] [--out FILE]

Time a training step and an evaluation of a recipe's network on random images, beside its convolutions alone, and
measure the memory that a step takes. Recipes: {recipes}.

`multifire bench RECIPE --help` lists every override with the recipe's value, for example
  multifire bench cifar10 --optim.batch-size 16 --precision bf16"""


def _print_bench(figures: dict[str, Any]) -> None:
    batch = figures["batch_size"]
    machine = figures["machine"]
    title = f"{figures['model']}, width {figures['width']}, K = {figures['levels']}, {figures['precision']}, "
    table = Table(title=f"{title}[T, N, C, H, W] = {figures['input [T, N, C, H, W]']}")
    table.add_column("", no_wrap=True)
    for column in ("ms/image", "range", "images/s", "× floor"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, timing in figures["timings"].items():
        for who, took in timing.items():
            median, low, high = (1e3 * took[key] / batch for key in ("median", "fastest", "slowest"))
            rate, ratio = f"{1e3 / median:,.1f}", f"{took['ratio']:.3f}"
            table.add_row(f"{name}, {who}", f"{median:.2f}", f"{low:.2f}-{high:.2f}", rate, ratio)
    CONSOLE.print(table)
    shares = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in figures["share_of_a_step"].items())
    kept = ", ".join(f"{kind} {size / batch / 1e6:.2f}" for kind, size in figures["kept_bytes"].items())
    peak = figures["peak_bytes"]
    memory = "unknown" if peak is None else f"{peak / 1e6:,.0f} MB, {peak / batch / 1e6:.1f} MB/image"
    for line in (
        f"a training step's time: {shares}",
        f"peak memory of a training step over the interpreter's: {memory}",
        f"kept for the backward pass: {figures['kept_bytes_per_neuron_and_step']:.2f} bytes per neuron and time step; "
        f"in MB/image: {kept}",
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"backends {', '.join(figures['backends'])}",
    ):
        CONSOLE.print(line, highlight=False, markup=False, soft_wrap=True)


def _until_stopped(run: Callable[[], int]) -> int:
    """Train, unless a signal or the time says to stop; then the exit code says which."""
    from multifire.train import Interrupted

    try:
        return run()
    except Interrupted as stopped:
        if not CONSOLE.quiet:  # one process speaks for all
            print(f"multifire: {stopped}", file=sys.stderr)
        return stopped.exit_code


def _run_training(cfg: RunConfig, out: Path, options: TrainOptions) -> int:
    from multifire.datasets import get_info
    from multifire.train import train

    info = get_info(cfg.data.name)
    if info.events:
        _prepare(cfg.data)
    keep_freed_memory(after_first_step=True)
    summary = train(cfg, out, options)
    if CONSOLE.quiet:
        return 0
    print(
        f"held-out accuracy {100 * summary['test_accuracy']:.2f} % ({summary['test_accuracy_of']} checkpoint), "
        f"{summary['images_per_second']:,.0f} {'samples' if info.events else 'images'}/s; run in {out}"
    )
    if info.simulated:
        print("the events were simulated from images: no camera saw them")
    return 0


def _prepare(cfg: DataConfig, **options: Any) -> Path:
    """The cache of these frames, made where it is not there, with a bar."""
    from multifire.datasets.prepare import prepare

    with contextlib.ExitStack() as stack:
        bars: list[Bar] = []

        def show(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(Bar(f"preparing {cfg.name}", total, done)))
            bars[0].update(done, f"{done:,} of {total:,} recordings")

        return prepare(cfg, Path(cfg.root), on_progress=show, **options)


def _data_prepare(args: argparse.Namespace) -> int:
    cfg = _data_config(args)
    folder = _prepare(cfg, source=args.source, rebuild=args.rebuild, workers=args.workers)
    return _print_info(cfg, folder)


def _data_info(args: argparse.Namespace) -> int:
    from multifire.datasets.cache import cache_folder

    cfg = _data_config(args)
    return _print_info(cfg, cache_folder(cfg, args.root))


def _print_info(cfg: DataConfig, folder: Path) -> int:
    from multifire.datasets.look import contact_sheet, describe

    figures = describe(cfg, folder)
    table = Table("class", title=f"{cfg.name}{' (simulated)' * figures.simulated}: {figures.frames}")
    for column in ("train", "test", "events", "events/s"):
        table.add_column(column, justify="right")
    for row in figures.rows:
        table.add_row(row.name, *(f"{value:,.0f}" for value in (row.train, row.test, row.events, row.rate)))
    CONSOLE.print(table)
    for line in figures.lines:
        CONSOLE.print(line, highlight=False, markup=False, soft_wrap=True)
    print(f"{cfg.name}: {figures.train:,} training and {figures.test:,} test samples in {folder}")
    print(f"picture of them: {contact_sheet(cfg, folder)}")
    return 0


def _data_show(args: argparse.Namespace) -> int:
    from multifire.datasets.look import animate

    cfg = _data_config(args)
    out = args.out or Path(f"{args.name}-{args.split}-{args.index}.gif")
    print(f"{animate(cfg, args.split, args.index, out)}; written to {out}")
    return 0


def _eval(args: argparse.Namespace) -> int:
    from multifire.evaluate import evaluate_run

    scored, path = evaluate_run(args.folder, args.checkpoint, args.root, args.device, args.batch_size, args.margin)
    names = scored.pop("classes")
    table = Table("class", "accuracy %", title=f"{path}: {scored['count']:,} test samples")
    for name, share in zip(names, scored["per_class"], strict=True):
        table.add_row(name, "-" if share is None else f"{100 * share:.2f}")
    CONSOLE.print(table)
    steps = "  ".join(f"{100 * share:.2f}" for share in scored["per_step"])
    CONSOLE.print(f"accuracy after each time step %: {steps}", highlight=False, soft_wrap=True)
    for early in scored["early"]:
        CONSOLE.print(
            f"stopped at margin {early['margin']:g}: accuracy {100 * early['accuracy']:.2f} % after "
            f"{early['mean_steps']:.2f} of {len(scored['per_step'])} steps on average", highlight=False, soft_wrap=True
        )  # fmt: skip
    print(f"accuracy {100 * scored['accuracy']:.2f} %, loss {scored['loss']:.4f}; written to {path}")
    return 0


def _summary(args: argparse.Namespace) -> int:
    from multifire.summary import summarise

    found = summarise(args.what, args.root)
    cfg, energy, counted = found.cfg, found.energy, not found.without_data
    title = f"{cfg.model.name}, width {cfg.model.width}, K = {cfg.model.levels}, T = {cfg.data.timesteps}; {found.of}"
    table = Table(title=escape(title), pad_edge=False)
    for column in ("layer", "kind"):
        table.add_column(column, overflow="fold")
    for column in ("output", "parameters", "MACs", *(("SynOps", "MACs left") * counted)):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found.rows:
        figures = [f"{row.parameters:,}", f"{row.macs:,}"]
        if row.synops is not None:
            figures += [f"{row.synops:,.0f}", f"{row.real:,.0f}"]
        table.add_row(row.name, row.kind, "×".join(map(str, row.shape)), *figures)
    totals = [f"{found.parameters:,}", f"{energy.ann_macs:,}"]
    totals += [f"{energy.synops:,.0f}", f"{energy.macs:,.0f}"] * counted
    table.add_section()
    table.add_row("all", "", "", *totals)
    CONSOLE.print(table)
    batch = f"batches of {cfg.optim.batch_size}" + f" in {cfg.optim.accumulate} parts" * (cfg.optim.accumulate > 1)
    lines = [
        "MACs: of one pass without time; SynOps and MACs left: of an inference in time, whose inputs that are no "
        f"integers cost MACs (mean of {energy.samples} test samples)"
        if counted
        else f"SynOps are left out, there is nothing to count them on: {found.without_data}",
        f"energy at {energy.ac_pj} pJ/AC and {energy.mac_pj} pJ/MAC (45 nm): "
        + f"this network {energy.snn_pj / 1e6:,.2f} µJ, " * counted
        + f"without time {energy.ann_pj / 1e6:,.2f} µJ, with {cfg.model.levels + 1} levels of activation "
        f"{energy.quantised_pj / 1e6:,.2f} µJ",
        f"training in {batch}: {found.kept_bytes / 1e6:,.0f} MB wait for the backward pass, "
        f"{found.state_bytes / 1e6:,.0f} MB are weights, gradients and momentum",
    ]
    for line in lines:
        CONSOLE.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def _play(args: argparse.Namespace) -> int:
    if args.follow == (args.source is not None) or (args.udp is not None and not args.follow):
        raise ValueError("give either a recording to play, or --follow with or without --udp PORT")
    from multifire.stream import Player

    player = Player(args.folder, args.checkpoint, args.device, args.margin)
    try:
        if args.follow:
            player.follow(sys.stdin.buffer, args.udp)
        else:
            player.play(args.source)
    except KeyboardInterrupt:
        if not args.follow:
            raise
    finally:
        player.summarise()
    return 0


def _export(args: argparse.Namespace) -> int:
    if args.step and args.to not in ("onnx", "onnx-int8"):
        raise ValueError(f"--step is for --to onnx and onnx-int8, not {args.to}")
    if args.to != "int8":
        return _export_graph(args)
    from multifire.export.int8 import export_run

    exported = export_run(args.folder, args.out, args.checkpoint, args.measure, args.root)
    print(f"{args.to}: {exported.size / 1e6:,.2f} MB, {100 * exported.share:.1f} % of the weights in float; ", end="")
    if exported.accuracy is not None:
        print(f"accuracy {100 * exported.accuracy:.2f} %; ", end="")
    print(f"written to {exported.path}")
    return 0


def _export_graph(args: argparse.Namespace) -> int:
    if args.measure or args.root:
        raise ValueError("--measure and --root are for --to int8; `multifire eval RUN` scores the network itself")
    from multifire.export.files import write_run

    path = write_run(args.folder, args.to, args.out, args.checkpoint, args.step)
    size = f"{path.stat().st_size / 1e6:,.2f} MB; " if path.is_file() else ""
    print(f"{args.to}: {size}checked beside the network; written to {path}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from multifire.export.inspection import inspect
    from multifire.export.passport import describe

    what, passport = inspect(args.file)
    print(printable(f"{args.file}: whole; {what}"))
    for name, text in describe(passport):
        print(f"{name:>12}  {printable(text)}")
    return 0


def _recipes(args: argparse.Namespace) -> int:
    table = Table(title="multifire train RECIPE", pad_edge=False)
    for column in ("recipe", "data"):
        table.add_column(column, no_wrap=True)
    for column in ("T", "depth", "width", "parameters", "paper %"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, recipe in RECIPES.items():
        cfg = recipe.config
        published = "-" if recipe.published is None else f"{recipe.published:.2f}"
        depth = 6 * parse_model_name(cfg.model.name)[1] + 2
        figures = (cfg.data.timesteps, depth, cfg.model.width, f"{count_parameters(cfg.model):,}", published)
        table.add_row(name, cfg.data.name, *map(str, figures))
    CONSOLE.print(table)
    return 0


def _data_list(args: argparse.Namespace) -> int:
    from multifire.datasets import DATASETS

    table = Table("data set", "about", title="multifire data download NAME; multifire data prepare NAME")
    for column in ("train", "test", "shape", "download"):
        table.add_column(column, justify="right")
    for name, info in DATASETS.items():
        size = sum(download.size for download in info.downloads)
        train, test = (f"{count:,}" for count in info.published_sizes)
        shape = f"{'T×' * info.events}{info.channels}×{info.size}×{info.size}"
        how = f"{size / 1e6:,.0f} MB" if size else "by hand" if info.fetch else "embedded"
        table.add_row(name, info.about, train, test, shape, how)
    CONSOLE.print(table)
    return 0


def _data_download(args: argparse.Namespace) -> int:
    from multifire.datasets import download

    with contextlib.ExitStack() as stack:
        bars: dict[str, Bar] = {}

        def show(filename: str, done: int, total: int) -> None:
            if filename not in bars:
                bars[filename] = stack.enter_context(Bar(filename, total, done))
            bars[filename].update(done, f"{done / 1e6:.1f} of {total / 1e6:.1f} MB")

        folder = download.download(args.name, args.root, show)
    print(f"{args.name}: complete in {folder}")
    return 0


def parse_overrides(cfg: RunConfig, args: Sequence[str], command: str = "train") -> tuple[RunConfig, Any]:
    """`cfg` with the overrides of the command line, and all options of the command.

    Raises:
        ValueError: an unknown override (names the nearest) or a value that its field cannot hold.
    """
    import tyro

    @dataclasses.dataclass(frozen=True)
    class Train(RunConfig):
        recipe: Annotated[str, tyro.conf.Suppress] = cfg.recipe
        out: Path | None = None
        """Run folder (default: runs/RECIPE)."""
        resume: Literal["no", "yes", "auto"] = TrainOptions.resume
        """Go on with the run in the folder (--resume); auto: if there is one."""
        checkpoint_every: str = TrainOptions.checkpoint_every
        """Write a checkpoint every so many minutes (10m), hours (1h), seconds (90s) or steps (500) of an epoch."""
        keep: int = TrainOptions.keep
        """How many of the newest checkpoints to keep."""
        max_time: str | None = None
        """Write a checkpoint and stop after that time, such as 90s, 30m or 4h; --resume goes on."""
        track: tuple[str, ...] | None = None
        """Trackers of the figures: tensorboard, mlflow, wandb (default: TensorBoard, where it is installed)."""
        analyze_every: int = TrainOptions.analyze_every
        """Look into the network every so many epochs, and at the end (analysis.jsonl, analysis.json); 0: never."""
        seeds: str | None = None
        """A run for each of these seeds, such as 0,1,2, in folders of their own, and their mean and deviation."""
        dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
        """Say what the run would take, in time, memory and files, after a few real steps; write nothing."""

    @dataclasses.dataclass(frozen=True)
    class Bench(RunConfig):
        recipe: Annotated[str, tyro.conf.Suppress] = cfg.recipe
        runs: int = 7
        """Counted runs of each measurement."""
        out: Path | None = None
        """File for the figures (default: bench-RECIPE.json)."""
        reference: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
        """Time the reference backend in fp32 too."""

    @dataclasses.dataclass(frozen=True)
    class Sweep(RunConfig):
        recipe: Annotated[str, tyro.conf.Suppress] = cfg.recipe
        vary: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
        """A field and its values, such as model.levels=1,2,3; may be given several times."""
        seeds: str = "0"
        """Every combination is trained with each of these seeds, such as 0,1,2."""
        jobs: int = 1
        """How many runs at a time; they share the cores."""
        budget: str | None = None
        """Scale the epochs so that all takes about so long (30m, 4h), or to so many epochs a run ('5 epochs')."""
        out: Path | None = None
        """Folder of the runs (default: runs/KIND-RECIPE)."""
        dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
        """List the runs, and write nothing."""

    options = {"train": Train, "bench": Bench, "sweep": Sweep}[command]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            chosen, unrecognised = tyro.cli(
                options,
                default=options(**vars(cfg)),
                args=_spell_resume(args),
                return_unknown_args=True,
                prog=f"multifire {command} {cfg.recipe}",
                description=RECIPES[cfg.recipe].about,
            )
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        raise ValueError(_tyro_message(said.getvalue())) from None
    if unrecognised:
        own = [field.name for field in dataclasses.fields(options)][len(dataclasses.fields(RunConfig)) :]
        known = [f"--{name}" for name in (*_option_names(cfg), *own)]
        suggestion = nearest(unrecognised[0].replace("_", "-"), known) or ";"
        raise ValueError(
            f"unknown override {unrecognised[0]!r}{suggestion} `multifire {command} {cfg.recipe} --help` lists them"
        )
    values = {field.name: getattr(chosen, field.name) for field in dataclasses.fields(RunConfig)}
    return RunConfig(**values), chosen


def _option_names(value: Any, prefix: str = "") -> list[str]:
    names = []
    for field in dataclasses.fields(value):
        name, inner = prefix + field.name.replace("_", "-"), getattr(value, field.name)
        names += _option_names(inner, f"{name}.") if dataclasses.is_dataclass(inner) else [name]
    return names


def _tyro_message(box: str) -> str:
    """The message in tyro's box, up to its first rule, as one line."""
    lines = []
    for line in box.splitlines():
        inner = line.strip("│ ")
        if line.startswith(("╭", "╰")):
            continue
        if inner.startswith("──"):
            break
        lines.append(inner)
    return " ".join(lines).removeprefix("Error parsing Train: ").removeprefix("Error parsing Bench: ").removeprefix(
        "Error parsing Sweep: "
    ) or " ".join(box.split())
