"""Run networks on streams of frames from recordings and cameras; exported ones natively, without torch."""

from multifire.engine.native import Engine, load

__all__ = ["Engine", "load"]
