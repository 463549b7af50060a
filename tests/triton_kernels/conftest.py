"""Settings for all tests of the kernels."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _single_threaded() -> None:
    torch.set_num_threads(1)  # more only wait for each other on tensors as small as these


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels under test run: on a GPU if there is one, else by Triton's interpreter on the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
