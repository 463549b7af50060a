"""The attention kernels against dense attention in float64, on pools whose unowned memory is NaN."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_batches import Shape, make_batch, make_case, select, shapes_and_lengths, to_device
from rounding import rounding_of

from pdengine.triton_kernels.attention_plan import plan_decodes, plan_prefills
from pdengine.triton_kernels.attention_tiles import decode_tile, prefill_tiles
from pdengine.triton_kernels.decode_attention import decode_attention
from pdengine.triton_kernels.prefill_attention import prefill_attention
from pdengine.triton_kernels.triton_attention import paged_attention

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SMALL = Shape(num_kv_heads=2, group_size=3, head_dim=64, block_size=16)


def attend(case, device, query=None):
    batch, pool = to_device(case.batch, device), case.pool.to(device)
    query = (case.query if query is None else query).to(device)
    attended = paged_attention(query, pool, case.layer, batch, case.scale, case.window)
    return attended, next(iter(batch.plans.values()))


def check(case, attended):
    """Each weight is rounded once, before it multiplies V, and so is the result."""
    assert attended.dtype == case.query.dtype
    rounding = rounding_of(case.query.dtype, attended.device)
    error = (attended.cpu().double() - case.expected).abs()
    bound = (rounding + 4e-6) * case.magnitude + rounding * case.expected.abs()
    assert torch.all(error <= bound), f"error is {(error / bound).max():.2f} of what rounding explains"


@settings(max_examples=20, deadline=None, derandomize=True)
@given(shapes_and_lengths((16, 32, 64, 128, 256), max_sequences=4), DTYPES, st.none() | st.integers(1, 100))
def test_mixed_batches(device, shape_and_lengths, dtype, window):
    case = make_case(*shape_and_lengths, dtype, window)
    check(case, attend(case, device)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_contexts_that_are_split_beside_others_that_are_not(device, head_dim, dtype):
    shape = Shape(num_kv_heads=1, group_size=4, head_dim=head_dim, block_size=16)
    case = make_case(shape, [(900, 1), (0, 1), (15, 1), (300, 1), (0, 9), (20, 12)], dtype)
    attended, plan = attend(case, device)
    assert 1 <= len(plan.decode.reductions) < 4
    check(case, attended)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
def test_lengths_at_and_beside_the_borders_of_blocks(device, block_size):
    edges = [1, block_size - 1, block_size, block_size + 1, 2 * block_size, 3 * block_size + 5]
    lengths = [*((length - 1, 1) for length in edges), *((0, length) for length in edges[1:])]
    shape = Shape(num_kv_heads=1, group_size=2, head_dim=64, block_size=block_size)
    case = make_case(shape, lengths, torch.bfloat16)
    check(case, attend(case, device)[0])


@pytest.mark.parametrize(
    ("window", "dtype"),
    [(window, torch.float16) for window in (1, 16, 63, 64, 65, 200)] + [(40, torch.float32)],
)
def test_a_window_over_long_contexts(device, window, dtype):
    shape = Shape(num_kv_heads=1, group_size=3, head_dim=64, block_size=16)
    lengths = [(700, 1), (window - 1, 1), (window, 1), (0, 150), (250, 20), (window, 2)]
    case = make_case(shape, lengths, dtype, window)
    check(case, attend(case, device)[0])


def test_a_window_is_read_and_nothing_before_it(device):
    """Blocks that no query sees any more may be freed: here they are NaN."""
    case = make_case(SMALL, [(399, 1), (380, 20)], torch.float32, window=48)
    for table, first_seen in zip(case.batch.block_tables, (400 - 48, 381 - 48), strict=True):
        case.pool[table[: first_seen // 16]] = torch.nan
    check(case, attend(case, device)[0])


@pytest.mark.parametrize("of_each_head", [False, True])
@pytest.mark.parametrize(("group_size", "num_kv_heads"), [(1, 3), (4, 2), (7, 1), (8, 1)])
def test_a_query_that_is_a_part_of_another_tensor(device, group_size, num_kv_heads, of_each_head):
    """A layer without rope hands over its queries where they lie, among keys and values."""
    shape = Shape(num_kv_heads, group_size, head_dim=64, block_size=16)
    case = make_case(shape, [(40, 1), (70, 1), (3, 11)], torch.float32)
    tokens, heads, head_dim = case.query.shape
    around = torch.full((tokens, heads + 2 * num_kv_heads, head_dim * (2 if of_each_head else 1)), torch.nan)
    strided = around[:, :heads, :head_dim]
    strided.copy_(case.query)
    attended, _ = attend(case, device, around.to(device)[:, :heads, :head_dim])
    assert attended.is_contiguous()
    check(case, attended)


@pytest.mark.parametrize("num_resident", [1, 60, 10_000])
def test_any_split_gives_the_same(device, num_resident):
    lengths = [(length - 1, 1) for length in (1, 16, 17, 255, 512, 520)]
    case = make_case(SMALL, lengths, torch.float32)
    plan = plan_decodes(
        case.batch.context_lengths_on_host,
        window=None,
        num_heads=6,
        num_kv_heads=2,
        head_dim=64,
        tile=decode_tile(torch.float32, 64),
        num_resident=num_resident,
        device=device,
    )
    assert len(plan.reductions) == {1: 0, 60: 3, 10_000: 4}[num_resident]
    query, batch = case.query.to(device), to_device(case.batch, device)
    output = torch.full_like(query, torch.nan)
    decode_attention(query, case.pool.to(device), case.layer, batch.block_tables, plan, case.scale, output)
    check(case, output)


@pytest.mark.parametrize(("head_dim", "capability"), [(64, 80), (128, 80), (128, 90), (256, 90)])
def test_every_tile_of_the_prefill(device, head_dim, capability):
    """Chunks longer than a tile, and keys before the diagonal, which take the loop without masks."""
    shape = Shape(num_kv_heads=1, group_size=5, head_dim=head_dim, block_size=16)
    case = make_case(shape, [(0, 70), (200, 33)], torch.bfloat16)
    query, batch = case.query.to(device), to_device(case.batch, device)
    for tile in prefill_tiles(torch.bfloat16, head_dim, capability):
        plan = plan_prefills(
            batch.query_starts_on_host,
            batch.context_lengths_on_host,
            first_sequence=0,
            group_size=5,
            tile=tile,
            window=None,
            device=device,
        )
        output = torch.full_like(query, torch.nan)
        prefill_attention(
            query, case.pool.to(device), case.layer, batch.block_tables, plan, case.scale, output
        )
        check(case, output)


@pytest.mark.parametrize("length", [(300, 1), (40, 20)])
def test_a_result_does_not_depend_on_the_rest_of_the_batch(device, length):
    case = make_case(SMALL, [(100, 1), (3, 1), length, (0, 30)], torch.float32)
    together, _ = attend(case, device)
    start, end = case.batch.query_starts_on_host[2:4]
    alone = paged_attention(
        case.query[start:end].to(device),
        case.pool.to(device),
        case.layer,
        select(to_device(case.batch, device), 2),
        case.scale,
    )
    torch.testing.assert_close(alone, together[start:end], atol=2e-6, rtol=0)


def test_layers_share_a_plan_unless_their_windows_differ(device):
    case = make_case(SMALL, [(40, 1), (3, 18)], torch.float32)
    batch, query, pool = (
        to_device(case.batch, device),
        case.query.to(device),
        case.pool.nan_to_num().to(device),
    )
    for layer, window in ((0, None), (1, None), (0, 32), (1, 32)):
        paged_attention(query, pool, layer, batch, case.scale, window)
    assert {shape.window for shape in batch.plans} == {None, 32}
    assert len(batch.plans) == 2


@pytest.mark.parametrize(
    ("shape", "dtype", "window", "message"),
    [
        (Shape(1, 1, 64, 24), torch.float32, None, "block_size is 24, .* power of two"),
        (Shape(1, 1, 320, 16), torch.float32, None, "head_dim is 320, .* 256 at most"),
        (Shape(1, 1, 64, 16), torch.float64, None, "dtype is torch.float64, .* float32"),
        (Shape(1, 1, 64, 16), torch.float32, 0, "window is 0, .* at least 1"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(device, shape, dtype, window, message):
    pool = torch.zeros(3, 1, 1, 2, shape.block_size, shape.head_dim, dtype=dtype, device=device)
    batch = make_batch([(3, 1)], shape.block_size, 3, device)
    query = torch.zeros(1, 1, shape.head_dim, dtype=dtype, device=device)
    with pytest.raises(ValueError, match=message):
        paged_attention(query, pool, 0, batch, 1.0, window)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_offsets_beyond_31_bits():
    """The pool of an 8B model past 2^31 elements: only its last blocks are used."""
    num_blocks = 2**31 // (8 * 32 * 2 * 16 * 128) + 64
    shape = Shape(num_kv_heads=8, group_size=4, head_dim=128, block_size=16, num_layers=32)
    case = make_case(shape, [(150, 1), (70, 1), (0, 160), (200, 33)], torch.bfloat16)
    pool = torch.full((num_blocks, *case.pool.shape[1:]), torch.nan, dtype=torch.bfloat16, device="cuda")
    shift = num_blocks - len(case.pool)
    pool[shift:] = case.pool.cuda()
    batch = to_device(case.batch, torch.device("cuda"))
    batch.block_tables.add_(shift)
    check(case, paged_attention(case.query.cuda(), pool, case.layer, batch, case.scale))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_no_step_waits_for_the_gpu():
    case = make_case(SMALL, [(1700, 1), (40, 1), (3, 18)], torch.bfloat16)
    device = torch.device("cuda")
    batch, query, pool = to_device(case.batch, device), case.query.to(device), case.pool.to(device)
    paged_attention(query, pool, 0, batch, case.scale)  # compiles
    batch.plans.clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        paged_attention(query, pool, 1, batch, case.scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")
