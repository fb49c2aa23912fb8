"""Batches of images or of event frames for a network.

Shapes: T time steps, N samples, C channels, H height, W width.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from multifire.config import DataConfig
from multifire.datasets.augment import Draws, augment
from multifire.datasets.image_augment import Augment, ImageAugmentation, call_augment
from multifire.datasets.mixup import MixedLabels, draw_mixup, mix
from multifire.datasets.registry import DatasetInfo
from multifire.datasets.samples import Samples
from multifire.datasets.splits import EventSplit, Split


class Order:
    """The samples and random numbers of each batch, decided by (seed, epoch) only.

    Each of the `processes` (rank, world) takes a slice of every batch; together they take every sample once.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        shuffle: bool,
        seed: int,
        processes: tuple[int, int] = (0, 1),
        whole: bool = False,
    ):
        """Decide the batches of an epoch; with `whole`, a process draws the whole batch, of which it uses `own`."""
        assert samples > 0
        assert batch_size >= 1
        if seed < 0:
            raise ValueError(f"seed is {seed}, expected at least 0")
        self.samples, self._batch_size, self._shuffle, self._seed = samples, batch_size, shuffle, seed
        self._rank, self._world = processes
        self._whole = whole

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
            drawn = slice(None) if self._whole else self.own(len(index_N))
            yield index_N[drawn], Draws(self._generator(epoch, 1 + batch), len(index_N), drawn)

    def own(self, n: int) -> slice:
        """Return the part of this process in a batch of `n` samples."""
        rank, world = self._rank, self._world
        return slice(-(-n * rank // world), -(-n * (rank + 1) // world))  # a later one may be empty, the first never

    def _generator(self, epoch: int, stream: int) -> torch.Generator:
        """Return the generator of the epoch's order (stream 0) or of its batch b (stream 1 + b)."""
        state = np.random.SeedSequence([self._seed, epoch, stream]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]))


class Batches:
    """Batches of images from one split, in an order that depends on (seed, epoch) only.

        x[t] = (image / 255 - mean) / std   for every t; images of floats are not divided by 255

    On a GPU the images lie on the device as uint8 (CIFAR-10: 154 MB) if they fit; see `Samples`. Crop and flip work on
    bytes; only the batch becomes float32. With mixup each process augments the whole batch, so that several processes
    make the same batches as one.
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
        augmentation: ImageAugmentation | None = None,
        augment: Augment | None = None,
        processes: tuple[int, int] = (0, 1),
    ):
        """Copy the split to a GPU if it fits.

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
            augmentation: further options, applied after crop and flip; without shuffle it is ignored.
            augment: called on the images after crop and flip, see Augment; without shuffle it is ignored.
            processes: (rank, world) of this process, see Order.

        Raises:
            ValueError: seed is below 0, or an option needs images of bytes.
        """
        assert timesteps >= 1
        assert len(mean) == len(std) == split.images.shape[1]
        self._augmentation = augmentation if augmentation is not None and shuffle else ImageAugmentation()
        self._augment = augment if shuffle else None
        self.order = Order(len(split), batch_size, shuffle, seed, processes, whole=self._augmentation.mixup > 0)
        self._augmentation.check(split.images.dtype)
        self._samples = Samples(split.images, split.labels, device)
        self._device = device
        self.timesteps = timesteps
        self.crop_padding, self.flip = (crop_padding, flip) if shuffle else (0, False)
        std_C11 = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
        self._scale_C11 = (1 / ((255 if split.images.dtype == np.uint8 else 1) * std_C11)).to(device)
        self._offset_C11 = (torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1) / std_C11).to(device)

    def __len__(self) -> int:
        """Number of batches in an epoch, with the last partial one."""
        return len(self.order)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Any]]:
        """Return the batches of an epoch from number `start` on, the same as when drawn from the beginning.

        Yields:
            x [T, N, C, H, W] float32, expanded over time (stride 0, no copy), and labels [N] int64, on the device; with
            mixup MixedLabels instead.

        Raises:
            ValueError: start is not within the epoch.
        """
        return map(self._make, self._samples.pick(self.order.epoch(epoch, start)))

    def _make(self, picked: tuple[Tensor, Tensor, Draws]) -> tuple[Tensor, Tensor | MixedLabels]:
        images_NCHW, labels_N, draws = picked
        options, augment = self._augmentation, self._augment
        if not options.is_on and augment is None:
            if self.crop_padding or self.flip:
                images_NCHW = self._crop_and_flip(images_NCHW, draws)
            return self._shown(self._normalise(images_NCHW)), labels_N
        # Numbers are drawn even if unused: one option must not change the numbers of another.
        images_NCHW = self._crop_and_flip(images_NCHW, draws)
        plan = options.draw(images_NCHW.shape, draws)
        images_NCHW = plan.change_bytes(images_NCHW)
        if augment is not None:
            images_NCHW = call_augment(augment, images_NCHW, draws)
        x_NCHW = plan.erase(self._normalise(images_NCHW))
        if not options.mixup:
            return self._shown(x_NCHW), labels_N
        partner_N, weight = draw_mixup(draws, options.mixup)
        own = self.order.own(len(labels_N))
        x_NCHW, labels = mix(x_NCHW, labels_N, partner_N.to(self._device, non_blocking=True), weight)
        return self._shown(x_NCHW[own]), labels[own]

    def _normalise(self, images_NCHW: Tensor) -> Tensor:
        x_NCHW = images_NCHW.to(torch.float32, copy=True)
        return x_NCHW.mul_(self._scale_C11).sub_(self._offset_C11)

    def _shown(self, x_NCHW: Tensor) -> Tensor:
        """Return the images at every time step."""
        return x_NCHW.expand(self.timesteps, *x_NCHW.shape)

    def _crop_and_flip(self, images_NCHW: Tensor, draws: Draws) -> Tensor:
        margin = 2 * self.crop_padding + 1
        y_N, x_N = draws.integers(margin), draws.integers(margin)
        mirrored_N = draws.integers(2) * int(self.flip)
        # stacked, so that one small tensor is copied to a GPU instead of three
        window = torch.stack([y_N, x_N, mirrored_N]).to(self._device, non_blocking=True)
        return cut(images_NCHW, self.crop_padding, *window)


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

    On a GPU the frames lie on the device if they fit, else they stay in their memory-mapped file; see `Samples`. As in
    the paper, counts are not normalised; an input norm (ModelConfig.norm_input) makes a network independent of the
    event rate.
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
        augment: Augment | None = None,
        processes: tuple[int, int] = (0, 1),
    ):
        """Copy the split to a GPU if it fits, or else keep it memory-mapped.

        Args:
            split: the samples.
            batch_size: samples in a batch; the last of an epoch may have fewer.
            device: device of the batches and of the augmentation.
            shuffle: new order in each epoch, and augmentation; without it nothing is random.
            seed: seed of order and augmentation.
            cfg: the augmentation; None: none.
            mirror: see `multifire.datasets.augment.augment`.
            augment: called on the frames after the augmentation of `cfg`, see Augment; without shuffle it is ignored.
            processes: (rank, world) of this process, see Order.

        Raises:
            ValueError: seed is below 0.
        """
        self.order = Order(len(split), batch_size, shuffle, seed, processes)
        self._samples = Samples(split.frames, split.labels, device, split.rows)
        self._mirror = mirror
        self._cfg, self._augment = (cfg, augment) if shuffle else (None, None)

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
        return map(self._make, self._samples.pick(self.order.epoch(epoch, start)))

    def _make(self, picked: tuple[Tensor, Tensor, Draws]) -> tuple[Tensor, Tensor]:
        frames_NTCHW, labels_N, draws = picked
        if self._cfg:
            frames_NTCHW, labels_N = augment(frames_NTCHW, labels_N, self._cfg, self._mirror, draws)
        if self._augment is not None:
            frames_NTCHW = call_augment(self._augment, frames_NTCHW, draws)
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
    augment: Augment | None = None,
    processes: tuple[int, int] = (0, 1),
) -> Batches | EventBatches:
    """Return the batches of a split as a run's configuration describes them.

    Args:
        split: the samples.
        info: description of the data set.
        cfg: time steps and augmentation.
        batch_size: samples in a batch; the last of an epoch may have fewer.
        device: device of the batches and of the augmentation.
        shuffle: new order in each epoch, and augmentation.
        seed: seed of order and augmentation.
        augment: called on training batches, see Augment.
        processes: (rank, world) of this process, see Order.

    Raises:
        ValueError: seed is below 0, or an option needs images of bytes.
    """
    if isinstance(split, EventSplit):
        return EventBatches(
            split, batch_size=batch_size, device=device, shuffle=shuffle, seed=seed, cfg=cfg, mirror=info.mirror,
            augment=augment, processes=processes,
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
        augmentation=ImageAugmentation(cfg.cutout, cfg.random_erasing, cfg.trivial_augment, cfg.mixup),
        augment=augment,
        processes=processes,
    )
