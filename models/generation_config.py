"""How a checkpoint asks to be sampled where a request does not say: `generation_config.json`."""

import os
from dataclasses import dataclass
from pathlib import Path

from pdengine.models.checkpoint import JsonFields, read_json


@dataclass(frozen=True)
class SamplingDefaults:
    """The values of a request's fields of these names that the request leaves out."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def load_sampling_defaults(directory: Path) -> SamplingDefaults:
    """What the checkpoint's `generation_config.json` says, else as OpenAI's API has it: plain sampling.

    Raises CheckpointError for values that no request may have.
    """
    path = directory / "generation_config.json"
    if not os.path.lexists(path):
        return SamplingDefaults()
    fields = read_json(path)
    return SamplingDefaults(
        temperature=_number(fields, "temperature", 1.0, 0, 100),
        top_p=_number(fields, "top_p", 1.0, 1e-9, 1),
        top_k=_top_k(fields),
        min_p=_number(fields, "min_p", 0.0, 0, 1),
        repetition_penalty=_number(fields, "repetition_penalty", 1.0, 0.01, 100),
    )


def _top_k(fields: JsonFields) -> int:
    value = _number(fields, "top_k", 0, -1, 2**31 - 1)  # -1 is all tokens, as in a request
    if value != int(value):
        raise fields.error("top_k", "must be an integer")
    return int(value)


def _number(fields: JsonFields, name: str, default: float, low: float, high: float) -> float:
    value = fields.values.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise fields.error(name, f"must be a number from {low:g} to {high:g}")
    return value
