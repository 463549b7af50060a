"""How each sequence of a step wants its next token to be chosen, as the kernels take it."""

from collections.abc import Sequence as Sequence_

import numpy as np
import numpy.typing as npt

from pdengine.engine.sequence import Sequence

LARGEST = float(np.finfo(np.float32).max)  # temperature: beyond it float32 has only infinity


def sampling_arrays(sequences: Sequence_[Sequence]) -> list[npt.NDArray[np.float32] | npt.NDArray[np.int64]]:
    """The fields of a SamplingBatch, in order: a row for each sequence, for the token after its last."""
    params = [sequence.sampling for sequence in sequences]
    assert all(p.seed is not None or p.temperature == 0 for p in params), (
        "the router draws a seed at admission"
    )
    return [
        np.array([min(p.temperature, LARGEST) for p in params], np.float32),
        np.array([p.min_p for p in params], np.float32),
        np.array([min(p.top_k, 2**63 - 1) for p in params], np.int64),
        np.array([p.top_p for p in params], np.float32),
        # The bits are what matters: signed and unsigned seeds of 64 bits are told apart nowhere.
        np.array([((s.sampling.seed or 0) + s.choice) % 2**64 for s in sequences], np.uint64).view(np.int64),
        np.array([len(sequence.token_ids) for sequence in sequences], np.int64),
    ]
