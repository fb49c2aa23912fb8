"""Names of networks: kind and depth, or a registered name."""

from collections.abc import Callable
from typing import Any, NamedTuple

NETWORKS: dict[str, Callable[..., Any]] = {}
"""Registered networks; see `multifire.nn.register_network`."""
GIVEN = "given:"
"""Prefix of the names of networks and data sets that were given as an object; see `multifire.train`."""
BLOCK_KINDS = ["ds", "plain", "ms", "sew"]
"""Kinds of residual block; see `multifire.nn.register_block`."""
OWN_BLOCKS: set[str] = set()
"""Kinds that the user has registered."""
IMAGENET_STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
"""Blocks in each stage of the residual networks for large images, by depth."""
VGG_STAGES = {9: ((1,), (2, 2), (4, 4, 4, 4)), 11: ((1,), (2, 2), (4, 4), (8, 8, 8, 8))}
"""Widths of the convolutions in each stage after the first convolution, as multiples of the width, by depth."""
KNOWN = (
    "ds_resnetD, plain_resnetD, ms_resnetD or sew_resnetD with depth D = 6n+2: 8, 14, 20, 26, 32, ..., or for large "
    "images 18 or 34; vgg9, vgg11; or a name that the file given with --code registers"
)


class Architecture(NamedTuple):
    """What a network's name stands for."""

    kind: str
    """Kind of residual block, or "vgg"."""
    depth: int
    """Number of layers with weights on the longest path."""
    stages: tuple[Any, ...]
    """Residual networks: number of blocks in each stage. VGG: widths of each stage, as in VGG_STAGES."""
    imagenet: bool = False
    """True for the first layers of ImageNet networks: 7×7 convolution with stride 2 and 3×3 pooling with stride 2."""


def architecture(name: str) -> Architecture:
    """Return what one of multifire's network names stands for: `ds_resnet20` -> ("ds", 20, (3, 3, 3)).

    Raises:
        ValueError: another name.
    """
    kind, separator, text = name.partition("_resnet")
    depth = int(text) if text.isascii() and text.isdigit() else 0
    if name in ("vgg9", "vgg11"):
        return Architecture("vgg", int(name[3:]), VGG_STAGES[int(name[3:])])
    if kind in BLOCK_KINDS and separator and depth in IMAGENET_STAGES:
        return Architecture(kind, depth, IMAGENET_STAGES[depth], imagenet=True)
    if kind in BLOCK_KINDS and depth >= 8 and (depth - 2) % 6 == 0:
        return Architecture(kind, depth, ((depth - 2) // 6,) * 3)
    raise ValueError(f"unknown model {name!r}; expected {KNOWN}")


def is_own_network(name: str) -> bool:
    """Return True for a registered name and for a network that was given as an object."""
    return name in NETWORKS or name.startswith(GIVEN)


def has_own_blocks(name: str) -> bool:
    """Return True for a residual network of blocks that the user has registered."""
    return name.partition("_resnet")[0] in OWN_BLOCKS


def is_buildable(name: str) -> bool:
    """Return True if `architecture` knows the name."""
    try:
        architecture(name)
    except ValueError:
        return False
    return True


def check_model_name(name: str) -> None:
    """Raise a ValueError if `name` is neither one of multifire's networks nor registered nor given as an object."""
    if not is_own_network(name):
        architecture(name)


def parse_model_name(name: str) -> tuple[str, int]:
    """Return the kind of block and the number of blocks per stage of a paper's network: `ds_resnet20` -> ("ds", 3).

    Raises:
        ValueError: the name is not ds_resnet{6n+2} or plain_resnet{6n+2}.
    """
    if not is_own_network(name):
        found = architecture(name)
        if found.kind in ("ds", "plain") and not found.imagenet:
            return found.kind, found.stages[0]
    raise ValueError(f"{name} is not supported here, expected ds_resnetD or plain_resnetD with depth D = 6n+2")
