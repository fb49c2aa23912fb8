"""Batches of images or of event frames for a network.

Shapes: T time steps, N samples, C channels, H height, W width.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from multifire.config import DataConfig
from multifire.datasets.augment import Draws, augment
from multifire.datasets.registry import DatasetInfo
from multifire.datasets.splits import EventSplit, Split


class Order:
    """The samples and random numbers of each batch, decided by (seed, epoch) only.

    Each of the `processes` (rank, world) takes a slice of every batch; together they take every sample once.
    """

    def __init__(self, samples: int, batch_size: int, shuffle: bool, seed: int, processes: tuple[int, int] = (0, 1)):
        assert samples > 0
        assert batch_size >= 1
        if seed < 0:
            raise ValueError(f"seed is {seed}, expected at least 0")
        self.samples, self._batch_size, self._shuffle, self._seed = samples, batch_size, shuffle, seed
        self._rank, self._world = processes

    def __len__(self) -> int:
        """Number of batches in an epoch, with the last partial one."""
        return -(-self.samples // self._batch_size)

    def size(self, batch: int) -> int:
        """Return the number of samples in a batch, over all processes."""
        return min(self._batch_size, self.samples - batch * self._batch_size)

    def epoch(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Draws]]:
        """Return positions [N] and random numbers of this process's samples, for each batch from number `start` on.

        Raises:
            ValueError: start is not within the epoch.
        """
        if not 0 <= start <= len(self):
            raise ValueError(f"start is {start}, expected 0 to {len(self)}, the batches of an epoch")
        return self._draw(epoch, start)

    def _draw(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Draws]]:
        order = torch.arange(self.samples)
        if self._shuffle:
            order = torch.randperm(self.samples, generator=self._generator(epoch, 0))
        for batch in range(start, len(self)):
            index_N = order[batch * self._batch_size : (batch + 1) * self._batch_size]
            n, rank, world = len(index_N), self._rank, self._world
            own = slice(
                -(-n * rank // world), -(-n * (rank + 1) // world)
            )  # a later process may have no samples, the first one never
            yield index_N[own], Draws(self._generator(epoch, 1 + batch), n, own)

    def _generator(self, epoch: int, stream: int) -> torch.Generator:
        """Return the generator of the epoch's order (stream 0) or of its batch b (stream 1 + b)."""
        state = np.random.SeedSequence([self._seed, epoch, stream]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]))


class Batches:
    """Batches of images from one split, in an order that depends on (seed, epoch) only.

        x[t] = (image / 255 - mean) / std   for every t

    The images lie on the device as uint8 (CIFAR-10: 154 MB), so that no batch is copied from the host. Crop and flip
    work on bytes; only the batch becomes float32.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        timesteps: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        shuffle: bool,
        seed: int = 0,
        crop_padding: int = 0,
        flip: bool = False,
        processes: tuple[int, int] = (0, 1),
    ):
        """Copy the split to the device.

        Args:
            split: the samples.
            batch_size: images in a batch; the last of an epoch may have fewer.
            timesteps: T; each image is shown T times.
            mean: mean of each channel, for pixels in 0..1.
            std: standard deviation of each channel, for pixels in 0..1.
            device: device of the batches.
            shuffle: new order in each epoch, random crop and flip. Without it the order is the split's, and
                crop_padding and flip are ignored.
            seed: seed of order, crops and flips.
            crop_padding: black pixels added on every side before a window of the old size is cut out at random.
            flip: mirror each image with probability 1/2.
            processes: (rank, world) of this process, see Order.

        Raises:
            ValueError: seed is below 0.
        """
        assert timesteps >= 1
        assert len(mean) == len(std) == split.images.shape[1]
        self.order = Order(len(split), batch_size, shuffle, seed, processes)
        self.images = torch.from_numpy(split.images).to(device)
        self.labels = torch.from_numpy(split.labels).to(device)
        self.timesteps = timesteps
        self.crop_padding, self.flip = (crop_padding, flip) if shuffle else (0, False)
        std_C11 = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
        self._scale_C11 = (1 / (255 * std_C11)).to(device)
        self._offset_C11 = (torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1) / std_C11).to(device)

    def __len__(self) -> int:
        """Number of batches in an epoch, with the last partial one."""
        return len(self.order)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the batches of an epoch from number `start` on, the same as when drawn from the beginning.

        Yields:
            x [T, N, C, H, W] float32, expanded over time (stride 0, no copy), and labels [N] int64, on the device.

        Raises:
            ValueError: start is not within the epoch.
        """
        return map(self._make, self.order.epoch(epoch, start))

    def _make(self, drawn: tuple[Tensor, Draws]) -> tuple[Tensor, Tensor]:
        images_NCHW, labels_N = self._pick(*drawn)
        x_NCHW = images_NCHW.to(torch.float32).mul_(self._scale_C11).sub_(self._offset_C11)
        return x_NCHW.expand(self.timesteps, *x_NCHW.shape), labels_N

    def _pick(self, index_N: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Return cropped and flipped images, and labels."""
        margin = 2 * self.crop_padding + 1
        y_N, x_N = draws.integers(margin), draws.integers(margin)
        mirrored_N = draws.integers(2) * int(self.flip)
        # stacked, so that one small tensor is copied to a GPU instead of four
        index_N, *window = torch.stack([index_N, y_N, x_N, mirrored_N]).to(self.images.device, non_blocking=True)
        images_NCHW = self.images.index_select(0, index_N)
        if self.crop_padding or self.flip:
            images_NCHW = cut(images_NCHW, self.crop_padding, *window)
        return images_NCHW, self.labels.index_select(0, index_N)


def cut(images_NCHW: Tensor, padding: int, y_N: Tensor, x_N: Tensor, mirrored_N: Tensor) -> Tensor:
    """Cut windows of the images' size out of the zero-padded images, and mirror them if mirrored_N is 1.

    Args:
        images_NCHW: of any dtype.
        padding: pixels added on every side.
        y_N: upper edge of each window, 0 .. 2·padding.
        x_N: left edge of each window, 0 .. 2·padding.
        mirrored_N: 0 or 1 for each window.
    """
    N, C, H, W = images_NCHW.shape
    padded_NCHW = F.pad(images_NCHW, [padding] * 4)
    columns = torch.arange(W, device=images_NCHW.device)
    rows_NH = y_N[:, None] + torch.arange(H, device=images_NCHW.device)
    columns_NW = x_N[:, None] + torch.where(mirrored_N[:, None] == 1, W - 1 - columns, columns)
    # One gather over the flattened plane is 4 times faster than indexing on a CPU.
    place_NHW = rows_NH[:, :, None] * padded_NCHW.shape[3] + columns_NW[:, None, :]
    place_NCP = place_NHW.view(N, 1, H * W).expand(N, C, H * W)
    return padded_NCHW.flatten(2).gather(2, place_NCP).view(N, C, H, W)


class EventBatches:
    """Batches of event frames from one split, in an order that depends on (seed, epoch) only.

        x[t] = event counts of frame t

    The frames stay in their memory-mapped file; a batch copies its own. As in the paper, counts are not normalised; an
    input norm (ModelConfig.norm_input) makes a network independent of the event rate.
    """

    def __init__(
        self,
        split: EventSplit,
        *,
        batch_size: int,
        device: torch.device,
        shuffle: bool,
        seed: int = 0,
        cfg: DataConfig | None = None,
        mirror: Sequence[int] = (),
        processes: tuple[int, int] = (0, 1),
    ):
        """Keep the split memory-mapped.

        Args:
            split: the samples.
            batch_size: samples in a batch; the last of an epoch may have fewer.
            device: device of the batches and of the augmentation.
            shuffle: new order in each epoch, and augmentation; without it nothing is random.
            seed: seed of order and augmentation.
            cfg: the augmentation; None: none.
            mirror: see `multifire.datasets.augment.augment`.
            processes: (rank, world) of this process, see Order.

        Raises:
            ValueError: seed is below 0.
        """
        self.order = Order(len(split), batch_size, shuffle, seed, processes)
        self._split, self._device, self._mirror = split, device, mirror
        self._cfg = cfg if shuffle else None

    def __len__(self) -> int:
        """Number of batches in an epoch, with the last partial one."""
        return len(self.order)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the batches of an epoch from number `start` on, the same as when drawn from the beginning.

        Yields:
            x [T, N, 2, H, W] float32, whose [T·N, 2, H, W] is channels-last, and labels [N] int64, on the device.

        Raises:
            ValueError: start is not within the epoch.
        """
        return map(self._make, self.order.epoch(epoch, start))

    def _make(self, drawn: tuple[Tensor, Draws]) -> tuple[Tensor, Tensor]:
        index_N, draws = drawn[0].numpy(), drawn[1]
        frames_NTCHW = torch.from_numpy(self._split.frames[self._split.rows[index_N]]).to(self._device)
        labels_N = torch.from_numpy(self._split.labels[index_N]).to(self._device)
        if self._cfg:
            frames_NTCHW, labels_N = augment(frames_NTCHW, labels_N, self._cfg, self._mirror, draws)
        x_TNHWC = frames_NTCHW.permute(1, 0, 3, 4, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return x_TNHWC.permute(0, 1, 4, 2, 3), labels_N


def make_batches(
    split: Split | EventSplit,
    info: DatasetInfo,
    cfg: DataConfig,
    *,
    batch_size: int,
    device: torch.device,
    shuffle: bool,
    seed: int = 0,
    processes: tuple[int, int] = (0, 1),
) -> Batches | EventBatches:
    """Return the batches of a split as a run's configuration describes them."""
    if isinstance(split, EventSplit):
        return EventBatches(
            split, batch_size=batch_size, device=device, shuffle=shuffle, seed=seed, cfg=cfg, mirror=info.mirror,
            processes=processes,
        )  # fmt: skip
    return Batches(
        split,
        batch_size=batch_size,
        timesteps=cfg.timesteps,
        mean=info.mean,
        std=info.std,
        device=device,
        shuffle=shuffle,
        seed=seed,
        crop_padding=cfg.crop_padding,
        flip=cfg.flip,
        processes=processes,
    )
