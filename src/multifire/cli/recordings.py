"""multifire data info FILE: describe a recording."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from multifire.cli.output import print_lines

if TYPE_CHECKING:
    import numpy as np

    from multifire.events import Recording
    from multifire.events.overview import Overview

BLOCKS = " ▁▂▃▄▅▆▇█"
MAX_NAMED = 10
"""Number of hot pixels that are named one by one."""


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
