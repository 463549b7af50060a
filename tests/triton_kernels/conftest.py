"""Settings for all tests of the kernels."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _single_threaded() -> None:
    torch.set_num_threads(1)  # more only wait for each other on tensors as small as these
