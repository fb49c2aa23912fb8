"""multifire eval: score a run's checkpoint, or an exported file, on the test set."""

import argparse

from multifire.cli.options import add_checkpoint, add_code, add_device, add_root, add_run
from multifire.cli.output import print_lines, print_table


def add_parser(commands) -> None:
    """Add the command and its options to the parser."""
    parser = commands.add_parser("eval", help="score a run's checkpoint, or an exported file, on the test set")
    add_run(parser, files=True)
    add_code(parser)
    add_checkpoint(parser)
    add_root(parser)
    add_device(parser)
    parser.add_argument("--batch-size", type=int, help="samples in one step (default: the run's)")
    parser.add_argument("--margin", type=float, nargs="+", default=[], metavar="M",
                        help="print accuracy and time steps if samples stop at these margins, as in `run`")  # fmt: skip
    parser.set_defaults(run=evaluate)


def evaluate(args: argparse.Namespace) -> int:
    """Score the run or the file, and print the accuracy of each class and after each time step."""
    from multifire.experiments.score import evaluate_file, evaluate_run

    if args.folder.is_file():
        scored, path = evaluate_file(args.folder, args.root, args.batch_size, args.margin)
    else:
        scored, path = evaluate_run(args.folder, args.checkpoint, args.root, args.device, args.batch_size, args.margin)
    names = scored.pop("classes")
    rows = [
        [name, "-" if accuracy is None else f"{100 * accuracy:.2f}"]
        for name, accuracy in zip(names, scored["per_class"], strict=True)
    ]
    print_table(["class", "accuracy %"], rows, title=f"{path}: {scored['count']:,} test samples")
    steps = "  ".join(f"{100 * accuracy:.2f}" for accuracy in scored["per_step"])
    print_lines([f"accuracy after each time step %: {steps}"])
    for early in scored["early"]:
        print_lines([
            f"stopped at margin {early['margin']:g}: accuracy {100 * early['accuracy']:.2f} % after "
            f"{early['mean_steps']:.2f} of {len(scored['per_step'])} steps on average"
        ])  # fmt: skip
    print(f"accuracy {100 * scored['accuracy']:.2f} %, loss {scored['loss']:.4f}; written to {path}")
    return 0
