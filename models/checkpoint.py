"""What all readers of a checkpoint share: the error type, and JSON files whose fields are checked."""

import json
import os
import reprlib
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LARGEST_JSON_BYTES = 200_000_000  # tokenizers of a quarter million tokens take 35 MB
LONGEST_SHOWN_VALUE = 80  # characters
MOST_DIGITS = 1000  # of an integer; far beyond that Python refuses to convert
LARGEST_FLOAT = sys.float_info.max


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the field or tensor."""


@dataclass(frozen=True)
class JsonFields:
    """The fields of one JSON object, read with checks.

    A reader without a default demands the field; with one, an absent or null field means the default, as in
    Hugging Face's own configuration classes. All readers raise CheckpointError.
    """

    path: Path
    values: Mapping[str, Any]
    prefix: str = ""  # "rope_scaling." for the fields of a nested object

    def integer(self, name: str, default: int | None = None, *, maximum: int) -> int:
        """From 1 to `maximum`."""
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= maximum:
            raise self.error(name, f"must be an integer from 1 to {maximum}")
        return value

    def positive_number(self, name: str, default: float | None = None) -> float:
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST_FLOAT:
            raise self.error(name, "must be a finite number greater than 0")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, "must be true or false")
        return value

    def choice(self, name: str, supported: tuple[str, ...], default: str) -> str:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, str) or value not in supported:
            raise self.error(name, f"must be one of {', '.join(supported)}")
        return value

    def nested(self, name: str) -> "JsonFields | None":
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, "must be an object")
        return JsonFields(self.path, value, prefix=f"{self.prefix}{name}.")

    def error(self, name: str, requirement: str) -> CheckpointError:
        found = shown(self.values[name]) if name in self.values else "nothing"
        return CheckpointError(f"{self.path}: {self.prefix}{name} {requirement}, found {found}")


def shown(value: object) -> str:
    """`value` as it may stand in a message: on one line, and shortened if it is long."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = LONGEST_SHOWN_VALUE
    text = shortener.repr(value)
    return text if len(text) <= LONGEST_SHOWN_VALUE else text[: LONGEST_SHOWN_VALUE - 3] + "..."


@contextmanager
def open_regular_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, never a pipe or a device, which could block or have no end.

    Raises CheckpointError when it cannot be opened, and for errors of reading inside the block.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        with path.open("rb") as file:
            yield file
    except (FileNotFoundError, NotADirectoryError):
        directory_is_there = path.parent.is_dir()
        message = f"{path}: no such file" if directory_is_there else f"{path.parent}: no such directory"
        raise CheckpointError(message) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def parse_json(content: bytes, *, unique_keys: bool = False) -> Any:
    """Raises ValueError, whose message is a reason of a few words; also for repeated keys if asked."""
    try:
        text = content.decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=_unique if unique_keys else None, parse_int=_integer)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        reason = error.msg.removesuffix(" at")
        raise ValueError(f"not JSON at line {error.lineno}, column {error.colno}: {reason}") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a JSON object names a field twice")
    return values


def read_json(path: Path) -> JsonFields:
    """Read a JSON object. Raises CheckpointError when `path` is missing or holds something else."""
    with open_regular_file(path) as file:
        content = file.read(LARGEST_JSON_BYTES + 1)
    if not content:
        raise CheckpointError(f"{path}: the file is empty")
    if len(content) > LARGEST_JSON_BYTES:
        raise CheckpointError(f"{path}: longer than {LARGEST_JSON_BYTES} bytes")
    try:
        values = parse_json(content)
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, found {type(values).__name__}")
    return JsonFields(path, values)


def weight_files(directory: Path) -> dict[Path, list[str]]:
    """The safetensors files of a checkpoint: the single file if there is one, else the shards of its index.

    With each shard come the tensors that the index places in it; the single file has no such list. Raises
    CheckpointError when there is neither, or when a shard is missing.
    """
    directory = Path(directory)
    # Links that lead nowhere count as there, so that opening them says what is wrong.
    if os.path.lexists(directory / SINGLE_FILE):
        return {directory / SINGLE_FILE: []}
    if not os.path.lexists(directory / INDEX_FILE):
        raise CheckpointError(f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE} is there")
    index = read_json(directory / INDEX_FILE)
    weight_map = index.values.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise index.error("weight_map", "must be an object of tensor names and file names")
    names_by_path: dict[Path, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.isprintable() or Path(shard).name != shard or not shard:
            raise CheckpointError(
                f"{index.path}: weight_map names {shown(shard)}, which is not a plain file name"
            )
        names_by_path.setdefault(directory / shard, []).append(name)
    for path in names_by_path:
        if not os.path.lexists(path):
            raise CheckpointError(f"{path}: no such file, though {INDEX_FILE} names it")
    return dict(sorted(names_by_path.items()))
