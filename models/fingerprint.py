"""Short digests by which processes find out whether they serve the same model; no torch."""

import json
import os
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

from pdengine.models.checkpoint import CheckpointError, open_regular_file, read_json, weight_files
from pdengine.models.config import load_config
from pdengine.models.safetensors_header import read_header

DIGEST_BYTES = 16
SAMPLE_BYTES = 4096
SAMPLES_PER_TENSOR = 4


def model_fingerprint(directory: Path) -> str:
    """Hex digest of what the config means and of tokenizer.json: what a router and its workers compare.

    Two spellings of the same config agree. Raises CheckpointError when a file is missing or broken, or when
    the tokenizer has token ids that the model has not.
    """
    directory = Path(directory)
    config = load_config(directory)
    path = directory / "tokenizer.json"
    _check_token_ids(path, config.vocab_size)
    with open_regular_file(path) as file:
        tokenizer = file.read()
    digest = blake2b(digest_size=DIGEST_BYTES)
    for part in (json.dumps(asdict(config), sort_keys=True).encode(), tokenizer):
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
        with open_regular_file(path) as file:
            header, entries = read_header(file, path)
            digest.update(f"{path.name}\0{os.fstat(file.fileno()).st_size}\0".encode())
            digest.update(header)
            for entry in entries.values():
                for offset in _sample_offsets(entry.start, entry.end):
                    file.seek(offset)
                    digest.update(file.read(min(SAMPLE_BYTES, entry.end - offset)))
    return digest.hexdigest()


def _check_token_ids(path: Path, vocab_size: int) -> None:
    """The embedding has `vocab_size` rows, which a vocabulary of the same model does not exceed.

    Added tokens may: fine-tuned checkpoints often have, say, a padding token without a row. Prompts that
    use one are refused one by one.
    """
    fields = read_json(path).values
    model = fields.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    token_ids: list[Any] = []
    if isinstance(vocabulary, dict):
        token_ids += vocabulary.values()
    elif isinstance(vocabulary, list):  # of Unigram: the position is the id
        token_ids.append(len(vocabulary) - 1)
    largest = max((token_id for token_id in token_ids if isinstance(token_id, int)), default=0)
    if largest >= vocab_size:
        raise CheckpointError(
            f"{path}: it has token id {largest}, but vocab_size in config.json is {vocab_size}, so the two "
            "are not of one model"
        )


def _sample_offsets(start: int, end: int) -> list[int]:
    """Evenly spaced, the first and the last bytes included."""
    last = max(start, end - SAMPLE_BYTES)
    steps = SAMPLES_PER_TENSOR - 1
    return sorted({start + (last - start) * step // steps for step in range(SAMPLES_PER_TENSOR)})
