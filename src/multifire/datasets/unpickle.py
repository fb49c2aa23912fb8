"""Read a pickle of plain data without running any of it: arrays, bytes, str, numbers, lists, tuples and dicts.

Python's own unpickler imports and calls what a pickle names. This one knows the names that NumPy and Python write for
arrays and bytes, and rebuilds those by hand; any other name, and any other way to call, is refused before anything
happens. Protocols 0 to 5. What it allocates is bounded by a multiple of the pickle's size.

Source of the opcodes: Python's pickletools.py.
"""

import re
import struct
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

MAX_OPCODES = 2_000_000
"""CIFAR-100's training file, the largest that people have, needs about 260,000."""
MAX_DIMENSIONS = 8
MARK = object()
KINDS = frozenset(f"{kind}{size}" for kind, sizes in {"u": (1, 2, 4, 8), "i": (1, 2, 4, 8), "f": (4, 8)}.items()
                  for size in sizes) | {"b1"}  # fmt: skip
NAMES = {
    **{
        f"numpy.{core}.{part}": what
        for core in ("core", "_core")
        for part, what in {"multiarray._reconstruct": "reconstruct", "numeric._frombuffer": "frombuffer"}.items()
    },
    "numpy.ndarray": "ndarray",
    "numpy.dtype": "dtype",
    "_codecs.encode": "encode",
    "__builtin__.bytes": "bytes",
    "builtins.bytes": "bytes",
}
TYPE_STATE = (3, None, None, None, -1, -1, 0)
"""What NumPy writes of a type of plain numbers, beside the byte order."""
CALLS = {
    "P": "PERSID", "Q": "BINPERSID", "i": "INST", "o": "OBJ", "\x81": "NEWOBJ", "\x92": "NEWOBJ_EX", "\x82": "EXT1",
    "\x83": "EXT2", "\x84": "EXT4", "\x97": "NEXT_BUFFER", "\x98": "READONLY_BUFFER", "\x8f": "EMPTY_SET",
    "\x90": "ADDITEMS", "\x91": "FROZENSET",
}  # fmt: skip
"""Opcodes that call, import or build something else."""


class _Name:
    """A known name; it stands for nothing but itself."""

    def __init__(self, what: str):
        self.what = what


class _Type:
    """The type of an array's elements, until its byte order is known."""

    def __init__(self, kind: str):
        self.kind, self.order = kind, ""

    def numpy(self) -> np.dtype:
        return np.dtype(self.kind).newbyteorder("=" if self.order in ("", "|") else self.order)  # pyright: ignore[reportArgumentType]


class _Unfilled:
    """An array whose shape and bytes follow."""

    def __init__(self):
        self.remembered: list[int] = []  # its places in the memo


class _Refused(ValueError):
    """The pickle names something else than data."""


def read_pickle(data: bytes, where: str) -> Any:
    """Return the content of a pickle; its arrays are read-only views of its bytes.

    Args:
        data: the pickle.
        where: its name in messages.

    Raises:
        ValueError: damaged, or it names anything but arrays and plain values; the message says what.
    """
    reader = _Reader(data, where)
    try:
        value = reader.run()
    except _Refused:
        raise
    except (ValueError, IndexError, KeyError, struct.error) as error:
        raise reader.damaged(str(error)) from None
    reader.check_plain(value)
    return value


class _Reader:
    """The machine that pickles are programs for: a stack, a memo, and a position in the bytes."""

    def __init__(self, data: bytes, where: str):
        self._data, self._where, self._at = data, where, 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._built = 0  # bytes made of text, at most as many as the pickle has

    def run(self) -> Any:
        for _ in range(MAX_OPCODES):
            code = self._take(1)
            if code == b".":
                if len(self._stack) != 1:
                    raise ValueError(f"{len(self._stack)} values at its end, expected one")
                return self._pop()
            action = ACTIONS.get(code)
            if action is None:
                raise self._refused(CALLS.get(code.decode("latin1"), f"byte 0x{code.hex()}"))
            action(self)
        raise ValueError(f"more than {MAX_OPCODES:,} operations")

    def damaged(self, reason: str) -> ValueError:
        reason = " ".join(reason.split())[:200]
        return ValueError(f"{self._where}: damaged, or no pickle, at byte {self._at:,}: {reason}; fetch it again")

    def _refused(self, what: str) -> _Refused:
        return _Refused(
            f"{self._where}: holds {what[:80]!r}, which may run code, expected arrays, bytes, lists and dicts only; "
            "nothing was run: do not use this file, fetch the data from its authors"
        )

    def check_plain(self, value: Any) -> None:
        """Refuse names and unfinished arrays within the value."""
        pending, seen = [value], set()
        while pending:
            item = pending.pop()
            if isinstance(item, (_Name, _Type, _Unfilled)):
                raise self._refused("a name or an unfinished array")
            if isinstance(item, (list, tuple, dict)) and id(item) not in seen:
                seen.add(id(item))
                pending += item.values() if isinstance(item, dict) else item

    def _take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise ValueError(f"cut short: {count:,} bytes expected, {len(self._data) - self._at:,} left")
        self._at += count
        return self._data[self._at - count : self._at]

    def _line(self) -> bytes:
        end = self._data.find(b"\n", self._at)
        if end < 0:
            raise ValueError("cut short within a line")
        return self._take(end + 1 - self._at)[:-1]

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is MARK:
            raise ValueError("a mark where a value was expected")
        return value

    def _top(self, kind: type) -> Any:
        value = self._stack[-1]
        if type(value) is not kind:
            raise ValueError(f"{type(value).__name__} where a {kind.__name__} was expected")
        return value

    def _to_mark(self) -> list[Any]:
        """Pop the values above the last mark, and the mark."""
        values = []
        while (value := self._stack.pop()) is not MARK:
            values.append(value)
        return values[::-1]

    # Values of one opcode each.

    def _int_line(self) -> None:
        text = self._line()
        self._push(text == b"01" if text in (b"00", b"01") else _integer(text))

    def _long_line(self) -> None:
        self._push(_integer(self._line().removesuffix(b"L")))

    def _long(self, form: str) -> None:
        count = self._number(form)
        if not 0 <= count <= 9:
            raise ValueError(f"a number of {count:,} bytes, expected at most 9")
        self._push(int.from_bytes(self._take(count), "little", signed=True))

    def _float_line(self) -> None:
        text = self._line()
        if len(text) > 40:
            raise ValueError("a number of more than 40 characters")
        self._push(float(text))

    def _quoted(self) -> None:
        text = self._line().strip()
        if len(text) < 2 or text[:1] not in b"'\"" or text[:1] != text[-1:]:
            raise ValueError("a text without quotes")
        self._push(re.sub(rb"\\(x..|.)?", _unescaped, text[1:-1], flags=re.DOTALL))

    def _bytes(self, form: str) -> None:
        count = self._number(form)
        if count < 0:
            raise ValueError(f"{count} bytes")
        self._push(self._take(count))

    def _text(self, form: str) -> None:
        self._push(self._take(self._number(form)).decode("utf-8", "surrogatepass"))

    # Containers.

    def _tuple(self, count: int) -> None:
        items = [self._pop() for _ in range(count)][::-1]
        self._push(tuple(items))

    def _extend(self, items: list[Any]) -> None:
        self._top(list).extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._top(dict)
        self._update(target, items)

    def _new_dict(self) -> None:
        values = self._to_mark()
        target: dict[Any, Any] = {}
        self._update(target, values)
        self._push(target)

    def _update(self, target: dict[Any, Any], items: list[Any]) -> None:
        if len(items) % 2:
            raise ValueError("a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, bytes, int, bool):  # the hash of nested tuples may take for ever
                raise ValueError(f"a {type(key).__name__} as a key, expected a text or a number")
            target[key] = value

    def _pair(self) -> list[Any]:
        value, key = self._pop(), self._pop()
        return [key, value]

    # The memo.

    def _put(self, index: int) -> None:
        if self._stack[-1] is MARK or index < 0:
            raise ValueError("nothing to remember")
        self._memo[index] = value = self._stack[-1]
        if type(value) is _Unfilled:
            value.remembered.append(index)

    def _frame(self) -> None:
        if self._number("<Q") > len(self._data) - self._at:
            raise ValueError("cut short within a frame")

    def _protocol(self) -> None:
        if (version := self._take(1)[0]) > 5:
            raise ValueError(f"protocol {version}, expected 0 to 5")

    # Arrays and bytes, as NumPy and Python pickle them.

    def _global(self) -> None:
        module, name = self._line(), self._line()
        self._name(module.decode("latin1"), name.decode("latin1"))

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("a name that is no text")
        self._name(module, name)

    def _name(self, module: str, name: str) -> None:
        what = NAMES.get(f"{module}.{name}")
        if what is None or "." in name:
            raise self._refused(f"{module}.{name}")
        self._push(_Name(what))

    def _reduce(self) -> None:
        arguments, called = self._pop(), self._pop()
        if type(called) is not _Name or type(arguments) is not tuple:
            raise self._refused("REDUCE of no name")
        build = {"encode": self._encoded, "bytes": self._no_bytes, "dtype": _element_type,
                 "reconstruct": _unfilled, "frombuffer": self._from_buffer}.get(called.what)  # fmt: skip
        value = build(*arguments) if build and len(arguments) <= 4 else None
        if value is None:
            raise self._refused(f"REDUCE of {called.what} with other arguments than NumPy's")
        self._push(value)

    def _no_bytes(self, *arguments: Any) -> bytes | None:
        return None if arguments else b""

    def _encoded(self, *arguments: Any) -> bytes | None:
        if [type(item) for item in arguments] != [str, str] or arguments[1] != "latin1":
            return None
        self._built += len(arguments[0])
        if self._built > len(self._data):
            raise ValueError("one text is used for more bytes than the pickle has")
        return arguments[0].encode("latin1")

    def _from_buffer(self, *arguments: Any) -> np.ndarray | None:
        if len(arguments) != 4 or type(arguments[3]) is not str or arguments[3] not in ("C", "F"):
            return None
        raw, kind, shape, order = arguments
        return _array(shape, kind, order, raw)

    def _build(self) -> None:
        state, target = self._pop(), self._stack[-1]
        if type(target) is _Type and type(state) is tuple and len(state) == 8:
            order = _as_text(state[1])
            if type(order) is str and order in ("<", ">", "=", "|") and _same(state[:1] + state[2:], TYPE_STATE):
                target.order = order
                return
        if type(target) is _Unfilled and type(state) is tuple and len(state) == 5 and _same(state[:1], (1,)):
            _, shape, kind, fortran, raw = state
            array = _array(shape, kind, "F" if type(fortran) in (bool, int) and fortran else "C", raw)
            if array is not None:
                self._stack[-1] = array
                for index in target.remembered:
                    if self._memo[index] is target:
                        self._memo[index] = array
                return
        raise self._refused("BUILD of something else than an array of numbers")


def _same(found: tuple[Any, ...], expected: tuple[Any, ...]) -> bool:
    """Compare plain values without the methods of arrays."""
    return list(map(type, found)) == list(map(type, expected)) and found == expected


def _unescaped(found: re.Match[bytes]) -> bytes:
    """Return the byte of an escape that Python 2's repr() writes."""
    escape = found[1] or b""
    if escape[:1] == b"x" and len(escape) == 3:
        return bytes((int(escape[1:], 16),))
    try:
        return {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"\\": b"\\", b"'": b"'", b'"': b'"'}[escape]
    except KeyError:
        raise ValueError(f"the escape {escape!r} in a text") from None


def _integer(text: bytes) -> int:
    if len(text) > 20:
        raise ValueError("a number of more than 20 digits")
    return int(text)


def _as_text(value: Any) -> Any:
    return value.decode("latin1") if type(value) is bytes else value  # a text that Python 2 wrote


def _element_type(*arguments: Any) -> _Type | None:
    """Return the type that numpy.dtype(name, align=False, copy=True) makes."""
    if not 1 <= len(arguments) <= 3 or any(type(flag) not in (bool, int) for flag in arguments[1:]):
        return None
    kind = _as_text(arguments[0])
    return _Type(kind) if type(kind) is str and kind in KINDS else None


def _unfilled(*arguments: Any) -> _Unfilled | None:
    """Return what numpy.core.multiarray._reconstruct(numpy.ndarray, (0,), b"b") makes."""
    if len(arguments) != 3 or type(arguments[0]) is not _Name or arguments[0].what != "ndarray":
        return None
    shape, kind = arguments[1], _as_text(arguments[2])
    plain = type(shape) is tuple and _same(shape, (0,)) and _same((kind,), ("b",))
    return _Unfilled() if plain else None


def _array(shape: Any, kind: Any, order: str, raw: Any) -> np.ndarray | None:
    """Return a view of `raw`, or None if it is not exactly as long as shape and type say."""
    if type(kind) is not _Type or type(raw) is not bytes or type(shape) is not tuple or len(shape) > MAX_DIMENSIONS:
        return None
    if not all(type(n) is int and 0 <= n < 1 << 31 for n in shape):
        return None
    element = kind.numpy()
    if prod(shape) * element.itemsize != len(raw):
        return None
    return np.frombuffer(raw, element).reshape(shape, order=order)  # pyright: ignore[reportCallIssue, reportArgumentType]


_R = _Reader
ACTIONS: dict[bytes, Callable[[_Reader], Any]] = {
    b"\x80": _R._protocol,
    b"\x95": _R._frame,
    b"(": lambda r: r._push(MARK),
    b"0": lambda r: r._stack.pop(),
    b"1": lambda r: r._to_mark(),
    b"2": lambda r: (r._push(r._pop()), r._push(r._stack[-1])),
    b"N": lambda r: r._push(None),
    b"\x88": lambda r: r._push(True),
    b"\x89": lambda r: r._push(False),
    b"I": _R._int_line,
    b"L": _R._long_line,
    b"F": _R._float_line,
    b"K": lambda r: r._push(r._number("<B")),
    b"M": lambda r: r._push(r._number("<H")),
    b"J": lambda r: r._push(r._number("<i")),
    b"G": lambda r: r._push(r._number(">d")),
    b"\x8a": lambda r: r._long("<B"),
    b"\x8b": lambda r: r._long("<i"),
    b"S": _R._quoted,
    b"T": lambda r: r._bytes("<i"),
    b"U": lambda r: r._bytes("<B"),
    b"B": lambda r: r._bytes("<I"),
    b"C": lambda r: r._bytes("<B"),
    b"\x8e": lambda r: r._bytes("<Q"),
    b"\x96": lambda r: r._bytes("<Q"),
    b"V": lambda r: r._push(r._line().decode("raw_unicode_escape")),
    b"X": lambda r: r._text("<I"),
    b"\x8c": lambda r: r._text("<B"),
    b"\x8d": lambda r: r._text("<Q"),
    b")": lambda r: r._push(()),
    b"]": lambda r: r._push([]),
    b"}": lambda r: r._push({}),
    b"t": lambda r: r._push(tuple(r._to_mark())),
    b"l": lambda r: r._push(r._to_mark()),
    b"d": _R._new_dict,
    b"\x85": lambda r: r._tuple(1),
    b"\x86": lambda r: r._tuple(2),
    b"\x87": lambda r: r._tuple(3),
    b"a": lambda r: r._extend([r._pop()]),
    b"e": lambda r: r._extend(r._to_mark()),
    b"s": lambda r: r._set_items(r._pair()),
    b"u": lambda r: r._set_items(r._to_mark()),
    b"p": lambda r: r._put(_integer(r._line())),
    b"q": lambda r: r._put(r._number("<B")),
    b"r": lambda r: r._put(r._number("<I")),
    b"\x94": lambda r: r._put(len(r._memo)),
    b"g": lambda r: r._push(r._memo[_integer(r._line())]),
    b"h": lambda r: r._push(r._memo[r._number("<B")]),
    b"j": lambda r: r._push(r._memo[r._number("<I")]),
    b"c": _R._global,
    b"\x93": _R._stack_global,
    b"R": _R._reduce,
    b"b": _R._build,
}  # fmt: skip
"""What each opcode does; an opcode that is absent is refused."""
