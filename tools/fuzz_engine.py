#!/usr/bin/env python3
"""Give the native engine altered files and random calls, under the address and undefined-behaviour sanitizers.

usage: python tools/fuzz_engine.py [--inputs N] [--seed S] [--isa NAME]

Writes small int8 networks to a temporary folder and compiles fuzz_engine.cpp, which alters them. Ends with 0 if every
file and every call was computed or refused with a reason.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from multifire.config import ModelConfig  # noqa: E402
from tests.engine.networks import random_network, save  # noqa: E402

NETWORKS = (
    (ModelConfig(name="ds_resnet8", in_channels=2, width=2, num_classes=3, norm_input=True), True),
    (ModelConfig(name="ds_resnet8", in_channels=1, width=4, levels=1, membranes="shared", reset="any"), True),
    (ModelConfig(name="ds_resnet14", in_channels=3, width=3, num_classes=2, levels=2), False),
    (ModelConfig(name="ds_resnet8", in_channels=1, width=16, norm_input=True, reset="subtract"), False),
)
OPTIONS = (
    "-std=c++17",
    "-O1",
    "-g",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=200_000, help="number of files (default: 200,000)")
    parser.add_argument("--seed", type=int, default=0, help="of the alterations (default: 0)")
    parser.add_argument("--isa", help="instruction set (default: the best of this processor)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [
            save(folder / f"{number}.safetensors", random_network(model, counts))
            for number, (model, counts) in enumerate(NETWORKS)
        ]
        program = folder / "fuzz_engine"
        subprocess.run(["g++", *OPTIONS, "-o", program, ROOT / "tools" / "fuzz_engine.cpp"], check=True)
        environment = os.environ | ({"MULTIFIRE_ENGINE_ISA": args.isa} if args.isa else {})
        return subprocess.run(
            [program, str(args.inputs), str(args.seed), *files], env=environment, check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
