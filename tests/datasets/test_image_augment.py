"""Augmentation of images: cutout, random erasing, TrivialAugment against Pillow, mixup, and functions of one's own."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

from multifire.config import DataConfig
from multifire.datasets import EventSplit, MixedLabels, Split
from multifire.datasets.augment import Draws
from multifire.datasets.image_augment import draw_rectangles, in_box
from multifire.datasets.loader import Batches, EventBatches, make_batches
from multifire.datasets.mixup import draw_beta
from multifire.datasets.registry import DatasetInfo
from multifire.datasets.trivial_augment import LEVELS, OPERATIONS, apply_operations, strengths, trivial_augment

CPU = torch.device("cpu")
OPTIONS = {"cutout": 5, "random_erasing": 0.5, "trivial_augment": True, "mixup": 0.4}
rng = np.random.default_rng(0)


def smooth_images(count: int, channels: int, height: int, width: int) -> np.ndarray:
    """Return images of blocks, with few enough values that histograms are uneven."""
    shape = (count, channels, height // 4 + 1, width // 4 + 1)
    blocks = rng.integers(0, 200, shape, dtype=np.uint8).repeat(4, 2).repeat(4, 3)[:, :, :height, :width]
    return blocks + rng.integers(10, 50, blocks.shape, dtype=np.uint8)


def info_of(split: Split) -> DatasetInfo:
    channels, size = split.images.shape[1:3]
    classes = tuple(map(str, range(int(split.labels.max()) + 1)))
    return DatasetInfo("test", channels, size, classes, (0.5,) * channels, (0.25,) * channels, (1, 1))


def make(
    samples: int = 20, size: int = 16, batch_size: int = 8, processes=(0, 1), seed: int = 0, augment=None, **options
):
    images = np.random.default_rng(1).integers(0, 256, (samples, 3, size, size), dtype=np.uint8)
    split = Split(images, np.arange(samples))
    return make_batches(
        split, info_of(split), DataConfig(timesteps=2, **options), batch_size=batch_size, device=CPU, shuffle=True,
        seed=seed, augment=augment, processes=processes,
    )  # fmt: skip


def parts(labels) -> list[torch.Tensor]:
    return [labels.labels, labels.others, labels.weight] if isinstance(labels, MixedLabels) else [labels]


def equal(one, other) -> bool:
    return all(
        torch.equal(a, b) for (x, y), (x2, y2) in zip(one, other, strict=True)
        for a, b in zip([x, *parts(y)], [x2, *parts(y2)], strict=True)
    )  # fmt: skip


# Order and random numbers


@pytest.mark.parametrize("options", [{name: value} for name, value in OPTIONS.items()] + [OPTIONS], ids=str)
def test_batches_depend_on_seed_and_epoch_only(options):
    first = list(make(**options).epoch(3))
    torch.manual_seed(5)
    assert equal(make(**options).epoch(3), first)
    assert equal(make(**options).epoch(3, start=1), first[1:])
    assert not equal(make(**options).epoch(4), first)
    assert not equal(make(seed=1, **options).epoch(3), first)
    plain = list(make().epoch(3))
    assert not torch.equal(first[0][0], plain[0][0])
    assert all(torch.equal(parts(y)[0], y2) for (_, y), (_, y2) in zip(first, plain, strict=True))
    for x, y in first:
        assert x.shape[1] == len(y)
        assert x.stride(0) == 0
        assert x.dtype == torch.float32


@pytest.mark.parametrize(
    "options", [{}, {"crop_padding": 2, "flip": True, **OPTIONS}, {"cutout": 4, "flip": True}], ids=str
)
@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_make_the_batches_of_one(options, world):
    whole = list(make(samples=17, **options).epoch(1))
    shares = [list(make(samples=17, processes=(rank, world), **options).epoch(1)) for rank in range(world)]
    for batch, (x, y) in enumerate(whole):
        mine = [share[batch] for share in shares]
        assert torch.equal(torch.cat([x for x, _ in mine], 1), x)
        for number, part in enumerate(parts(y)):
            assert torch.equal(torch.cat([parts(y)[number] for _, y in mine]), part)


def test_one_option_does_not_change_the_numbers_of_another():
    small = {"cutout": 3, "random_erasing": 0.0}
    ((a, _), *_), ((b, _), *_) = make(**small).epoch(0), make(**small | {"flip": True}).epoch(0)
    assert torch.equal(a == 0, b == 0)  # the same squares: no byte normalises to 0 exactly
    ((c, _), *_) = make(cutout=3, random_erasing=0.7).epoch(0)
    assert ((c == 0) | (a != 0)).all()


def test_nothing_changes_without_shuffling():
    split = Split(rng.integers(0, 256, (6, 3, 8, 8), dtype=np.uint8), np.arange(6))
    options = {"batch_size": 4, "device": CPU, "shuffle": False}
    plain = make_batches(split, info_of(split), DataConfig(), **options)
    assert equal(
        make_batches(split, info_of(split), DataConfig(**OPTIONS), augment=lambda *a: 1 / 0, **options).epoch(0),
        plain.epoch(0),
    )


# Cutout and random erasing


def test_cutout_sets_a_square_to_the_mean_colour():
    x = torch.cat([x[0] for x, _ in make(samples=400, size=9, cutout=4).epoch(0)])
    plain = torch.cat([x[0] for x, _ in make(samples=400, size=9).epoch(0)])
    gone = (x == 0).all(1)
    assert torch.equal(x.masked_fill(gone[:, None], 0), plain.masked_fill(gone[:, None], 0))
    areas = gone.sum((1, 2))
    assert areas.max() == 16
    assert areas.min() >= 4  # a corner: half the side in both directions
    rows, columns = gone.any(2).sum(1), gone.any(1).sum(1)
    assert torch.equal(rows * columns, areas)
    assert gone.float().mean(0).min() > 0.02


def test_random_erasing_follows_its_probability_area_and_aspect():
    H, W, N = 40, 60, 4000
    draws = Draws(torch.Generator().manual_seed(0), N)
    top, left, height, width = draw_rectangles(H, W, 0.25, draws)
    chosen = height > 0
    assert 0.22 < chosen.double().mean() < 0.28
    top, left, height, width = (values[chosen] for values in (top, left, height, width))
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= H).all()
    assert (left + width <= W).all()
    area = (height * width) / (H * W)
    assert area.min() > 0.01
    assert area.max() < 0.36
    whole = (height < H) & (width < W) & (height > 8) & (width > 8)
    aspect = height[whole] / width[whole]
    assert aspect.min() > 0.25
    assert aspect.max() < 4
    mask = in_box(H, W, top, left, height, width)
    assert torch.equal(mask.sum((1, 2)), height * width)
    assert mask[0, top[0], left[0]]


# TrivialAugment


def by_pillow(name: str, image: Image.Image, strength: float) -> Image.Image:
    affine, size = Image.Transform.AFFINE, image.size
    enhancers = {"color": ImageEnhance.Color, "contrast": ImageEnhance.Contrast}
    enhancers |= {"brightness": ImageEnhance.Brightness, "sharpness": ImageEnhance.Sharpness}
    if name in enhancers:
        return enhancers[name](image).enhance(strength)
    return {
        "identity": lambda: image,
        "auto_contrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "rotate": lambda: image.rotate(strength),
        "solarize": lambda: ImageOps.solarize(image, 256 - int(strength)),
        "posterize": lambda: ImageOps.posterize(image, 8 - int(strength)),
        "shear_x": lambda: image.transform(size, affine, (1, strength, 0, 0, 1, 0)),
        "shear_y": lambda: image.transform(size, affine, (1, 0, 0, strength, 1, 0)),
        "translate_x": lambda: image.transform(size, affine, (1, 0, strength, 0, 1, 0)),
        "translate_y": lambda: image.transform(size, affine, (1, 0, 0, 0, 1, strength)),
    }[name]()


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 17, 40)], ids=str)
@pytest.mark.parametrize("number", range(len(OPERATIONS)), ids=[op.name for op in OPERATIONS])
def test_operations_equal_those_of_pillow(number, shape):
    levels, signs = torch.arange(LEVELS + 1).repeat(2), torch.tensor([1, -1]).repeat_interleave(LEVELS + 1)
    numbers = torch.full_like(levels, number)
    strength = strengths(numbers, levels, signs)
    images = smooth_images(len(levels), *shape)
    changed = apply_operations(torch.from_numpy(images), numbers, strength).numpy()
    differing = []
    for image, found, value in zip(images, changed, strength.tolist(), strict=True):
        pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        expected = np.asarray(by_pillow(OPERATIONS[number].name, Image.fromarray(pixels), value))
        expected = expected[None] if len(image) == 1 else expected.transpose(2, 0, 1)
        differing.append(np.abs(found.astype(int) - expected))
    if OPERATIONS[number].name == "rotate":  # at multiples of 90° the source lies between two pixels
        assert np.mean(np.stack(differing) > 0) < 0.005
    elif OPERATIONS[number].name == "auto_contrast":  # whole numbers here, rounded doubles in Pillow
        assert np.max(differing) <= 1
    else:
        assert np.max(differing) == 0


def test_strengths_are_those_of_the_paper():
    table = {op.name: (op.low, op.high, op.signed) for op in OPERATIONS if op.high}
    assert len(OPERATIONS) == 14
    assert table == {
        "rotate": (0, 135, True), "solarize": (0, 256, False), "color": (0.01, 2.0, False), "posterize": (0, 6, False),
        "contrast": (0.01, 2.0, False), "brightness": (0.01, 2.0, False), "sharpness": (0.01, 2.0, False),
        "shear_x": (0, 0.99, True), "shear_y": (0, 0.99, True),
        "translate_x": (0, 32, True), "translate_y": (0, 32, True),
    }  # fmt: skip
    numbers = torch.arange(14)
    top, bottom = (strengths(numbers, torch.full((14,), level), torch.full((14,), -1)) for level in (LEVELS, 0))
    for op, high, low in zip(OPERATIONS, top.tolist(), bottom.tolist(), strict=True):
        assert high == (-op.high if op.signed else op.high)
        assert low == op.low


def test_operations_and_levels_are_chosen_about_equally_often():
    images = torch.from_numpy(smooth_images(1, 3, 24, 24)).expand(7000, -1, -1, -1)
    changed = trivial_augment(images, Draws(torch.Generator().manual_seed(1), 7000))
    kinds = torch.unique(changed.flatten(1), dim=0)
    assert len(kinds) > 250  # of 14 operations × 31 levels × 2 signs many are alike
    same = (changed == images).flatten(1).all(1).double().mean()
    assert 0.07 < same < 0.14  # identity, and some operations at level 0


def test_samples_are_changed_alone():
    images = torch.from_numpy(smooth_images(60, 3, 12, 14))
    numbers = torch.randint(14, (60,), generator=torch.Generator().manual_seed(2))
    strength = strengths(numbers, torch.full((60,), 17), torch.ones(60, dtype=torch.int64))
    together = apply_operations(images, numbers, strength)
    alone = [apply_operations(images[n : n + 1], numbers[n : n + 1], strength[n : n + 1]) for n in range(60)]
    assert torch.equal(together, torch.cat(alone))
    assert apply_operations(images[:0], numbers[:0], strength[:0]).shape == (0, 3, 12, 14)
    assert apply_operations(images[:, :2], numbers, strength).shape == (60, 2, 12, 14)
    assert apply_operations(images[..., :2, :1], numbers, strength).shape == (60, 3, 2, 1)


# Mixup


def test_mixup_mixes_images_and_labels_alike():
    mixed, plain = list(make(mixup=0.7).epoch(2)), list(make().epoch(2))
    for (x, y), (x2, y2) in zip(mixed, plain, strict=True):
        assert isinstance(y, MixedLabels)
        assert torch.equal(y.labels, y2)
        assert y.labels.dtype == y.others.dtype == torch.int64
        assert sorted(y.others.tolist()) == sorted(y2.tolist())
        by_label = {int(label): image for label, image in zip(y2, x2[0], strict=True)}
        partner = torch.stack([by_label[int(label)] for label in y.others])
        weight = y.weight[:, None, None, None]
        torch.testing.assert_close(x[0], weight * x2[0] + (1 - weight) * partner)
        assert y.weight.unique().numel() == 1
        soft = y.soft(20)
        torch.testing.assert_close(soft.sum(1), torch.ones(len(y)))
        logits = torch.randn(len(y), 20, generator=torch.Generator().manual_seed(0))
        by_parts = y.weight * F.cross_entropy(logits, y.labels, reduction="none")
        by_parts += (1 - y.weight) * F.cross_entropy(logits, y.others, reduction="none")
        torch.testing.assert_close(F.cross_entropy(logits, soft, reduction="sum"), by_parts.sum())
        assert len(y[2:5]) == min(3, len(y) - 2)
        assert y.device == CPU


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("samples", [1, 64])
def test_weights_follow_the_beta_distribution(alpha, samples):
    draws = Draws(torch.Generator().manual_seed(0), samples)
    found = np.array([draw_beta(draws, alpha) for _ in range(4000)])
    assert found.mean() == pytest.approx(0.5, abs=0.03)
    assert found.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.06)
    assert ((found >= 0) & (found <= 1)).all()


# Functions of one's own


def test_a_function_of_ones_own_gets_bytes_and_the_draws_of_the_batch():
    seen = []

    def darker(images_NCHW, draws):
        assert images_NCHW.dtype == torch.uint8
        seen.append(draws.uniform(0, 1))
        return images_NCHW // 2

    first, again = (list(make(augment=darker).epoch(1)) for _ in range(2))
    assert equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:], strict=True))
    assert not any(torch.equal(a, b) for a, b in pairwise(seen[:2]))
    ((plain, _), *_) = make(crop_padding=0).epoch(1)
    expected = (torch.floor((plain * 0.25 + 0.5) * 255 + 0.5) // 2 / 255 - 0.5) / 0.25
    torch.testing.assert_close(first[0][0], expected)
    ((mixed, labels), *_) = make(augment=darker, **OPTIONS).epoch(1)
    assert isinstance(labels, MixedLabels)
    assert mixed.max() <= 0  # half of 255 lies below the mean


@pytest.mark.parametrize(
    ("augment", "found"),
    [
        (lambda images, draws: images.float(), r"torch.float32 \[8, 3, 16, 16\]"),
        (lambda images, draws: images[:1], r"torch.uint8 \[1, 3, 16, 16\]"),
        (lambda images, draws: None, "NoneType"),
    ],
)
def test_a_function_that_returns_something_else_is_named(augment, found):
    with pytest.raises(ValueError, match=rf"augment returned {found}, expected torch.uint8 \[8, 3, 16, 16\]"):
        next(make(augment=augment).epoch(0))


def test_a_function_of_ones_own_for_event_frames():
    frames = rng.integers(0, 5, (6, 4, 2, 8, 8), dtype=np.uint8)
    split = EventSplit(frames, np.arange(6), np.arange(6).astype(str), np.arange(6))
    given = {"batch_size": 6, "device": CPU, "cfg": DataConfig()}
    turned = EventBatches(split, shuffle=True, augment=lambda frames, draws: frames.flip(1), **given)
    plain = EventBatches(split, shuffle=True, **given)
    ((x, y),), ((x2, y2),) = turned.epoch(0), plain.epoch(0)
    assert torch.equal(x, x2.flip(0))
    assert torch.equal(y, y2)


def test_options_on_a_gpu_make_the_batches_of_a_cpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    images = smooth_images(32, 3, 16, 16)
    options = {"batch_size": 16, "timesteps": 1, "mean": (0.5,) * 3, "std": (0.25,) * 3, "shuffle": True, "flip": True}
    from multifire.datasets.image_augment import ImageAugmentation

    options["augmentation"] = ImageAugmentation(**OPTIONS)
    split = Split(images, np.arange(32))
    on_cpu, on_gpu = (Batches(split, device=torch.device(name), **options).epoch(0) for name in ("cpu", "cuda"))
    for (x, y), (x2, y2) in zip(on_cpu, on_gpu, strict=True):
        assert (x - x2.cpu()).abs().max() < 1e-5
        assert torch.equal(y.others, y2.others.cpu())
