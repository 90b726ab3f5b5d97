"""What does a GGUF file say about its model before any of its weights is read?

The format is that of ggml (docs/gguf.md there): a header with settings, then a list of the weights, then their data.
Reading it here takes a tenth of a second, where the package gguf takes 1.7 s, because it keeps every token.
"""

import os
import struct
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple

from detoxrl.errors import InputError, first_line, require

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# How struct calls the types of a setting, by their number in the file.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING = 8
_ARRAY = 9
# Bytes to which the data of the weights is aligned, unless the header names another number.
_ALIGNMENT = 32

Setting = str | int | float | bool


class GgufWeight(NamedTuple):
    """A weight as the file describes it: number of values, number of its type in ggml, and where its data begins."""

    values: int
    type: int
    offset: int


class GgufHeader(NamedTuple):
    """The settings of a GGUF file, in which a list stands as its length, and its weights by name."""

    settings: dict[str, Setting]
    weights: dict[str, GgufWeight]
    # Where the data of the weights begins, in bytes from the start of the file.
    data_start: int

    @property
    def architecture(self) -> str:
        return str(self.settings.get("general.architecture", ""))

    @property
    def float32_bytes(self) -> int:
        """How much the weights take in full precision."""
        return 4 * sum(weight.values for weight in self.weights.values())


class _TooShort(Exception):
    """The file ends before its header does."""


def read_header(path: Path, field: str, source: str) -> GgufHeader:
    """Return the header of a file. Raises InputError, naming `field` and its value `source`, when it is not GGUF."""
    try:
        with path.open("rb") as file:
            is_gguf = file.read(len(_MAGIC)) == _MAGIC
            require(is_gguf, field, source, "is not a GGUF file", "give a .gguf, or a folder with .bin weights")
            return _Reader(file, field, source).header()
    except _TooShort:
        raise InputError(field, source, "is truncated: it ends within its header", "download it again") from None
    except OSError as error:
        raise InputError(field, source, f"cannot be read: {first_line(error)}", "give a readable file") from error


def require_all_data(header: GgufHeader, path: Path, field: str, source: str) -> None:
    """Raise InputError when a file is shorter than its header says. Needs the package gguf."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    # Number of values and of bytes in a block, by the number of the type.
    blocks = {GGMLQuantizationType(kind).value: sizes for kind, sizes in GGML_QUANT_SIZES.items()}

    end = 0
    for name, weight in header.weights.items():
        rule = f"holds {name} in a type ({weight.type}) that the package gguf does not know"
        require(weight.type in blocks, field, source, rule, "pip install --upgrade gguf")
        block_values, block_bytes = blocks[weight.type]
        end = max(end, header.data_start + weight.offset + weight.values // block_values * block_bytes)

    size = path.stat().st_size
    rule = f"is truncated: it has {size:,} bytes, but its header describes {end:,}"
    require(size >= end, field, source, rule, "download it again")


class _Reader:
    """Reads the header of an open file that stands behind the magic bytes."""

    def __init__(self, file: BinaryIO, field: str, source: str) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._field = field
        self._source = source

    def header(self) -> GgufHeader:
        version = self._number("I")
        versions = " or ".join(map(str, _VERSIONS))
        rule = f"has version {version} of GGUF, but only {versions} can be read"
        require(version in _VERSIONS, self._field, self._source, rule, "convert it with a current llama.cpp")
        weight_count = self._number("Q")
        setting_count = self._number("Q")

        settings = {}
        for _ in range(int(setting_count)):
            key = self._text()
            settings[key] = self._setting(int(self._number("I")))

        weights = {}
        for _ in range(int(weight_count)):
            name = self._text()
            weights[name] = self._weight()

        alignment = int(settings.get("general.alignment", _ALIGNMENT)) or _ALIGNMENT
        data_start = -(-self._file.tell() // alignment) * alignment
        return GgufHeader(settings, weights, data_start)

    def _setting(self, kind: int) -> Setting:
        """Return the value of a setting, or the length of a list of values, which is skipped."""
        if kind != _ARRAY:
            return self._value(kind)

        item_kind = int(self._number("I"))
        length = int(self._number("Q"))
        if item_kind == _STRING:
            for _ in range(length):
                self._skip(int(self._number("Q")))
        else:
            self._skip(length * struct.calcsize(self._format(item_kind)))
        return length

    def _weight(self) -> GgufWeight:
        dimensions = int(self._number("I"))
        shape = [int(self._number("Q")) for _ in range(dimensions)]
        kind = int(self._number("I"))
        offset = int(self._number("Q"))
        return GgufWeight(prod(shape), kind, offset)

    def _value(self, kind: int) -> Setting:
        return self._text() if kind == _STRING else self._number(self._format(kind))

    def _format(self, kind: int) -> str:
        rule = f"has a malformed header: a setting of the unknown type {kind}"
        require(kind in _NUMBERS, self._field, self._source, rule, "download it again")
        return _NUMBERS[kind]

    def _text(self) -> str:
        return self._bytes(int(self._number("Q"))).decode("utf-8", errors="replace")

    def _number(self, kind: str) -> int | float | bool:
        number: int | float | bool = struct.unpack(f"<{kind}", self._bytes(struct.calcsize(kind)))[0]
        return number

    def _bytes(self, length: int) -> bytes:
        self._require_left(length)
        return self._file.read(length)

    def _skip(self, length: int) -> None:
        self._require_left(length)
        self._file.seek(length, os.SEEK_CUR)

    def _require_left(self, length: int) -> None:
        if length > self._size - self._file.tell():
            raise _TooShort
