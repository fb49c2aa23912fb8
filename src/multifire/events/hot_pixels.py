"""Find hot pixels: pixels of a camera that fire by themselves, whatever they see."""

import numpy as np

from multifire.events.recording import Recording, check_side

TIMES = 10
"""Events of a hot pixel are more than this many times those of the second busiest of its eight neighbours."""


def find_hot_pixels(recording: Recording) -> np.ndarray:
    """Read a recording to its end; return a mask [H, W] of its hot pixels, see `hot_pixels`.

    Raises:
        ValueError: a damaged recording, or an unknown sensor size.
    """
    return hot_pixels(count_pixels(recording))


def count_pixels(recording: Recording) -> np.ndarray:
    """Read a recording to its end; return the number of events of each pixel, int64 [H, W].

    Raises:
        ValueError: a damaged recording, or an unknown sensor size.
    """
    if recording.sensor_size is None:
        raise ValueError(f"{recording.name}: does not state its sensor's size; give it with --sensor, such as 346x260")
    check_side(recording.name, recording.sensor_size)
    height, width = recording.sensor_size
    counts = np.zeros(height * width, np.int64)
    for _, pixel in recording.packed():
        counts += np.bincount(pixel >> 1, minlength=counts.size)
    return counts.reshape(height, width)


def hot_pixels(counts_HW: np.ndarray) -> np.ndarray:
    """Return a mask of the pixels with more than TIMES · max(n, 1) events, n those of the second busiest neighbour.

    Things that move, and the edges of things that stay, fire pixels side by side: a pixel on the thinnest line has two
    neighbours as busy as itself. Two hot pixels beside each other are still found. Below eleven events none is hot.
    """
    padded = np.pad(counts_HW, 1)
    height, width = counts_HW.shape
    busiest, second = np.zeros((2, *counts_HW.shape), counts_HW.dtype)
    for row in range(3):
        for column in range(3):
            if (row, column) != (1, 1):
                neighbour = padded[row : row + height, column : column + width]
                second = np.maximum(second, np.minimum(busiest, neighbour))
                busiest = np.maximum(busiest, neighbour)
    return counts_HW > TIMES * np.maximum(second, 1)
