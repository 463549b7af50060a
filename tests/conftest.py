"""Settings for all tests."""

import os

import torch

# Triton reads it when it is imported, and torch or transformers may import it before a test of ours does.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
