"""Write a configuration as JSON and read it back: for a run's folder and for exported files."""

import dataclasses
import json
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from multifire.config.schema import ModelConfig, RunConfig
from multifire.utils.errors import nearest

CONFIG_VERSION = 1


def to_json(cfg: RunConfig) -> str:
    """Return the configuration as indented JSON, with the version of the format."""
    return json.dumps({"version": CONFIG_VERSION, **dataclasses.asdict(cfg)}, indent=2) + "\n"


def from_json(text: str, source: str) -> RunConfig:
    """Return the configuration that `to_json` wrote; `source` names the file in errors.

    Raises:
        ValueError: not JSON, another version, an unknown field, or a value of the wrong type.
    """
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{source}: not a config file: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{source}: not a config file: found {type(values).__name__}, expected an object")
    version = values.pop("version", None)
    if version != CONFIG_VERSION:
        raise ValueError(
            f"{source}: config version is {version}, this multifire reads version {CONFIG_VERSION}; "
            "use the multifire that wrote it, or train again"
        )
    return _build(RunConfig, values, source, prefix="")


def flatten_config(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested configuration into full names: {"optim": {"lr": 0.1}} -> {"optim.lr": 0.1}."""
    fields = {}
    for key, value in tree.items():
        fields |= flatten_config(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return fields


def convert(cfg: RunConfig, name: str, value: Any) -> Any:
    """Return a value in the type of the configuration's field with this full name, such as "optim.epochs".

    Raises:
        ValueError: it is of another type.
    """
    part, _, field = name.rpartition(".")
    owner = getattr(cfg, part) if part else cfg
    value = list(value) if isinstance(value, tuple) else value
    return _convert(get_type_hints(type(owner))[field], value, name)


def model_config(values: Any, source: str) -> ModelConfig:
    """Return the ModelConfig that a JSON object describes; `source` names the file in errors.

    Raises:
        ValueError: not an object, an unknown field, or a value of the wrong type or out of range.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{source}: not a model: found {type(values).__name__}, expected an object")
    return RunConfig(model=_build(ModelConfig, values, source, prefix="model.")).model  # RunConfig checks the values


def _build(cls: type, values: dict[str, Any], source: str, prefix: str) -> Any:
    hints = get_type_hints(cls)
    kwargs = {}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"{source}: unknown field {prefix}{key}{nearest(key, list(hints))}")
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            kwargs[key] = _build(hints[key], value, source, f"{prefix}{key}.")
        else:
            kwargs[key] = _convert(hints[key], value, f"{source}: field {prefix}{key}")
    return cls(**kwargs)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Convert `value` to the annotated type: JSON has no tuples and does not distinguish 1 from 1.0."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal and value in args:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(args[0], item, where) for item in value)
    if hint is float and type(value) in (int, float):
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise ValueError(f"{where} is {value!r}, expected {hint if origin else hint.__name__}")
