"""Checkpoints of every family, written once for the whole run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import write_checkpoint


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family's checkpoint (seed 0, float32); do not change what is in it."""
    directories: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in directories:
            directories[family] = tmp_path_factory.mktemp(family)
            write_checkpoint(family, directories[family])
        return directories[family]

    return get


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_single_threaded() -> None:
    torch.set_num_threads(1)  # more only wait for each other on matrices as small as these
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def reference_of() -> Callable[..., torch.nn.Module]:
    """transformers' model of a checkpoint directory."""

    def load(directory: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()

    return load
