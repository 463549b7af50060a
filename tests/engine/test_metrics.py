"""What the metrics of a worker say after what happened."""

import math
import threading
from typing import get_args

import pytest
from exposition import samples

from pdengine.engine.metrics import ProgressGaps, PullFailure, RequestOutcome, WorkerMetrics
from pdengine.transport.messages import Load, TransferStats

STATS = TransferStats(
    num_blocks=22, num_bytes=3 * 2**20, num_gets=5, seconds=0.02, lanes="tcp", num_early_blocks=16
)
LOAD = Load(
    num_blocks=100, free_blocks=40, pinned_blocks=30, quarantined_blocks=7, running=3, waiting=2, step_age=0.5
)
GAPS: ProgressGaps = [(1e-6, 90), (1e-3, 8), (math.inf, 2)]


@pytest.fixture
def metrics() -> WorkerMetrics:
    """Of a worker that has started."""
    metrics = WorkerMetrics()
    metrics.watch_worker(load=lambda: LOAD, num_leases=lambda: 4, why_not_ready=lambda: None)
    metrics.watch_progress_gaps(lambda: GAPS)
    return metrics


def test_a_pull_is_counted_with_its_size_and_its_times(metrics: WorkerMetrics) -> None:
    for _ in range(2):
        metrics.pull_completed(STATS, post_seconds=2e-5)
    found = samples(metrics.exposition())
    assert found["pdengine_kv_pull_seconds_sum"] == pytest.approx(0.04)
    assert found["pdengine_kv_pull_seconds_bucket{0.01}"] == 0
    assert found["pdengine_kv_pull_seconds_bucket{0.025}"] == 2
    assert found["pdengine_kv_pull_post_seconds_bucket{1e-05}"] == 0
    assert found["pdengine_kv_pull_post_seconds_bucket{3e-05}"] == 2
    assert found["pdengine_kv_pull_bytes_count"] == 2
    assert found["pdengine_kv_pull_bytes_sum"] == 6 * 2**20
    assert found["pdengine_kv_pull_gets_total"] == 10
    assert found["pdengine_kv_pulled_blocks_total"] == 44
    assert found["pdengine_kv_early_pulled_blocks_total"] == 32


def test_pulls_that_are_not_used_are_not_counted_as_pulls(metrics: WorkerMetrics) -> None:
    metrics.pull_failed("timeout")
    metrics.pull_failed("timeout")
    metrics.pull_failed("lease_lost")
    metrics.pull_discarded()
    found = samples(metrics.exposition())
    failures = {kind: found[f"pdengine_kv_pull_failures_total{{{kind}}}"] for kind in get_args(PullFailure)}
    assert failures == {"transfer": 0, "timeout": 2, "lease_lost": 1}
    assert found["pdengine_kv_pulls_discarded_total"] == 1
    assert found["pdengine_kv_pull_seconds_count"] == found["pdengine_kv_pulled_blocks_total"] == 0


def test_steps_and_their_tokens(metrics: WorkerMetrics) -> None:
    metrics.step_completed(0.3, num_tokens=2048, num_prompt_tokens=2040, num_generated=9)
    metrics.step_completed(0.004, num_tokens=8, num_prompt_tokens=0, num_generated=8)
    found = samples(metrics.exposition())
    assert found["pdengine_step_seconds_sum"] == pytest.approx(0.304)
    assert found["pdengine_step_tokens_bucket{8.0}"] == 1
    assert found["pdengine_step_tokens_sum"] == 2056
    assert found["pdengine_prompt_tokens_total"] == 2040
    assert found["pdengine_generation_tokens_total"] == 17


def test_requests_by_outcome_and_expired_leases(metrics: WorkerMetrics) -> None:
    for count, outcome in enumerate(get_args(RequestOutcome), start=1):
        for _ in range(count):
            metrics.request_ended(outcome)
    metrics.leases_expired(3)
    found = samples(metrics.exposition())
    assert [found[f"pdengine_requests_total{{{o}}}"] for o in get_args(RequestOutcome)] == [1, 2, 3, 4, 5, 6]
    assert found["pdengine_kv_leases_expired_total"] == 3


def test_held_blocks_are_counted_with_their_time(metrics: WorkerMetrics) -> None:
    metrics.blocks_held(10, 0.5)
    metrics.blocks_held(3, 2.0)
    assert samples(metrics.exposition())["pdengine_kv_block_seconds_total"] == 11


def test_states_are_read_when_asked() -> None:
    metrics, loads = WorkerMetrics(), [LOAD, Load(num_blocks=100, free_blocks=100)]
    assert metrics.why_not_ready() == "the weights are not loaded yet"
    assert "pdengine_kv_blocks" not in samples(metrics.exposition())
    metrics.watch_worker(load=lambda: loads.pop(0), num_leases=lambda: 4, why_not_ready=lambda: "leaving")
    found = samples(metrics.exposition())
    assert found["pdengine_kv_blocks"] == 100
    assert found["pdengine_kv_used_blocks"] == 60
    assert found["pdengine_kv_pinned_blocks"] == 30
    assert found["pdengine_kv_quarantined_blocks"] == 7
    assert found["pdengine_kv_leases_granted"] == 4
    assert found["pdengine_requests_running"] == 3
    assert found["pdengine_requests_waiting"] == 2
    assert found["pdengine_step_age_seconds"] == 0.5
    assert samples(metrics.exposition())["pdengine_kv_used_blocks"] == 0
    assert metrics.why_not_ready() == "leaving"


def test_gaps_between_progress_calls_become_a_cumulative_histogram(metrics: WorkerMetrics) -> None:
    name = "pdengine_ucx_progress_gap_seconds"
    gaps = {s: value for s, value in samples(metrics.exposition()).items() if s.startswith(name)}
    assert gaps == {
        f"{name}_bucket{{1e-06}}": 90,
        f"{name}_bucket{{0.001}}": 98,
        f"{name}_bucket{{+Inf}}": 100,
        f"{name}_count": 100,
    }


def test_workers_of_one_process_count_for_themselves(metrics: WorkerMetrics) -> None:
    other = WorkerMetrics()
    other.request_ended("stop")
    assert samples(metrics.exposition())["pdengine_requests_total{stop}"] == 0


def test_nothing_is_lost_when_threads_report_at_once(metrics: WorkerMetrics) -> None:
    def report() -> None:
        for _ in range(500):
            metrics.pull_completed(STATS, post_seconds=0.0)
            metrics.request_ended("stop")

    threads = [threading.Thread(target=report) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = samples(metrics.exposition())
    assert found["pdengine_kv_pull_bytes_count"] == found["pdengine_requests_total{stop}"] == 2000
    assert found["pdengine_kv_pull_gets_total"] == 10_000
