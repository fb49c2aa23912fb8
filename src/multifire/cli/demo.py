"""multifire demo: train on the embedded digits, or show a trained network of the package at work."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from multifire.cli.output import print_lines
from multifire.cli.recordings import figures, play_in_terminal
from multifire.cli.train import run_training, until_stopped
from multifire.config import TrainOptions, get_recipe
from multifire.utils.progress import CONSOLE

if TYPE_CHECKING:
    import numpy as np
    from rich.text import Text

    from multifire.experiments.showcase import Showcase

PICTURES_IN_A_ROW = 5
SLOW_MOTION = 0.1


def add_parser(commands) -> None:
    """Add the command and its options to the parser."""
    parser = commands.add_parser("demo", help="train on the embedded digits; nothing to download, a few minutes")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/demo-DATE-TIME)")
    parser.add_argument("--events", action="store_true", help="train on simulated event recordings of the digits")
    parser.add_argument("--pretrained", action="store_true", help="show a trained network at work; takes a second")
    parser.set_defaults(run=demo)


def demo(args: argparse.Namespace) -> int:
    """Train the recipe `digits` or `digits-dvs`, or show the trained network."""
    if args.pretrained:
        return show_pretrained()
    out = args.out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    cfg = get_recipe("digits-dvs" if args.events else "digits")
    return until_stopped(lambda: run_training(cfg, out, TrainOptions()))


def show_pretrained() -> int:
    """Show what the package's network says of test digits, its dormant units and energy, and a simulated recording."""
    from multifire.experiments.showcase import classify_digits

    shown = classify_digits()
    if CONSOLE.is_terminal:
        for start in range(0, len(shown.pictures), PICTURES_IN_A_ROW):
            CONSOLE.print(grey_blocks(shown.pictures[start : start + PICTURES_IN_A_ROW]))
    print_lines([*predictions(shown), *measurements(shown)])
    show_recording(shown.pictures[3])
    print_lines(["next: multifire demo trains this network; multifire report digits shows its report"])
    return 0


def grey_blocks(pictures: "np.ndarray") -> "Text":
    """Return pictures [N, H, W] side by side, two pixels in a character."""
    from rich.text import Text

    text = Text(no_wrap=True)
    for row in range(0, pictures.shape[1], 2):
        for top, bottom in zip(pictures[:, row].ravel().tolist(), pictures[:, row + 1].ravel().tolist(), strict=True):
            text.append("▀", f"rgb({top},{top},{top}) on rgb({bottom},{bottom},{bottom})")
        text.append("\n")
    return text


def predictions(shown: "Showcase") -> list[str]:
    """Return a line for each digit: the prediction after the first and after the last time step."""
    first_NL, last_NL = shown.probabilities[0], shown.probabilities[-1]
    steps = len(shown.probabilities)
    return [
        f"a {digit}: the network says {last.argmax()} with {100 * last.max():.1f} % after {steps} time steps; "
        f"after the first, {first.argmax()} with {100 * first.max():.1f} %"
        for digit, (first, last) in enumerate(zip(first_NL, last_NL, strict=True))
    ]


def measurements(shown: "Showcase") -> list[str]:
    """Return accuracy, dormant units and energy."""
    found, energy = shown.run.headline, shown.run.headline["energy"]
    saved = energy["ann_pj"] / energy["snn_pj"]
    return [
        f"accuracy on 1,000 test digits: {100 * shown.accuracy:.2f} %",
        f"dormant units, which no gradient passes: {100 * found['dormant']:.1f} %",
        f"{energy['synops']:,.0f} synaptic operations a digit: {energy['snn_pj'] / 1e6:.2f} µJ, estimated; "
        f"the same network without spikes {energy['ann_pj'] / 1e6:.2f} µJ, {saved:.1f} times as much",
    ]


def show_recording(picture: "np.ndarray") -> None:
    """Simulate the recording of a camera that moves over the picture, describe it, and play it in a terminal."""
    from multifire.events.overview import look_over
    from multifire.events.play import film
    from multifire.events.simulate import simulate_recording

    overview = look_over(lambda: simulate_recording(picture))
    print_lines(["the simulated recording of an event camera that moves over a 3:", *figures(overview)[1:4]])
    if CONSOLE.is_terminal:
        play_in_terminal(film(lambda: simulate_recording(picture), overview, speed=SLOW_MOTION))
