"""The header of a safetensors file, checked completely before memory is spent on what it promises.

The format (https://huggingface.co/docs/safetensors): 8 bytes hold the header's length, little-endian; the
header is a JSON object that gives dtype, shape and byte range of each tensor; their bytes follow, without
overlaps, holes or a rest. No torch.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from pdengine.models.checkpoint import CheckpointError, parse_json, shown

BYTES_BY_DTYPE = {"F32": 4, "BF16": 2, "F16": 2}  # of the dtypes that we read, in the names of the format
LENGTH_BYTES = 8
LARGEST_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
LONGEST_TENSOR_NAME = 1024
LARGEST_RANK = 8
LARGEST_COUNT = 2**63 - 1


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file. start, end: bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


def read_header(file: BinaryIO, path: Path) -> tuple[bytes, dict[str, TensorEntry]]:
    """The header as it is stored, and its tensors in the order of their bytes.

    `path` is for messages. Raises CheckpointError for whatever breaks the format; the size of a tensor is
    compared with its shape where the dtype is one of BYTES_BY_DTYPE.
    """
    file_size = os.fstat(file.fileno()).st_size
    try:
        header = _read_json_part(file, file_size)
        entries = _entries(parse_json(header, unique_keys=True), LENGTH_BYTES + len(header))
        _check_byte_ranges(entries, LENGTH_BYTES + len(header), file_size)
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({error})") from error
    return header, entries


def _read_json_part(file: BinaryIO, file_size: int) -> bytes:
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    if file_size < LENGTH_BYTES:
        raise ValueError(f"it has {file_size} bytes, the length of its header alone takes {LENGTH_BYTES}")
    if not 1 <= length <= LARGEST_HEADER_BYTES:
        raise ValueError(
            f"the length of its header is {length} bytes, it must be 1 to {LARGEST_HEADER_BYTES}"
        )
    header = file.read(length)
    if len(header) < length:
        raise ValueError(f"it ends after {len(header)} of the {length} bytes of its header")
    return header


def _entries(header: Any, data_start: int) -> dict[str, TensorEntry]:
    if not isinstance(header, dict):
        raise ValueError(f"its header must be a JSON object, found {type(header).__name__}")
    entries = {}
    for name, fields in header.items():
        if len(name) > LONGEST_TENSOR_NAME or not name.isprintable():
            raise ValueError(
                f"tensor name {shown(name)} must have at most {LONGEST_TENSOR_NAME} printable characters"
            )
        if name != "__metadata__":
            entries[name] = _entry(name, fields, data_start)
    return dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))


def _entry(name: str, fields: Any, data_start: int) -> TensorEntry:
    if not isinstance(fields, dict):
        raise ValueError(f"tensor {name} must have an object, found {shown(fields)}")
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or len(dtype) > 16 or not dtype.isprintable():
        raise ValueError(f"tensor {name} has dtype {shown(dtype)}, which is no name of a dtype")
    if not _are_counts(shape) or len(shape) > LARGEST_RANK:
        raise ValueError(
            f"tensor {name} has shape {shown(shape)}, it must be a list of at most {LARGEST_RANK} sizes"
        )
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {name} has data_offsets {shown(offsets)}, they must be a start and an end")
    start, end = offsets
    if dtype in BYTES_BY_DTYPE and end - start != math.prod(shape) * BYTES_BY_DTYPE[dtype]:
        raise ValueError(
            f"tensor {name} has data_offsets for {end - start} bytes, but shape {shape} of {dtype} takes "
            f"{math.prod(shape) * BYTES_BY_DTYPE[dtype]}"
        )
    return TensorEntry(dtype, tuple(shape), data_start + start, data_start + end)


def _are_counts(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(v) is int and 0 <= v <= LARGEST_COUNT for v in values)


def _check_byte_ranges(entries: dict[str, TensorEntry], data_start: int, file_size: int) -> None:
    position, previous = data_start, "the header"
    for name, entry in entries.items():
        if entry.start < position:
            raise ValueError(f"tensor {name} overlaps {previous} by {position - entry.start} bytes")
        if entry.start > position:
            raise ValueError(f"a hole of {entry.start - position} bytes lies before tensor {name}")
        if entry.end > file_size:
            raise ValueError(f"tensor {name} ends at byte {entry.end}, but the file ends at {file_size}")
        position, previous = entry.end, f"tensor {name}"
    if position < file_size:
        raise ValueError(f"{file_size - position} bytes follow {previous}, the last of its tensors")
