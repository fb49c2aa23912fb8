"""What a run would take: its network, memory and time, from a few real steps on random images."""

from dataclasses import dataclass
from statistics import median

from multifire import datasets
from multifire.bench import Network, alternate, peak_in_own_process
from multifire.config import RunConfig
from multifire.nn import kept_for_backward
from multifire.runtime import autocast, pick_device

STEPS = 3


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes, times in seconds."""

    parameters: int
    steps_per_epoch: int
    step_seconds: float
    epoch_seconds: float
    run_seconds: float
    kept_bytes: int
    """What autograd holds between forward and backward."""
    peak_bytes: int | None
    """Of a training step, over the interpreter's."""
    checkpoint_bytes: int


def plan(cfg: RunConfig) -> Plan:
    """Build the network, train it a few steps on random images of the recipe's shape, and reckon the rest from that."""
    device = pick_device(cfg.device)
    network = Network(cfg, device)
    seconds = alternate({"network": network.step}, STEPS, device)["network"]
    with autocast(device, cfg.precision):
        kept = kept_for_backward(network.model.train(), network.x_TNCHW)
    samples = datasets.get_info(cfg.data.name).published_sizes[0]
    samples = min(int(samples * (1 - cfg.data.validation)), cfg.data.limit or samples)
    steps, step = -(-samples // cfg.optim.batch_size), median(seconds)
    parameters = sum(p.nbytes for p in network.model.parameters())
    weights = sum(tensor.nbytes for tensor in network.model.state_dict().values())
    copies = 2 if cfg.optim.ema_decay is not None else 1
    return Plan(
        parameters=sum(p.numel() for p in network.model.parameters()),
        steps_per_epoch=steps,
        step_seconds=step,
        epoch_seconds=steps * step,
        run_seconds=cfg.optim.epochs * steps * step,
        kept_bytes=kept.bytes,
        peak_bytes=peak_in_own_process(cfg),
        checkpoint_bytes=parameters + copies * weights,
    )
