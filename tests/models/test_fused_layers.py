"""Small steps run their layers as one program; it computes what the kernels called one by one do."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import FAMILIES, VOCAB_SIZE, write_checkpoint
from paged_model import PagedModel

WIDE = "qwen3-wide"
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


@pytest.fixture(scope="module")
def fusible(
    checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Of a family, and of a model that is wide enough for two threads to share each of its matrices."""
    wide = tmp_path_factory.mktemp(WIDE)
    write_checkpoint("qwen3", wide, overrides={"hidden_size": 256, "intermediate_size": 512})
    return lambda family: wide if family == WIDE else checkpoint_of(family)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", [*FAMILIES, WIDE])
def test_the_same_logits_as_kernel_by_kernel(
    family: str, dtype: torch.dtype, fusible: Callable[[str], Path]
) -> None:
    fused, plain = (PagedModel(fusible(family), dtype) for _ in range(2))
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


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", [*FAMILIES, WIDE])
def test_whole_steps_choose_the_likeliest_tokens(
    family: str, dtype: torch.dtype, fusible: Callable[[str], Path]
) -> None:
    model, plain = (PagedModel(fusible(family), dtype) for _ in range(2))
    plain.decoder.fused_layers = None
    layers = model.decoder.fused_layers
    if layers is None:
        pytest.skip("no kernel of ours for this dtype on this CPU, or a matrix has fewer panels than threads")
    generator = torch.Generator().manual_seed(0)

    def step(counts: dict[str, int]) -> dict[str, list[int]]:
        return {
            name: torch.randint(VOCAB_SIZE, (count,), generator=generator).tolist()
            for name, count in counts.items()
        }

    start = step({"long": 1100, "short": 20, "new": 1})
    model.step(start), plain.step(start)
    # Steps of other kinds in between leave their own words in the program.
    for names in (["long"], ["short", "new"], ["long", "short", "new"], None, ["new", "long"], ["long"]):
        if names is None:
            mixed = step({"short": 2, "long": 1})
            model.step(mixed), plain.step(mixed)
            continue
        tokens = step(dict.fromkeys(names, 1))
        expected = plain.step(tokens)
        model.grow(names)
        with torch.inference_mode():
            chosen = layers.decode(
                model.pool,
                [tokens[name][0] for name in names],
                [model.lengths[name] for name in names],
                [model.block_tables[name] for name in names],
            )
            logits = layers.logits(len(names)).to(torch.float32)
        if chosen is None:
            assert model.config.head_dim % 32 or model.config.rope.partial_rotary_factor < 1
            return
        assert chosen == logits.argmax(dim=1).tolist()
        for row, name in enumerate(names):
            # cos and sin may differ from torch's in the last bit.
            tolerance = 1e-4 if dtype == torch.float32 else 0.1
            torch.testing.assert_close(logits[row], expected[name][0], rtol=tolerance, atol=tolerance)
