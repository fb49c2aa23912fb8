"""multifire export: write a run's network to a file for use outside multifire's trainer."""

import argparse
from pathlib import Path

from multifire.cli.options import add_checkpoint, add_code, add_root, add_run

FORMATS = ("int8", "c", "onnx", "onnx-int8", "nir", "pretrained")


def add_parser(commands) -> None:
    """Add the command and its options to the parser."""
    parser = commands.add_parser("export", help="write a run's network to a file for use outside the trainer")
    add_run(parser)
    add_code(parser)
    parser.add_argument("--to", choices=FORMATS, metavar="format", required=True,
                        help="int8: weights in 8 bits, for `multifire.engine.load` and `mf.load_int8`; "
                        "c: a folder of C sources that need only a compiler; "
                        "onnx, onnx-int8: for any ONNX runtime; nir: for neuromorphic simulators and hardware; "
                        "pretrained: a folder to share, for `mf.from_pretrained` and `mf.push_to_hub`")  # fmt: skip
    parser.add_argument("--out", type=Path, help="file to write (default: RUN/CHECKPOINT with the format's ending)")
    parser.add_argument("--step", action="store_true",
                        help="onnx, onnx-int8: export one time step with its state, not a whole sequence")  # fmt: skip
    add_checkpoint(parser)
    parser.add_argument("--measure", action="store_true",
                        help="int8: score the exported network, and store its accuracy in the file")  # fmt: skip
    add_root(parser)
    parser.set_defaults(run=export)


def export(args: argparse.Namespace) -> int:
    """Write the file, and print its size and path."""
    if args.step and args.to not in ("onnx", "onnx-int8"):
        raise ValueError(f"--step is for --to onnx and onnx-int8, not {args.to}")
    if args.to == "int8":
        return _export_int8(args)
    return _export_c(args) if args.to == "c" else _export_other(args)


def _export_int8(args: argparse.Namespace) -> int:
    from multifire.experiments.score import evaluate_file
    from multifire.export.int8 import export_run

    def score(path: Path) -> float:
        return evaluate_file(path, args.root)[0]["accuracy"]

    exported = export_run(args.folder, args.out, args.checkpoint, score if args.measure else None)
    size = f"{exported.size / 1e6:,.2f} MB, {100 * exported.size_ratio:.1f} % of the size of the float32 weights"
    accuracy = "" if exported.accuracy is None else f"accuracy {100 * exported.accuracy:.2f} %; "
    print(f"{args.to}: {size}; {accuracy}written to {exported.path}")
    return 0


def _export_c(args: argparse.Namespace) -> int:
    _refuse_measure(args)
    from multifire.engine.c_source import write_c

    path = write_c(args.folder, args.out, args.checkpoint)
    print(f"c: written to {path}; {path / 'README.md'} says how to build it")
    return 0


def _refuse_measure(args: argparse.Namespace) -> None:
    if args.measure or args.root:
        raise ValueError("--measure and --root are for --to int8; `multifire eval RUN` scores the network itself")


def _export_other(args: argparse.Namespace) -> int:
    _refuse_measure(args)
    from multifire.export.export_run import write_run

    path = write_run(args.folder, args.to, args.out, args.checkpoint, args.step)
    size = f"{path.stat().st_size / 1e6:,.2f} MB; " if path.is_file() else ""
    compared = "compared with the network; " if args.to.startswith("onnx") else ""
    print(f"{args.to}: {size}{compared}written to {path}")
    return 0
