"""Who may join, and who gets the work."""

import sys
from itertools import count
from typing import Any

import pytest
from fake_cluster import BLOCK_SIZE, MODEL, hello, names_of
from hypothesis import given
from hypothesis import strategies as st

from pdengine.router.admission import InvalidRequest, check_fits
from pdengine.router.prefixes import PromptPrefix, name_prefix
from pdengine.router.registry import Demand, Registry, WorkerEntry
from pdengine.transport.messages import (
    PREFIX_TAG_BYTES,
    PROTOCOL_VERSION,
    CacheUpdate,
    Refused,
    Role,
    SamplingParams,
)


def registry_of(*workers: tuple[Role, int]) -> Registry:
    """Workers "0", "1", ... of these roles and numbers of KV blocks."""
    registry = Registry(MODEL)
    for number, (role, num_blocks) in enumerate(workers):
        greeting = hello(str(number), role, num_blocks=num_blocks, max_context=10_000)
        registry.add(b"%d" % number, greeting, now=0.0)
    return registry


def picked(worker: WorkerEntry | None) -> str | None:
    return None if worker is None else worker.engine_id


def first(registry: Registry, num_tokens: int, max_tokens: int) -> WorkerEntry | None:
    """Who gets a new request."""
    return next(iter(registry.rank_prefill(demand(num_tokens, max_tokens))), None)


def demand(num_tokens: int, max_tokens: int = 1, prefix: PromptPrefix | None = None) -> Demand:
    """Of a prompt of `num_tokens` with one answer."""
    longest = num_tokens + max_tokens - 1
    return Demand(num_tokens, longest, longest, prefix)


def entry(registry: Registry, engine_id: str) -> WorkerEntry:
    worker = registry.get(engine_id)
    assert worker is not None
    return worker


# --------------------------------------------------------------------------------------- membership


@pytest.mark.parametrize(
    ("field", "theirs"),
    [
        ("weights", "others"),
        ("dtype", "bfloat16"),
        ("block_size", 32),
        ("layout", "2"),
        ("ucx", "1.13"),
    ],
)
def test_a_refusal_names_the_field_and_both_values(field: str, theirs: Any) -> None:
    registry = registry_of(("prefill", 8))
    ours = getattr(entry(registry, "0").compatibility, field)
    refusal = registry.refusal(hello("new", "decode", **{field: theirs}))
    assert refusal == Refused(field, str(ours), str(theirs))
    assert Registry(MODEL).refusal(hello("new", "decode", **{field: theirs})) is None  # the first sets it


def test_the_first_field_that_differs_is_named() -> None:
    refusal = registry_of(("prefill", 8)).refusal(hello("new", "decode", dtype="float16", weights="x"))
    assert refusal is not None
    assert refusal.field == "weights"


def test_model_and_protocol_are_the_routers_own() -> None:
    registry = Registry(MODEL)
    assert registry.refusal(hello("new", "decode", model="x")) == Refused("model", MODEL, "x")
    wrong = hello("new", "decode", protocol=PROTOCOL_VERSION + 1)
    assert registry.refusal(wrong) == Refused("protocol", str(PROTOCOL_VERSION), str(PROTOCOL_VERSION + 1))


def test_workers_are_found_by_id_and_by_connection() -> None:
    registry = registry_of(("prefill", 8), ("decode", 8))
    first = entry(registry, "0")
    assert registry.by_identity(b"0") is first
    assert registry.by_identity(b"nobody") is None
    assert registry.get(None) is None
    assert len(registry) == 2
    entry(registry, "1").links["0"] = "memory"
    registry.remove("0")
    assert [worker.engine_id for worker in registry] == ["1"]
    assert entry(registry, "1").links == {}


def test_silent_workers() -> None:
    registry = registry_of(("prefill", 8), ("decode", 8))
    entry(registry, "1").heard_at = 4.0
    assert [worker.engine_id for worker in registry.silent(now=5.0, timeout=5.0)] == []
    assert [worker.engine_id for worker in registry.silent(now=5.5, timeout=5.0)] == ["0"]
    ages = [status.heartbeat_age for status in registry.statuses(now=5.0)]
    assert ages == [5.0, 1.0]


# ---------------------------------------------------------------------------------------- placement


def test_the_least_loaded_worker_prefills() -> None:
    registry = registry_of(("prefill", 8), ("prefill", 8), ("unified", 8), ("decode", 8))
    for engine_id, tokens in (("0", 20), ("1", 5), ("2", 10)):
        entry(registry, engine_id).assigned["request"] = tokens
    assert picked(first(registry, 10, 10)) == "1"
    entry(registry, "1").assigned["another"] = 6
    assert picked(first(registry, 10, 10)) == "2"


def test_a_decode_worker_with_room_comes_before_one_with_fewer_requests() -> None:
    registry = registry_of(("decode", 4), ("decode", 4))
    entry(registry, "0").assigned["big"] = 4 * BLOCK_SIZE - 5
    entry(registry, "1").assigned.update(one=5, two=5)
    assert picked(registry.pick_decode(demand(10))) == "1"
    assert picked(registry.pick_decode(demand(5))) == "0"
    entry(registry, "1").assigned["three"] = 4 * BLOCK_SIZE
    assert picked(registry.pick_decode(demand(10))) == "0"  # both are full: the shorter queue


def test_a_decode_worker_that_can_pull_comes_before_an_idle_one_that_cannot() -> None:
    registry = registry_of(("decode", 4), ("decode", 4))
    entry(registry, "1").links["holder"] = "posix"
    entry(registry, "1").assigned.update(one=5, two=4 * BLOCK_SIZE)
    assert picked(registry.pick_decode(demand(10), "holder")) == "1"
    assert picked(registry.pick_decode(demand(10), "another holder")) == "0"


def test_a_prefill_worker_that_nobody_can_pull_from_runs_whole_requests() -> None:
    registry = registry_of(("prefill", 8), ("decode", 8), ("decode", 8))
    prefill = entry(registry, "0")
    entry(registry, "1").broken_links.add("0")
    assert registry.splits(prefill)
    assert picked(registry.pick_decode(demand(10), "0")) == "2"
    entry(registry, "2").broken_links.add("0")
    assert not registry.splits(prefill)
    assert registry.pick_decode(demand(10), "0") is None
    assert first(registry, 10, 10) is not None
    entry(registry, "1").broken_links.clear()
    assert registry.splits(prefill)


def test_a_silence_of_our_own_is_forgiven() -> None:
    registry = registry_of(("prefill", 8), ("decode", 8))
    heard_at = entry(registry, "0").heard_at
    assert len(registry.silent(heard_at + 7, timeout=5)) == 2
    registry.forgive_silence(4)
    assert registry.silent(heard_at + 7, timeout=5) == []
    assert len(registry.silent(heard_at + 10, timeout=5)) == 2


@pytest.mark.parametrize("role", ["prefill", "decode", "unified"])
def test_one_side_alone_runs_whole_requests(role: Role) -> None:
    registry = registry_of((role, 8))
    worker = first(registry, 10, 10)
    assert worker is not None
    assert not registry.splits(worker)


def test_decode_workers_get_no_prompts_while_there_is_a_prefill_worker() -> None:
    registry = registry_of(("prefill", 8), ("decode", 8))
    entry(registry, "0").assigned["request"] = 1000
    assert picked(first(registry, 10, 10)) == "0"
    assert registry.splits(entry(registry, "0"))
    entry(registry, "0").leaving = True
    assert picked(first(registry, 10, 10)) == "1"
    assert not registry.splits(entry(registry, "1"))


def test_leaving_workers_get_nothing() -> None:
    registry = registry_of(("prefill", 8), ("decode", 8))
    for worker in registry:
        worker.leaving = True
    assert first(registry, 1, 1) is None
    assert registry.pick_decode(demand(1)) is None
    assert not registry.is_disaggregated


def test_the_last_token_needs_no_room() -> None:
    capacity = 4 * BLOCK_SIZE
    registry = registry_of(("unified", 4))
    assert picked(first(registry, capacity, 1)) == "0"
    assert first(registry, capacity, 2) is None


def test_a_prompt_that_no_decode_worker_could_go_on_with_stays_whole() -> None:
    registry = registry_of(("prefill", 8), ("decode", 1), ("unified", 4))
    entry(registry, "2").assigned["request"] = 1000
    assert picked(first(registry, 30, 10)) == "2"


def test_a_small_unified_worker_does_not_hide_a_large_one_of_another_role() -> None:
    assert picked(first(registry_of(("unified", 1), ("prefill", 8)), 10, 50)) == "1"


# -------------------------------------------------------------------------------------- prefix caches


PROMPT = list(range(4 * BLOCK_SIZE + 5))  # four full blocks and a rest
PREFIX = name_prefix(MODEL, "", PROMPT, BLOCK_SIZE)


def announce(worker: WorkerEntry, num_blocks: int, prompt: list[int] = PROMPT) -> None:
    """The first blocks of a prompt are in its prefix cache now."""
    worker.update_cached_tags(CacheUpdate(added=tags_of(prompt, num_blocks), removed=b""))


def tags_of(prompt: list[int], num_blocks: int) -> bytes:
    return b"".join(name[:PREFIX_TAG_BYTES] for name in names_of(prompt)[:num_blocks])


def test_what_a_worker_has_of_a_prompt_ends_at_the_first_block_that_it_lacks() -> None:
    worker = entry(registry_of(("prefill", 8)), "0")
    assert worker.cached_blocks(PREFIX) == 0
    assert worker.cached_blocks(None) == 0
    announce(worker, 4)
    assert worker.cached_blocks(PREFIX) == 4
    second = tags_of(PROMPT, 2)[PREFIX_TAG_BYTES:]
    worker.update_cached_tags(CacheUpdate(added=b"", removed=second))
    assert worker.cached_blocks(PREFIX) == 1
    worker.update_cached_tags(CacheUpdate(added=second, removed=second))  # removals come first
    assert worker.cached_blocks(PREFIX) == 4
    worker.update_cached_tags(CacheUpdate(added=tags_of(PROMPT, 1), removed=b"", reset=True))
    assert worker.cached_blocks(PREFIX) == 1


@pytest.mark.parametrize("fields", [{"added": b"1234567"}, {"removed": b"123456789"}])
def test_a_part_of_a_tag_is_refused_and_changes_nothing(fields: dict[str, Any]) -> None:
    worker = entry(registry_of(("prefill", 8)), "0")
    announce(worker, 4)
    with pytest.raises(ValueError, match="multiple"):
        worker.update_cached_tags(CacheUpdate(**{"added": b"", "removed": b"", "reset": True, **fields}))
    assert worker.cached_blocks(PREFIX) == 4


def test_prompts_of_another_salt_or_model_are_not_found() -> None:
    worker = entry(registry_of(("prefill", 8)), "0")
    announce(worker, 4)
    assert worker.cached_blocks(name_prefix(MODEL, "salt", PROMPT, BLOCK_SIZE)) == 0
    assert worker.cached_blocks(name_prefix("another", "", PROMPT, BLOCK_SIZE)) == 0
    longer = [*PROMPT[: 3 * BLOCK_SIZE], *range(100, 150)]
    assert worker.cached_blocks(name_prefix(MODEL, "", longer, BLOCK_SIZE)) == 3


def test_the_last_token_is_always_computed() -> None:
    worker = entry(registry_of(("prefill", 8)), "0")
    full = PROMPT[: 4 * BLOCK_SIZE]
    announce(worker, 4)
    assert worker.uncached_tokens(demand(len(full), prefix=name_prefix(MODEL, "", full, BLOCK_SIZE))) == 1
    assert worker.uncached_tokens(demand(len(PROMPT), prefix=PREFIX)) == 5
    assert worker.uncached_tokens(demand(len(PROMPT))) == len(PROMPT)


def test_a_prompt_goes_where_its_prefix_is_until_that_worker_is_busier_by_as_much() -> None:
    registry = registry_of(("prefill", 32), ("prefill", 32), ("decode", 32))
    having, other = entry(registry, "0"), entry(registry, "1")
    announce(having, 4)
    asked = demand(len(PROMPT), prefix=PREFIX)
    having.assigned["another"] = 4 * BLOCK_SIZE - 1
    assert registry.rank_prefill(asked) == [having, other]
    having.assigned["another"] = 4 * BLOCK_SIZE + 1
    assert registry.rank_prefill(asked) == [other, having]


def test_a_cached_prefix_decides_among_decode_workers_with_as_many_requests() -> None:
    registry = registry_of(("decode", 32), ("decode", 32))
    announce(entry(registry, "1"), 4)
    asked = demand(len(PROMPT), prefix=PREFIX)
    entry(registry, "0").assigned["one"] = 1
    entry(registry, "1").assigned["two"] = 90
    assert picked(registry.pick_decode(asked)) == "1"
    entry(registry, "1").assigned["three"] = 1
    assert picked(registry.pick_decode(asked)) == "0"


def test_the_decode_worker_with_the_smallest_rest_computes_it() -> None:
    registry = registry_of(("prefill", 32), ("decode", 32), ("decode", 32), ("unified", 32))
    announce(entry(registry, "0"), 4)
    announce(entry(registry, "1"), 2)
    announce(entry(registry, "2"), 3)
    announce(entry(registry, "3"), 4)
    asked = demand(len(PROMPT), max_tokens=10, prefix=PREFIX)
    rest = 1 * BLOCK_SIZE + 5
    assert picked(registry.pick_local(asked, limit=rest)) == "2"
    assert registry.pick_local(asked, limit=rest - 1) is None
    entry(registry, "2").assigned["another"] = 32 * BLOCK_SIZE - asked.expected + 1  # no room
    assert registry.pick_local(asked, limit=rest) is None
    assert picked(registry.pick_local(asked, limit=rest + BLOCK_SIZE)) == "1"
    entry(registry, "1").leaving = True
    assert registry.pick_local(asked, limit=1000) is None


def test_a_prompt_of_which_nothing_is_cached_is_not_computed_by_a_decode_worker() -> None:
    registry = registry_of(("prefill", 8), ("decode", 8))
    assert registry.pick_local(demand(5), limit=1000) is None
    assert registry.pick_local(demand(len(PROMPT), prefix=PREFIX), limit=1000) is None
    announce(entry(registry, "1"), 4)
    assert registry.pick_local(demand(len(PROMPT), prefix=PREFIX), limit=0) is None


def test_any_role_can_run_a_whole_request() -> None:
    registry = registry_of(("prefill", 8), ("decode", 8), ("unified", 8), ("decode", 2))
    for engine_id, tokens in (("0", 20), ("1", 5), ("2", 10)):
        entry(registry, engine_id).assigned["request"] = tokens
    ranked = registry.rank_whole(demand(30, 10))
    assert [worker.engine_id for worker in ranked] == ["1", "2", "0"]  # the last one is too small


def packed(tags: set[int]) -> bytes:
    return b"".join(tag.to_bytes(PREFIX_TAG_BYTES, sys.byteorder) for tag in tags)


@given(
    st.lists(st.tuples(st.booleans(), st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9))), max_size=10)
)
def test_cached_tags_are_what_the_updates_add_up_to(updates: list[tuple[bool, set[int], set[int]]]) -> None:
    worker = entry(registry_of(("prefill", 8)), "0")
    expected: set[int] = set()
    for reset, added, removed in updates:
        worker.update_cached_tags(CacheUpdate(packed(added), packed(removed), reset))
        expected = ((set() if reset else expected) - removed) | added
    assert worker.cached_tags == expected


roles = st.sampled_from(["prefill", "decode", "unified"])
clusters = st.lists(st.tuples(roles, st.integers(1, 8)), min_size=1, max_size=5)
sizes = st.integers(1, 9 * BLOCK_SIZE)


@given(clusters, st.data(), sizes, sizes)
def test_whoever_is_picked_can_do_it(
    workers: list[tuple[Role, int]], data: st.DataObject, num_tokens: int, max_tokens: int
) -> None:
    registry = registry_of(*workers)
    for member in registry:
        member.leaving = data.draw(st.booleans())
        member.assigned = {str(n): tokens for n, tokens in enumerate(data.draw(st.lists(sizes, max_size=3)))}
    asked = demand(num_tokens, max_tokens)
    ranked = registry.rank_prefill(asked)
    decoder = registry.pick_decode(asked)
    for chosen, needed in [*((worker, num_tokens) for worker in ranked), (decoder, asked.longest)]:
        assert chosen is None or (not chosen.leaving and chosen.capacity >= needed)
    assert decoder is None or decoder.role == "decode"
    for worker in ranked:
        if registry.splits(worker):
            assert decoder is not None
        else:
            assert worker.capacity >= asked.longest
    loads = [worker.assigned_tokens for worker in ranked]
    assert loads == sorted(loads)


@given(clusters, sizes, sizes)
def test_what_is_admitted_can_be_placed(
    workers: list[tuple[Role, int]], num_tokens: int, max_tokens: int
) -> None:
    registry = registry_of(*workers)
    try:
        check_fits(num_tokens, SamplingParams(max_tokens=max_tokens), registry.limits)
    except InvalidRequest:
        return
    assert first(registry, num_tokens, max_tokens) is not None


@given(st.lists(sizes, min_size=1, max_size=20))
def test_load_is_spread(requests: list[int]) -> None:
    """Greedy placement: no two workers differ by more than the largest request."""
    registry = registry_of(("unified", 100), ("unified", 100), ("unified", 100))
    names = count()
    for num_tokens in requests:
        chosen = first(registry, num_tokens, 1)
        assert chosen is not None
        chosen.assigned[str(next(names))] = num_tokens
    loads = [worker.assigned_tokens for worker in registry]
    assert max(loads) - min(loads) <= max(requests)
