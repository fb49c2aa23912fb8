"""Parse the name of a network: kind of block and depth."""


def parse_model_name(name: str) -> tuple[str, int]:
    """Return the kind of block and the number of blocks per stage: `ds_resnet20` -> ("ds", 3).

    Raises:
        ValueError: the name is not ds_resnet{6n+2} or plain_resnet{6n+2}.
    """
    kind, separator, depth = name.partition("_resnet")
    if kind in ("ds", "plain") and separator and depth.isascii() and depth.isdigit():
        blocks, rest = divmod(int(depth) - 2, 6)
        if rest == 0 and blocks >= 1:
            return kind, blocks
    raise ValueError(
        f"unknown model {name!r}; expected ds_resnetD or plain_resnetD with depth D = 6n+2: 8, 14, 20, 32, 44, 68, ..."
    )
