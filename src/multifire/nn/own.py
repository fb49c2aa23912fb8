"""Networks of one's own: registered by name, or given as an object.

Shapes: T time steps, N samples, C channels, H height, W width, L classes.
"""

from collections.abc import Callable

from torch import Tensor, nn

from multifire.config import ModelConfig
from multifire.config.architecture import NETWORKS, is_buildable

Builder = Callable[[ModelConfig], nn.Module]


def register_network(name: str) -> Callable[[Builder], Builder]:
    """Register a network by name, so that recipes and `--model.name` can use it.

        @mf.register_network("my-net")
        def my_net(model: ModelConfig) -> nn.Module:    # [T, N, C, H, W] -> logits of each time step [T, N, L]
            ...

    Args:
        name: the name; another registered network or one of multifire's must not have it.

    Raises:
        ValueError: the name exists.
    """

    def register(builder: Builder) -> Builder:
        if name in NETWORKS or is_buildable(name):
            raise ValueError(f"the network {name!r} exists already; choose another name")
        NETWORKS[name] = builder
        return builder

    return register


class OwnNetwork(nn.Module):
    """Gives any module the interface of multifire's networks, and checks the shape of its logits.

    Args:
        network: [T, N, C, H, W] -> logits of each time step [T, N, L].
        num_classes: L.
        name: name of the network in messages.
    """

    def __init__(self, network: nn.Module, num_classes: int, name: str):
        super().__init__()
        self.network = network
        self.num_classes, self.name = num_classes, name

    def forward(self, x_TNCHW: Tensor, *, per_step: bool = False) -> Tensor:
        """Return logits [N, L], averaged over time; with `per_step`, of each time step [T, N, L].

        Raises:
            ValueError: the network returned something else.
        """
        logits_TNL = self.network(x_TNCHW)
        expected = (*x_TNCHW.shape[:2], self.num_classes)
        found = tuple(logits_TNL.shape) if isinstance(logits_TNL, Tensor) else type(logits_TNL).__name__
        if found != expected:
            raise ValueError(
                f"the network {self.name!r} returned {found} for an input of shape {tuple(x_TNCHW.shape)}, expected "
                f"logits of each time step [T, N, classes] = {expected}; is model.num_classes right?"
            )
        return logits_TNL if per_step else logits_TNL.mean(0)
