"""Deep spiking neural networks of multi-level firing (MLF) neurons, trained directly by back-propagation.

The public names are loaded when they are first used, so that `import multifire` costs no import of torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multifire import analysis, datasets, engine, events, export, nn, ops
    from multifire.config.recipes import recipe
    from multifire.datasets import register_dataset
    from multifire.experiments.train import train
    from multifire.export.int8 import load_int8
    from multifire.export.pretrained import from_pretrained, push_to_hub, save_pretrained
    from multifire.export.reference_checkpoint import load_reference_checkpoint, to_reference_state_dict
    from multifire.nn import SpikingResNet, build_model, register_block, register_network
    from multifire.ops import register_surrogate
    from multifire.report import Run
    from multifire.training.load_run import load_weights

__version__ = "0.1.0"

_SUBMODULES = ("analysis", "datasets", "engine", "events", "export", "nn", "ops")
_NAMES = {
    "Run": "multifire.report",
    "load_weights": "multifire.training.load_run",
    "recipe": "multifire.config.recipes",
    "register_block": "multifire.nn",
    "register_dataset": "multifire.datasets",
    "register_network": "multifire.nn",
    "train": "multifire.experiments.train",
    "SpikingResNet": "multifire.nn",
    "build_model": "multifire.nn",
    "from_pretrained": "multifire.export.pretrained",
    "load_int8": "multifire.export.int8",
    "load_reference_checkpoint": "multifire.export.reference_checkpoint",
    "push_to_hub": "multifire.export.pretrained",
    "register_surrogate": "multifire.ops",
    "save_pretrained": "multifire.export.pretrained",
    "to_reference_state_dict": "multifire.export.reference_checkpoint",
}

__all__ = [
    "Run",
    "SpikingResNet",
    "__version__",
    "analysis",
    "build_model",
    "datasets",
    "engine",
    "events",
    "export",
    "from_pretrained",
    "load_int8",
    "load_reference_checkpoint",
    "load_weights",
    "nn",
    "ops",
    "push_to_hub",
    "recipe",
    "register_block",
    "register_dataset",
    "register_network",
    "register_surrogate",
    "save_pretrained",
    "to_reference_state_dict",
    "train",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"multifire.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'multifire' has no attribute {name!r}")
