"""multifire run: play a recording or a picture, or follow a camera, through a run's network."""

import argparse
import sys
from pathlib import Path

from multifire.cli.options import add_checkpoint, add_code, add_device, add_run


def add_parser(commands) -> None:
    """Add the command and its options to the parser."""
    about = "play a recording or a picture, or follow a camera, through a run's network"
    parser = commands.add_parser("run", help=about)
    add_run(parser, files=True)
    add_code(parser)
    parser.add_argument("source", type=Path, nargs="?", metavar="RECORDING",
                        help="recording in any known format; picture; .npy of frames [T, C, H, W]; "
                        "folder of .npy")  # fmt: skip
    parser.add_argument("--follow", action="store_true",
                        help="read events from standard input as they arrive: records of 13 bytes, little-endian, "
                        "t [us, int64], x, y [int16], p [int8]")  # fmt: skip
    parser.add_argument("--udp", type=int, metavar="PORT",
                        help="with --follow: read UDP packets of such records from this port of 127.0.0.1")  # fmt: skip
    parser.add_argument("--margin", type=float, metavar="M",
                        help="end a sample once its first class leads the second by this probability")  # fmt: skip
    parser.add_argument("--engine", choices=("auto", "native", "torch"), default="auto", metavar="engine",
                        help="native: int8 weights, without torch's overhead; torch: the run's own numbers "
                        "(default: native for int8 files, and on a CPU for runs that int8 can hold)")  # fmt: skip
    add_checkpoint(parser)
    add_device(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the prediction after each frame, and the latencies at the end."""
    if args.follow == (args.source is not None) or (args.udp is not None and not args.follow):
        raise ValueError(
            "give either a recording or a picture to play, or --follow (and --udp PORT to read from a port)"
        )
    from multifire.engine.stream import Player

    player = Player(args.folder, args.checkpoint, args.device, args.margin, args.engine)
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
