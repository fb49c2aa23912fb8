"""Train on arrays of one's own: images [N, C, H, W] in uint8 with their classes.

usage: python examples/own_data.py [OUT]
"""

import sys

import numpy as np

import multifire as mf


def stripes(samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return noisy images of horizontal (0) or vertical (1) stripes, and their classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, samples)
    rows = (np.arange(16) // 2 % 2)[:, None] * np.ones(16)
    images = np.where(labels[:, None, None] == 0, rows, rows.T) * 150 + rng.uniform(0, 100, (samples, 16, 16))
    return images[:, None].astype(np.uint8), labels


def main() -> None:
    out = sys.argv[1] if len(sys.argv) > 1 else "runs/own-data"
    data = mf.datasets.make_dataset("stripes", stripes(800, 0), stripes(200, 1), classes=("horizontal", "vertical"))
    cfg = mf.recipe("digits", **{"optim.epochs": 2, "model.width": 4, "data.crop_padding": 0})
    run = mf.train(cfg, out, data=data)
    print(f"held-out accuracy {100 * run.accuracy:.1f} %")


if __name__ == "__main__":
    main()
