"""The samples of a split in the memory from which batches are made: the GPU's, if they fit.

Shapes: N samples of a batch, M samples of the split.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from multifire.datasets.augment import Draws

FRACTION_OF_FREE_MEMORY = 0.25
"""Fraction of a GPU's free memory that the samples of a split may take."""


class Samples:
    """Images or event frames with their labels, picked by index.

    On a GPU with enough free memory they lie on the device, so that no batch is copied from the host. Else they stay in
    their array, which may be memory-mapped; a thread reads them one batch ahead into memory that a GPU can read itself.
    """

    def __init__(self, samples: np.ndarray, labels: np.ndarray, device: torch.device, rows: np.ndarray | None = None):
        """Keep the samples of a split.

        Args:
            samples: [rows, ...].
            labels: class of each sample, int64 [M].
            device: device of the batches.
            rows: row in `samples` of each sample, int64 [M] (default: all rows in order).
        """
        self._device = device
        self._samples, self._labels = samples, labels
        self._rows = np.arange(len(labels)) if rows is None else rows
        self._on_device: tuple[Tensor, Tensor, Tensor] | None = None
        if device.type == "cuda" and samples.nbytes <= FRACTION_OF_FREE_MEMORY * torch.cuda.mem_get_info(device)[0]:
            parts = (np.ascontiguousarray(samples), self._labels, self._rows)
            self._on_device = tuple(torch.from_numpy(part).to(device) for part in parts)  # pyright: ignore[reportAttributeAccessIssue]

    def pick(self, drawn: Iterable[tuple[Tensor, Draws]]) -> Iterator[tuple[Tensor, Tensor, Draws]]:
        """Pick the samples of each batch.

        Args:
            drawn: for each batch an index int64 [N] on the host, and random numbers, which are passed on.

        Yields:
            The samples [N, ...] and labels [N] on the device, and the random numbers.
        """
        if self._on_device is not None:
            return map(self._pick_on_device, drawn)
        if self._device.type == "cpu":
            return map(self._pick_on_host, drawn)
        return map(self._to_device, one_ahead(map(self._pick_pinned, drawn)))

    def _pick_on_device(self, drawn: tuple[Tensor, Draws]) -> tuple[Tensor, Tensor, Draws]:
        assert self._on_device is not None
        samples, labels, rows = self._on_device
        index_N = drawn[0].to(self._device, non_blocking=True)
        return samples.index_select(0, rows[index_N]), labels[index_N], drawn[1]

    def _pick_on_host(self, drawn: tuple[Tensor, Draws]) -> tuple[Tensor, Tensor, Draws]:
        index = drawn[0].numpy()
        samples, labels = self._samples[self._rows[index]], self._labels[index]
        return torch.from_numpy(samples), torch.from_numpy(labels), drawn[1]

    def _pick_pinned(self, drawn: tuple[Tensor, Draws]) -> tuple[Tensor, Tensor, Draws]:
        samples, labels, draws = self._pick_on_host(drawn)
        return samples.pin_memory(), labels.pin_memory(), draws

    def _to_device(self, picked: tuple[Tensor, Tensor, Draws]) -> tuple[Tensor, Tensor, Draws]:
        samples, labels, draws = picked
        return samples.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True), draws


Item = TypeVar("Item")


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items, each of which a thread computes while the one before is in use."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = pool.submit(next, iterator, end)
        while (item := pending.result()) is not end:
            pending = pool.submit(next, iterator, end)
            yield cast(Item, item)
