"""The loop that drives UCX without the GIL.

Over TCP and shared memory UCX emulates a read: the process that is read from must progress its worker. A
loop that needed the GIL would stall behind any Python code that computes, so this one is compiled by numba
and calls UCX and libc by address. It posts the reads of all pulls, collects their completions, sleeps on
file descriptors when there is nothing to do, and returns only when Python has something to do.

State is shared with Python through int64 tables, whose columns are named here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import carray, cfunc, njit, types
from numba.extending import register_jitable

from pdengine.transport.native_calls import call_native, compile_with_cache, load_int64, monotonic_ns
from pdengine.transport.ucx_library import UcxLibrary

WINDOW = 32  # reads in flight per endpoint; UCX before 1.16 cannot cancel what overflows its queue of 64
IDLE_PASSES = 4  # without any event, each ended by a yield, before it sleeps
PROGRESS_CALLS = 4  # per pass, while UCX reports that it did something
LONGEST_SLEEP_MS = 5000

# Columns of the endpoint table
ENDPOINT_STATE = 0  # one of the three states below
ENDPOINT_HANDLE = 1
ENDPOINT_REMOTE_KEY = 2
ENDPOINT_STATUS = 3  # written by the error handler: 0, or the error that broke the endpoint
ENDPOINT_IN_FLIGHT = 4  # reads that were posted and have not ended
ENDPOINT_CLOSE_REQUEST = 5  # 0, or the request of a close that has not ended
ENDPOINT_COLUMNS = 6
FREE, OPEN, CLOSING = 0, 1, 2

# Columns of the pull table; pulls, and pushes, are served in the order of its rows
PULL_ENDPOINT = 0  # row of the endpoint table
PULL_RANGES = 1  # address of an int64 array [num_gets, 3]: local address, remote address, bytes
PULL_NUM_GETS = 2  # of a push: its writes, and the flush after which they have landed
PULL_POSTED = 3
PULL_COMPLETED = 4  # of those posted, how many have ended, well or not
PULL_STATUS = 5  # 0, or the error after which nothing more is posted
PULL_PARAMETERS = 6  # address of the ucp_request_param_t
PULL_POSTED_AT = 7  # CLOCK_MONOTONIC in ns of the first post
PULL_ENDED_AT = 8  # of the last completion
PULL_POST_TIME = 9  # ns spent in PULL_FUNCTION
PULL_FUNCTION = 10  # address of ucp_get_nbx or ucp_put_nbx
PULL_FLUSH = 11  # of a push: address of ucp_ep_flush_nbx; else 0
PULL_COLUMNS = 12

# Entries of the control array
CONTROL_WAKE = 0  # set by Python: return soon
CONTROL_DEADLINE = 1  # CLOCK_MONOTONIC in ns at which to return
CONTROL_PROGRESSED_AT = 2  # CLOCK_MONOTONIC in ns after the last progress call, plus the sleep since; or 0
CONTROL_SIZE = 3

# The histogram of gaps between progress calls: bucket i counts those up to GAP_BOUNDS_NS[i], the last one
# those above
GAP_BOUNDS_NS = tuple(1000 << exponent for exponent in range(24))  # 1 us to 8.4 s
NUM_GAP_BUCKETS = len(GAP_BOUNDS_NS) + 1

RANGE_BYTES = 24
_UCS_INPROGRESS = 1
_UCS_ERR_BUSY = -15
_UCS_ERR_LAST = -100


class NativeFunctions(NamedTuple):
    """Addresses of the C functions that the loop calls, passed as arguments so that none is compiled in."""

    progress: int
    arm: int
    check_status: int
    free: int
    poll: int
    clock_gettime: int
    sched_yield: int


class NativeLoop(NamedTuple):
    run: Callable[..., int]  # progress_until_news, compiled
    error_handler: Any  # the compiled ucp_err_handler_cb_t; must outlive the endpoints


def native_functions(library: UcxLibrary) -> NativeFunctions:
    return NativeFunctions(
        progress=library.address_of("ucp_worker_progress"),
        arm=library.address_of("ucp_worker_arm"),
        check_status=library.address_of("ucp_request_check_status"),
        free=library.address_of("ucp_request_free"),
        poll=library.address_of("poll"),
        clock_gettime=library.address_of("clock_gettime"),
        sched_yield=library.address_of("sched_yield"),
    )


def compile_loop() -> NativeLoop:
    """Compile, or load from numba's cache; without a writable cache folder, compile anew."""
    return compile_with_cache(_compile)


def _compile(cache: bool) -> NativeLoop:
    # Signatures make numba compile here and not at the first call.
    table, vector, functions = types.int64[:, ::1], types.int64[::1], types.UniTuple(types.int64, 7)
    signature = types.int64(functions, types.int64, types.int64, vector, vector, vector, table, table, table)
    error_signature = types.void(types.voidptr, types.voidptr, types.int8)
    return NativeLoop(
        njit(signature, nogil=True, cache=cache)(progress_until_news),
        cfunc(error_signature, cache=cache)(_record_endpoint_error),
    )


def progress_until_news(  # type: ignore[no-untyped-def]
    functions, worker, descriptors, clock, control, gaps, endpoints, pulls, requests
):
    """Drive UCX until a pull ends, an endpoint breaks or is closed, Python asks, or the deadline passes.

    functions: NativeFunctions as a plain tuple; worker: handle; descriptors: address of two pollfd (the
    worker's events, Python's commands); clock: [2] for a timespec; control: [CONTROL_SIZE]; gaps:
    [NUM_GAP_BUCKETS], counted up here; endpoints: [n, ENDPOINT_COLUMNS]; pulls: [m, PULL_COLUMNS]; requests:
    [m, WINDOW], those in flight, 0 where none. Returns 0, or the error of ucp_worker_arm.
    """
    progress, arm, check_status, free, poll, clock_gettime, sched_yield = functions
    num_idle_passes = 0
    while True:
        num_events = _post(clock_gettime, clock, endpoints, pulls, requests)
        _count_gap(monotonic_ns(clock_gettime, clock), control, gaps)
        for _ in range(PROGRESS_CALLS):
            if call_native(progress, (worker,)) & 0xFFFFFFFF == 0:
                break
            num_events += 1
        now = monotonic_ns(clock_gettime, clock)
        control[CONTROL_PROGRESSED_AT] = now
        num_events += _collect(check_status, free, now, endpoints, pulls, requests)
        if control[CONTROL_WAKE] != 0 or now >= control[CONTROL_DEADLINE] or _has_news(endpoints, pulls):
            return 0
        if num_events != 0:
            num_idle_passes = 0
            continue
        num_idle_passes += 1
        if num_idle_passes < IDLE_PASSES:
            # The peer may share this CPU: let it do more before we wait, so that a wake-up brings many
            # segments of an emulated read and not one. sched_yield takes no argument and ignores ours.
            call_native(sched_yield, (0,))
            continue
        status = _status(call_native(arm, (worker,)))
        if status == _UCS_ERR_BUSY:
            continue
        if status < 0:
            return status
        remaining_ms = (control[CONTROL_DEADLINE] - now) // 1_000_000 + 1
        asleep_at = monotonic_ns(clock_gettime, clock)
        call_native(poll, (descriptors, 2, min(remaining_ms, LONGEST_SLEEP_MS)))
        control[CONTROL_PROGRESSED_AT] += monotonic_ns(clock_gettime, clock) - asleep_at


def _record_endpoint_error(status_cell, endpoint, status):  # type: ignore[no-untyped-def]
    """The ucp_err_handler_cb_t: no GIL, one store into ENDPOINT_STATUS."""
    carray(status_cell, (1,), np.int64)[0] = status


@register_jitable
def _count_gap(now, control, gaps):  # type: ignore[no-untyped-def]
    """For how long UCX was not driven while it was awake: our own work, and Python's between two phases."""
    if control[CONTROL_PROGRESSED_AT] == 0:
        return
    gap = now - control[CONTROL_PROGRESSED_AT]
    bucket = 0
    while bucket < len(GAP_BOUNDS_NS) and gap > GAP_BOUNDS_NS[bucket]:
        bucket += 1
    gaps[bucket] += 1


@register_jitable
def _post(clock_gettime, clock, endpoints, pulls, requests):  # type: ignore[no-untyped-def]
    num_posted = 0
    for row in range(len(pulls)):
        pull = pulls[row]
        endpoint = endpoints[pull[PULL_ENDPOINT]]
        while (
            pull[PULL_POSTED] < pull[PULL_NUM_GETS]
            and pull[PULL_STATUS] == 0
            and endpoint[ENDPOINT_STATE] == OPEN
            and endpoint[ENDPOINT_STATUS] == 0
            and endpoint[ENDPOINT_IN_FLIGHT] < WINDOW
            and num_posted < WINDOW  # so that reads that end at once do not keep Python waiting
        ):
            posting_at = monotonic_ns(clock_gettime, clock)
            if pull[PULL_POSTED] == 0:
                pull[PULL_POSTED_AT] = posting_at
            if pull[PULL_FLUSH] != 0 and pull[PULL_POSTED] == pull[PULL_NUM_GETS] - 1:
                request = call_native(pull[PULL_FLUSH], (endpoint[ENDPOINT_HANDLE], pull[PULL_PARAMETERS]))
            else:
                copy = pull[PULL_RANGES] + pull[PULL_POSTED] * RANGE_BYTES
                request = call_native(
                    pull[PULL_FUNCTION],
                    (
                        endpoint[ENDPOINT_HANDLE],
                        load_int64(copy),
                        load_int64(copy + 16),
                        load_int64(copy + 8),
                        endpoint[ENDPOINT_REMOTE_KEY],
                        pull[PULL_PARAMETERS],
                    ),
                )
            posted_at = monotonic_ns(clock_gettime, clock)
            pull[PULL_POST_TIME] += posted_at - posting_at
            pull[PULL_POSTED] += 1
            num_posted += 1
            if _UCS_ERR_LAST <= request <= 0:  # ended at once: UCS_OK or an error
                pull[PULL_COMPLETED] += 1
                pull[PULL_ENDED_AT] = posted_at
                if request < 0:
                    pull[PULL_STATUS] = request
                continue
            endpoint[ENDPOINT_IN_FLIGHT] += 1
            for slot in range(WINDOW):
                if requests[row, slot] == 0:
                    requests[row, slot] = request
                    break
    return num_posted


@register_jitable
def _collect(check_status, free, now, endpoints, pulls, requests):  # type: ignore[no-untyped-def]
    num_collected = 0
    for row in range(len(pulls)):
        pull = pulls[row]
        for slot in range(WINDOW):
            if pull[PULL_POSTED] == pull[PULL_COMPLETED]:
                break
            request = requests[row, slot]
            if request == 0:
                continue
            status = _status(call_native(check_status, (request,)))
            if status == _UCS_INPROGRESS:
                continue
            call_native(free, (request,))
            requests[row, slot] = 0
            endpoints[pull[PULL_ENDPOINT], ENDPOINT_IN_FLIGHT] -= 1
            pull[PULL_COMPLETED] += 1
            pull[PULL_ENDED_AT] = now
            num_collected += 1
            if status < 0 and pull[PULL_STATUS] == 0:
                pull[PULL_STATUS] = status
    for row in range(len(endpoints)):
        request = endpoints[row, ENDPOINT_CLOSE_REQUEST]
        if request != 0 and _status(call_native(check_status, (request,))) != _UCS_INPROGRESS:
            call_native(free, (request,))
            endpoints[row, ENDPOINT_CLOSE_REQUEST] = 0
            num_collected += 1
    return num_collected


@register_jitable
def _has_news(endpoints, pulls):  # type: ignore[no-untyped-def]
    for row in range(len(pulls)):
        if pull_has_ended(pulls[row]):
            return True
    for row in range(len(endpoints)):
        endpoint = endpoints[row]
        if endpoint[ENDPOINT_STATE] == OPEN and endpoint[ENDPOINT_STATUS] != 0:
            return True
        if endpoint_is_closed(endpoint):
            return True
    return False


@register_jitable
def pull_has_ended(pull):  # type: ignore[no-untyped-def]
    """Nothing of it is in flight, and nothing more will be posted."""
    if pull[PULL_COMPLETED] != pull[PULL_POSTED]:
        return False
    return pull[PULL_STATUS] != 0 or pull[PULL_COMPLETED] == pull[PULL_NUM_GETS]


@register_jitable
def endpoint_is_closed(endpoint):  # type: ignore[no-untyped-def]
    """Its close has ended and so have all its reads."""
    return (
        endpoint[ENDPOINT_STATE] == CLOSING
        and endpoint[ENDPOINT_CLOSE_REQUEST] == 0
        and endpoint[ENDPOINT_IN_FLIGHT] == 0
    )


@register_jitable
def _status(result):  # type: ignore[no-untyped-def]
    """A ucs_status_t is one byte; the rest of the register is undefined."""
    return ((result & 0xFF) ^ 0x80) - 0x80
