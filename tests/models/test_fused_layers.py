"""Small steps run their layers as one program; it computes what the kernels called one by one do."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import FAMILIES, VOCAB_SIZE
from paged_model import PagedModel

DTYPES = (torch.float32, torch.bfloat16)
# Single tokens of a short and of a long context, which is split among tasks; chunks beside them.
STEPS = (
    {"long": 700, "short": 20},
    {"long": 1, "short": 1},
    {"short": 1},
    {"long": 1, "short": 7, "new": 13},
    {"new": 1, "long": 30, "short": 1},
    {"long": 1, "short": 40},
    {"long": 1, "short": 1, "new": 1},
)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_logits_as_kernel_by_kernel(
    family: str, dtype: torch.dtype, checkpoint_of: Callable[[str], Path]
) -> None:
    fused, plain = (PagedModel(checkpoint_of(family), dtype) for _ in range(2))
    plain.decoder.fused_layers = None
    generator = torch.Generator().manual_seed(0)
    for step in STEPS:
        tokens = {
            name: torch.randint(VOCAB_SIZE, (count,), generator=generator).tolist()
            for name, count in step.items()
        }
        expected, logits = plain.step(tokens), fused.step(tokens)
        for name in tokens:
            assert torch.equal(logits[name], expected[name]), (step, name)
        assert torch.equal(fused.pool.isnan(), plain.pool.isnan())


def test_small_steps_are_fused(checkpoint_of: Callable[[str], Path]) -> None:
    decoder = PagedModel(checkpoint_of("llama-mha")).decoder
    own_kernels = all(layer.attention.qkv_proj.packed.own_rows > 0 for layer in decoder.layers)
    assert (decoder.fused_layers is not None) == own_kernels
