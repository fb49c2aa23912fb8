"""Reader of events in text: CSV, or columns between blanks, with or without a line of names.

Without names the columns are told from the first lines: one holds only 0, 1 and -1 (p), one grows (t), and x comes
before y. A first line of two numbers is the sensor's width and height.
"""

import io
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from multifire.events.columns import Columns, choose_unit, find_columns, guess_columns
from multifire.events.recording import ByteStream, Closable, Packed, Packer, Recording, Stray

CHUNK = 1 << 16  # bytes; lines take several times their memory while they are read
HEAD = 1 << 14  # bytes in which the layout must show
SEPARATORS = bytes.maketrans(b",;\t", b"   ")
WORDS = re.compile(rb"\b(true|false)\b", re.IGNORECASE)
NUMBER = re.compile(rb"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|true|false", re.IGNORECASE)
BLANK, NEWLINE, MINUS, POINT, ZERO = b" \n-.0"
MAX_DIGITS = 16  # digits, sign and point of a number that int64 and float64 hold exactly
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Layout(NamedTuple):
    skipped: int
    """Bytes before the first event."""
    columns: tuple[int, int, int, int]
    """Numbers of the columns t, x, y and p."""
    fields: int
    """Number of columns."""
    unit: int
    """µs of the unit of time."""
    size: tuple[int, int] | None
    """(H, W) of the sensor if the first line states it."""


def looks_like_text(head: bytes) -> bool:
    """Return True if a file that begins with `head` holds text with a line of numbers or of names of columns."""
    head = head.removeprefix(BYTE_ORDER_MARK)
    if any(byte < 32 and byte not in b"\t\n\r" for byte in head):
        return False
    line = next((line for line in head.splitlines() if _fields(line) and not _comment(line)), b"")
    return bool(_are_numbers(_fields(line)) or _names(line) or any(map(_names, head.splitlines()[:20])))


def open_text(stream: ByteStream, given: tuple[int, int] | None, stray: Stray, own: Closable | None) -> Recording:
    """Open a recording in text.

    Raises:
        ValueError: its columns cannot be told.
    """
    layout = _layout(stream)
    stream.skip(layout.skipped)
    size = layout.size or given
    packer = Packer(stream.name, size, stray)
    return Recording(stream.name, "text", size, _read(stream, layout, Columns(packer, layout.unit)), own, packer=packer)


def _layout(stream: ByteStream) -> Layout:
    head = stream.peek(HEAD)
    lines = head.split(b"\n")
    if len(head) == HEAD:
        lines.pop()  # it may be cut
    skipped, names, size = 0, None, None
    for number, line in enumerate(lines):
        plain = line.removeprefix(BYTE_ORDER_MARK)
        fields = _fields(plain)
        if found := _names(plain):
            names = found
        elif fields and not _comment(plain):
            if not _are_numbers(fields):
                raise _unknown(stream, f"line {number + 1} is {_shown(plain)}")
            if len(fields) != 2 or size or names:
                rows = [row for row in map(_fields, lines[number:]) if len(row) == len(fields)]
                return _of_rows(stream, skipped, names, rows, size)
            size = _size(stream, fields)
        skipped += len(line) + 1
    raise _unknown(stream, f"its first {len(head):,} bytes hold no event")


def _of_rows(
    stream: ByteStream, skipped: int, names: list[str] | None, rows: list[list[bytes]], size: tuple[int, int] | None
) -> Layout:
    table = _numbers(stream, rows)
    time_name = ""
    if names:
        found = find_columns(names)
        assert found
        if len(names) != table.shape[1]:
            raise _unknown(stream, f"it names {len(names)} columns and has {table.shape[1]}")
        t, x, y, p = (names.index(found[key]) for key in "txyp")
        time_name = found["t"]
        size = size or _size_of_names(found)
    else:
        t, x, y, p = guess_columns(table, stream.name)
    whole = all(row[t].lstrip(b"+-").isdigit() for row in rows if _are_numbers(row))
    unit = choose_unit(stream.name, time_name, table[:, t].astype(np.int64) if whole else table[:, t])
    return Layout(skipped, (t, x, y, p), table.shape[1], unit, size)


def _read(stream: ByteStream, layout: Layout, columns: Columns) -> Iterator[Packed]:
    rest = b""
    while data := stream.read(CHUNK):
        whole, newline, rest = (rest + data).rpartition(b"\n")
        if len(rest) > CHUNK:
            raise ValueError(f"{stream.name}: a line has more than {CHUNK:,} bytes, expected an event; not a recording")
        if newline:
            yield _events(stream, whole, layout, columns)
    fields = _fields(rest)
    if fields and len(fields) < layout.fields:
        stream.warn_cut("in the middle of its last line")
    elif fields:
        yield _events(stream, rest, layout, columns)


def _events(stream: ByteStream, data: bytes, layout: Layout, columns: Columns) -> Packed:
    if b"e" in data or b"E" in data:
        data = WORDS.sub(lambda word: b"1" if word[0].lower() == b"true" else b"0", data)
    if b"#" in data or b"%" in data:
        data = b"\n".join(line for line in data.split(b"\n") if not _comment(line))
    rows = data.translate(SEPARATORS).strip()
    if not rows:
        return columns.pack(*(np.zeros(0) for _ in "txyp"))
    plain = _plain_columns(rows, layout.fields)
    if plain is None:
        plain = _columns(rows, layout.fields, stream.name)
    return columns.pack(*(plain[column] for column in layout.columns))


def _plain_columns(rows: bytes, fields: int) -> list[np.ndarray] | None:
    """Return the columns of plain numbers, each behind the other and one blank; None for other text.

    It takes a fifth of the time of `_columns`, with the same numbers.
    """
    if b"\r" in rows:
        rows = rows.replace(b"\r\n", b"\n")
    text = np.frombuffer(rows + b"\n", np.uint8)
    ends = np.flatnonzero((text == BLANK) | (text == NEWLINE))
    if len(ends) % fields:
        return None
    is_newline = (text[ends] == NEWLINE).reshape(-1, fields)
    if is_newline[:, :-1].any() or not is_newline[:, -1].all():
        return None
    lengths = np.diff(ends, prepend=-1) - 1
    if lengths.min() < 1 or lengths.max() > MAX_DIGITS:
        return None
    columns = [_plain_numbers(text, ends[column::fields], lengths[column::fields]) for column in range(fields)]
    return None if any(column is None for column in columns) else columns  # pyright: ignore[reportReturnType]


def _plain_numbers(text: np.ndarray, ends: np.ndarray, lengths: np.ndarray) -> np.ndarray | None:
    """Return the numbers that end before `ends`, if they have equally many decimals and no exponent."""
    negative = text[ends - lengths] == MINUS
    lengths = lengths - negative
    points = np.flatnonzero(text[ends[0] - lengths[0] : ends[0]] == POINT)
    decimals = int(lengths[0] - 1 - points[0]) if len(points) else 0
    if decimals and (not (text[ends - 1 - decimals] == POINT).all() or int(lengths.min()) < decimals + 2):
        return None
    total = np.zeros(len(ends), np.int64)
    scale = 1
    for place in range(int(lengths.max())):
        if decimals and place == decimals:
            continue
        digit = text[ends - 1 - place] - ZERO
        digit[lengths <= place] = 0
        if int(digit.max()) > 9:
            return None
        total += digit.astype(np.int64) * scale
        scale *= 10
    if int(lengths.min()) < 1:
        return None
    if negative.any():
        total[negative] *= -1
    return total / 10.0**decimals if decimals else total


def _columns(rows: bytes, fields: int, name: str) -> np.ndarray:
    """Return the columns of any numbers.

    Raises:
        ValueError: what is no number, or lines of different lengths.
    """
    try:
        table = np.loadtxt(io.BytesIO(rows), comments=None, ndmin=2, encoding="latin1")
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{name}: {error}, expected {fields} numbers; the file is damaged") from None
    if table.shape[1] != fields:
        raise ValueError(f"{name}: has lines of {table.shape[1]} numbers behind lines of {fields}; the file is damaged")
    return table.T


def _numbers(stream: ByteStream, rows: list[list[bytes]]) -> np.ndarray:
    table = [[_number(field) for field in row] for row in rows if _are_numbers(row)]
    if not table:
        raise _unknown(stream, "no line holds only numbers")
    return np.array(table, float)


def _number(field: bytes) -> float:
    word = field.lower()
    return float(word == b"true") if word in (b"true", b"false") else float(field)


def _fields(line: bytes) -> list[bytes]:
    return line.translate(SEPARATORS).split()


def _comment(line: bytes) -> bool:
    return line.lstrip().startswith((b"#", b"%"))


def _are_numbers(fields: list[bytes]) -> bool:
    return len(fields) > 1 and all(NUMBER.fullmatch(field) for field in fields)


def _size_of_names(found: dict[str, str]) -> tuple[int, int] | None:
    """Return (H, W) from names such as x@346 and y@260, which faery writes."""
    sides = [re.search(r"@(\d{1,5})$", found[key]) for key in "yx"]
    pixels = [int(side[1]) for side in sides if side]
    return (pixels[0], pixels[1]) if len(pixels) == 2 and min(pixels) > 0 else None


def _names(line: bytes) -> list[str] | None:
    """Return the names of all columns if the line, perhaps a comment, names t, x, y and p."""
    text = line.removeprefix(BYTE_ORDER_MARK).decode("utf-8", "replace").strip().lstrip("#%").strip()
    separator = next((sign for sign in ",;\t" if sign in text), None)
    names = [name.strip() for name in (text.split(separator) if separator else re.split(r"\s+(?![\[(])", text))]
    return names if find_columns(names) else None


def _size(stream: ByteStream, fields: list[bytes]) -> tuple[int, int]:
    if not all(field.isdigit() and 0 < int(field) <= 1 << 15 for field in fields):
        raise _unknown(stream, f"its first line is {b' '.join(fields)[:80].decode('latin1')!r}")
    return int(fields[1]), int(fields[0])


def _unknown(stream: ByteStream, found: str) -> ValueError:
    return ValueError(
        f"{stream.name}: {found}, expected lines of t, x, y and p, which a first line may name; not a recording"
    )


def _shown(line: bytes) -> str:
    return repr(line[:60].decode("latin1").strip())
