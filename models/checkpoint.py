"""What all readers of a checkpoint share: the error type, and JSON files whose fields are checked."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


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
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
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
        found = repr(self.values[name]) if name in self.values else "nothing"
        if len(found) > 80:
            found = found[:77] + "..."
        return CheckpointError(f"{self.path}: {self.prefix}{name} {requirement}, found {found}")


def read_json(path: Path) -> JsonFields:
    """Read a JSON object. Raises CheckpointError when `path` is missing or holds something else."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, found {type(values).__name__}")
    return JsonFields(path, values)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the single file if there is one, else the shards of its index.

    Raises CheckpointError when there is neither, or when a shard is missing.
    """
    directory = Path(directory)
    if (directory / SINGLE_FILE).exists():
        return [directory / SINGLE_FILE]
    if not (directory / INDEX_FILE).exists():
        raise CheckpointError(f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE} is there")
    index = read_json(directory / INDEX_FILE)
    weight_map = index.values.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise index.error("weight_map", "must be an object of tensor names and file names")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise CheckpointError(f"{index.path}: weight_map names {shard!r}, which is not a plain file name")
    paths = [directory / shard for shard in sorted(set(weight_map.values()))]
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file, though {INDEX_FILE} names it")
    return paths
