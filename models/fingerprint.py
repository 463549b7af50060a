"""Short digests by which processes find out whether they serve the same model; no torch."""

import json
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

from pdengine.models.checkpoint import CheckpointError, weight_files
from pdengine.models.config import load_config

DIGEST_BYTES = 16
SAMPLE_BYTES = 4096
SAMPLES_PER_TENSOR = 4
LARGEST_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


def model_fingerprint(directory: Path) -> str:
    """Hex digest of what the config means and of tokenizer.json: what a router and its workers compare.

    Two spellings of the same config agree. Raises CheckpointError when a file is missing or broken.
    """
    directory = Path(directory)
    config = json.dumps(asdict(load_config(directory)), sort_keys=True).encode()
    path = directory / "tokenizer.json"
    try:
        tokenizer = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    digest = blake2b(digest_size=DIGEST_BYTES)
    for part in (config, tokenizer):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def weights_fingerprint(directory: Path) -> str:
    """Hex digest of the safetensors files' names, sizes, headers, and samples of every tensor.

    Reads up to 16 KiB per tensor, so it takes a moment also for 100 GB; a change between the samples goes
    unseen. Raises CheckpointError when a file is missing or damaged.
    """
    digest = blake2b(digest_size=DIGEST_BYTES)
    for path in weight_files(directory):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        try:
            with path.open("rb") as file:
                header = _read_header(file)
                digest.update(header)
                for start, end in _tensor_ranges(header):
                    for offset in _sample_offsets(start, end):
                        file.seek(8 + len(header) + offset)
                        digest.update(file.read(min(SAMPLE_BYTES, end - offset)))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: damaged or not a safetensors file ({error})") from error
    return digest.hexdigest()


def _read_header(file: BinaryIO) -> bytes:
    """The JSON header: its length is in the first 8 bytes, little-endian (the safetensors format)."""
    length = int.from_bytes(file.read(8), "little")
    header = file.read(length) if length <= LARGEST_HEADER_BYTES else b""
    if not 0 < len(header) == length:
        raise ValueError("the header is cut off")
    return header


def _tensor_ranges(header: bytes) -> list[tuple[int, int]]:
    """Where each tensor's bytes lie after the header, in the order of the file."""
    entries = json.loads(header)
    ranges = [entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"]
    if not all(0 <= start <= end for start, end in ranges):
        raise ValueError("a tensor ends before it starts")
    return sorted((start, end) for start, end in ranges)


def _sample_offsets(start: int, end: int) -> list[int]:
    """Evenly spaced, the first and the last bytes included."""
    last = max(start, end - SAMPLE_BYTES)
    steps = SAMPLES_PER_TENSOR - 1
    return sorted({start + (last - start) * step // steps for step in range(SAMPLES_PER_TENSOR)})
