"""multifire data convert and info FILE: convert, describe and play a recording."""

import argparse
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multifire.cli.output import print_lines

if TYPE_CHECKING:
    import numpy as np
    from rich.text import Text

    from multifire.events import Recording
    from multifire.events.overview import Overview
    from multifire.events.play import Film

BLOCKS = " ▁▂▃▄▅▆▇█"
MAX_NAMED = 10
"""Number of hot pixels that are named one by one."""


def add_parsers(subcommands: Any) -> None:
    """Add the commands about one recording to those about data sets."""
    converting = subcommands.add_parser("convert", help="write a recording in another format")
    converting.add_argument("source", type=Path, metavar="IN", help="recording in any known format")
    converting.add_argument("out", type=Path, metavar="OUT", help="file to write")
    converting.add_argument("--to", help="aedat2, aedat3.1, npz, hdf5 or csv (default: as OUT ends)")
    _add_sensor(converting)
    add_stray(converting)
    add_turns(converting)
    converting.set_defaults(run=convert)
    playing = subcommands.add_parser("play", help="show a recording as it was, in the terminal or as a page")
    playing.add_argument("source", type=Path, metavar="FILE", help="recording in any known format")
    playing.add_argument(
        "--out", type=Path, help="write a page with a time slider (.html), or an animation (.png, .gif)"
    )
    playing.add_argument("--fps", type=float, default=30.0, help="pictures per second (default: 30)")
    playing.add_argument("--speed", type=float, default=1.0, help="2: twice as fast as it was (default: 1)")
    _add_sensor(playing)
    add_stray(playing)
    add_turns(playing)
    playing.set_defaults(run=play)


def _add_sensor(parser: Any) -> None:
    parser.add_argument("--sensor", help="width and height of the sensor, such as 346x260, for files without them")


def add_stray(parser: Any) -> None:
    """Add --stray."""
    parser.add_argument("--stray", choices=("refuse", "drop"), metavar="stray",
                        help="events beside the sensor: refuse, or drop and count them")  # fmt: skip


def add_turns(parser: Any) -> None:
    """Add --flip-x, --flip-y and --hot-pixels."""
    turn = argparse.BooleanOptionalAction
    parser.add_argument("--flip-x", action=turn, help="turn recordings left to right")
    parser.add_argument("--flip-y", action=turn, help="turn recordings upside down")
    parser.add_argument("--hot-pixels", choices=("keep", "drop"), metavar="hot-pixels",
                        help="pixels that fire by themselves: keep, or drop")  # fmt: skip


def convert(args: argparse.Namespace) -> int:
    """Convert a recording; say what was written."""
    from multifire.events.convert import convert

    turns = {"flip_x": bool(args.flip_x), "flip_y": bool(args.flip_y), "drop_hot_pixels": args.hot_pixels == "drop"}
    done = convert(opener(args, args.source), args.out, args.to, **turns)
    size = (
        f"a sensor of {done.sensor_size[1]}×{done.sensor_size[0]}" if done.sensor_size else "a sensor of unknown size"
    )
    print_lines([f"{done.events:,} events of {size}, {done.read} to {done.written}; written to {args.out}"])
    if done.written == "csv" and done.sensor_size:
        print_lines([f"CSV does not state the sensor's size: read it with --sensor {done.sensor_size[1]}x"
                     f"{done.sensor_size[0]}"])  # fmt: skip
    return 0


def play(args: argparse.Namespace) -> int:
    """Describe a recording, and play it in the terminal or write it to a file."""
    from multifire.events.overview import look_over
    from multifire.events.play import TERMINAL_PICTURES, film, write_film
    from multifire.utils.progress import CONSOLE

    factory = opener(args, args.source)
    overview = look_over(factory)
    print_lines([str(args.source), *figures(overview)])
    options: dict[str, Any] = {"fps": args.fps, "speed": args.speed, "flip_x": bool(args.flip_x)}
    options |= {"flip_y": bool(args.flip_y), "drop_hot_pixels": args.hot_pixels == "drop"}
    if args.out:
        shown = film(factory, overview, **options)
        write_film(args.out, shown, args.source.name)
        print_lines([f"{shown.say()}; written to {args.out}"])
    elif CONSOLE.is_terminal:
        width, height = CONSOLE.width - 1, 2 * (CONSOLE.height - 3)
        shown = film(factory, overview, size=(height, width), pictures=TERMINAL_PICTURES, **options)
        print_lines([shown.say()])
        play_in_terminal(shown)
    else:
        print_lines(["not a terminal: give --out FILE.html for a page with a time slider, or FILE.png"])
    return 0


def play_in_terminal(shown: "Film") -> None:
    """Show one picture after the other, two pixels in a character, and skip pictures when the terminal is slow."""
    from rich.live import Live

    from multifire.utils.progress import CONSOLE

    begin, number = time.monotonic(), 0
    with contextlib.suppress(KeyboardInterrupt), Live(console=CONSOLE, auto_refresh=False) as live:
        while number < len(shown.pictures):
            live.update(blocks(shown, number), refresh=True)
            time.sleep(max(begin + (number + 1) * shown.seconds_each - time.monotonic(), 0))
            number = max(number + 1, int((time.monotonic() - begin) / shown.seconds_each))


def blocks(shown: "Film", number: int) -> "Text":
    """Return a picture as half blocks, and below it the time and the rates of both polarities."""
    from rich.text import Text

    from multifire.utils.images import PALETTE

    colours = [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in PALETTE.tolist()]
    picture = shown.pictures[number]
    text = Text(no_wrap=True)
    for row in range(0, len(picture), 2):
        below = picture[row + 1] if row + 1 < len(picture) else [0] * len(picture[row])
        for top, bottom in zip(picture[row], below, strict=True):
            text.append("▀", f"{colours[int(top)]} on {colours[int(bottom)]}")
        text.append("\n")
    off, on = shown.rates[number]
    return text.append(f"{number * shown.slice_us / 1e6:8.3f} s   ON {on:,.0f}/s   OFF {off:,.0f}/s")


def opener(args: argparse.Namespace, file: Path) -> "Callable[[], Recording]":
    """Return a function that opens the recording with --sensor and --stray."""
    from multifire.config.schema import parse_size
    from multifire.events import open_recording

    width, height = parse_size(args.sensor, "--sensor") if args.sensor else (0, 0)
    return lambda: open_recording(file, "", (height, width) if width else None, args.stray or "refuse")


def describe(args: argparse.Namespace) -> int:
    """Print the format, the sensor, the events, their rate over time and the hot pixels of a recording."""
    from multifire.events.overview import look_over

    print_lines([args.name, *figures(look_over(opener(args, Path(args.name))))])
    return 0


def figures(found: "Overview") -> list[str]:
    """Return the lines that describe a recording."""
    size = found.sensor_size
    sensor = f"sensor {size[1]}×{size[0]}" if size else "sensor size not stated; give it with --sensor"
    on_share = 100 * found.on_events / found.events
    return [
        f"format {found.format}, {sensor}",
        f"{found.events:,} events in {found.seconds:.3f} s from {found.first_us:,} µs on: "
        f"{found.events / found.seconds:,.0f} events/s, {on_share:.1f} % ON",
        *rate_lines(found.rates),
        *_hot_lines(found),
    ]


def rate_lines(rates: "np.ndarray") -> list[str]:
    """Return the rates [parts, 2] of both polarities as two lines of blocks, on one scale."""
    top = max(float(rates.max()), 1.0)
    lines = []
    for name, column in (("ON ", 1), ("OFF", 0)):
        heights = (rates[:, column] * (len(BLOCKS) - 1) / top).round().astype(int)
        lines.append(f"{name} {''.join(BLOCKS[height] for height in heights)} at most {rates[:, column].max():,.0f}/s")
    return lines


def _hot_lines(found: "Overview") -> list[str]:
    if not found.pixel_counts.size:
        return ["hot pixels: need the sensor's size"]
    hot = found.hot_pixels()
    if not hot:
        return ["hot pixels: none"]
    share = 100 * sum(count for _, _, count in hot) / found.events
    named = ", ".join(f"({x}, {y}): {count:,}" for x, y, count in hot[:MAX_NAMED])
    more = f" and {len(hot) - MAX_NAMED:,} more" if len(hot) > MAX_NAMED else ""
    return [
        f"hot pixels: {len(hot):,}, {share:.1f} % of the events; (column, row): events: {named}{more}",
        "leave them out with --hot-pixels drop (multifire data prepare, data convert) or --data.hot-pixels drop",
    ]
