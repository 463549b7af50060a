"""What a worker counts and measures, for Prometheus (https://prometheus.io/docs/practices/naming).

The engine thread and the control thread report what happened. What is a state rather than an event (load,
leases, the gaps of the UCX thread) is read when Prometheus asks. docs/metrics.md describes all metrics.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isinf
from typing import Any, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from pdengine.transport.messages import Load, TransferStats
from pdengine.transport.refusal_metrics import RefusalCollector
from pdengine.transport.sockets import ServerSocket

PullFailure = Literal["transfer", "timeout", "lease_lost"]
RequestOutcome = Literal["prefilled", "stop", "length", "aborted", "failed", "refused"]
ProgressGaps = Sequence[tuple[float, int]]
"""(upper bound in seconds, gaps up to it and above the bound before) in order; the last bound is infinite."""

DECADES = [(10**exponent, 2.5 * 10**exponent, 5 * 10**exponent) for exponent in range(-4, 1)]
SECONDS_BUCKETS = (*(bound for decade in DECADES for bound in decade), 10, 30)  # from 100 us
POST_SECONDS_BUCKETS = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 1)
BYTES_BUCKETS = tuple(2**exponent for exponent in range(16, 36, 2))  # 64 KiB to 16 GiB
TOKENS_BUCKETS = tuple(2**exponent for exponent in range(15))  # 1 to 16384


class WorkerMetrics:
    """The metrics of one worker, in a registry of their own. Every method may be called from any thread.

    A pull brings the KV cache of one prompt here, by one read or, when it began early, by several.
    """

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._why_not_ready: Callable[[], str | None] = lambda: "the weights are not loaded yet"
        self._pull_seconds = Histogram(
            "pdengine_kv_pull_seconds",
            "Time that the reads of a pull took, from posting to the last byte.",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self._post_seconds = Histogram(
            "pdengine_kv_pull_post_seconds",
            "Part of pdengine_kv_pull_seconds that was spent in posting the reads.",
            buckets=POST_SECONDS_BUCKETS,
            registry=registry,
        )
        self._pull_bytes = Histogram(
            "pdengine_kv_pull_bytes", "Bytes that a pull brought.", buckets=BYTES_BUCKETS, registry=registry
        )
        self._gets = self._counter("pdengine_kv_pull_gets_total", "One-sided reads of the pulls.")
        self._blocks = self._counter("pdengine_kv_pulled_blocks_total", "KV blocks of the pulls.")
        self._early_blocks = self._counter(
            "pdengine_kv_early_pulled_blocks_total",
            "Those of pdengine_kv_pulled_blocks_total whose read began before their prompt was complete.",
        )
        self._discarded = self._counter(
            "pdengine_kv_pulls_discarded_total",
            "Pulls whose bytes were thrown away because the lease ran out before they had landed.",
        )
        self._block_seconds = self._counter(
            "pdengine_kv_block_seconds_total", "KV blocks in use times the seconds for which they were."
        )
        self._leases_expired = self._counter(
            "pdengine_kv_leases_expired_total", "Leases granted here that nobody renewed or released in time."
        )
        failures = self._counter("pdengine_kv_pull_failures_total", "Pulls that failed.", "kind")
        self._failures = {kind: failures.labels(kind) for kind in get_args(PullFailure)}
        requests = self._counter("pdengine_requests_total", "Requests that ended at this worker.", "outcome")
        self._requests = {outcome: requests.labels(outcome) for outcome in get_args(RequestOutcome)}
        self._prompt_tokens = self._counter(
            "pdengine_prompt_tokens_total", "Tokens of prompts whose keys and values were computed here."
        )
        self._generation_tokens = self._counter("pdengine_generation_tokens_total", "Tokens written here.")
        self._preemptions = self._counter(
            "pdengine_preemptions_total", "Answers that had to give their KV blocks to others and begin anew."
        )
        self._prefix_queries = self._counter(
            "pdengine_prefix_cache_queries_total", "Tokens that were looked for in the prefix cache."
        )
        self._prefix_hits = self._counter(
            "pdengine_prefix_cache_hits_total",
            "Those of pdengine_prefix_cache_queries_total whose keys and values were there.",
        )
        self._step_seconds = Histogram(
            "pdengine_step_seconds",
            "Duration of an engine step.",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self._step_tokens = Histogram(
            "pdengine_step_tokens",
            "Tokens computed in an engine step.",
            buckets=TOKENS_BUCKETS,
            registry=registry,
        )

    # ----------------------------------------------------------------------------------- events

    def pull_completed(self, stats: TransferStats, *, post_seconds: float) -> None:
        """The KV cache of a prompt is here, and its lease covered it."""
        self._pull_seconds.observe(stats.seconds)
        self._post_seconds.observe(post_seconds)
        self._pull_bytes.observe(stats.num_bytes)
        self._gets.inc(stats.num_gets)
        self._blocks.inc(stats.num_blocks)
        self._early_blocks.inc(stats.num_early_blocks)

    def pull_failed(self, kind: PullFailure) -> None:
        """transfer: it was reported as failed. timeout: its deadline passed. lease_lost: the lease was lost
        while it was under way."""
        self._failures[kind].inc()

    def pull_discarded(self) -> None:
        """A pull has ended later than its lease; it counts neither as completed nor as failed."""
        self._discarded.inc()

    def leases_expired(self, count: int) -> None:
        """So many leases granted by this worker ran out."""
        self._leases_expired.inc(count)

    def blocks_held(self, num_blocks: int, seconds: float) -> None:
        """So many blocks of the pool were in use for so long."""
        self._block_seconds.inc(num_blocks * seconds)

    def request_ended(self, outcome: RequestOutcome) -> None:
        """prefilled: its KV cache is leased to somebody else. stop, length: an answer has ended, with this
        reason. failed: another worker may try. refused: it was never begun."""
        self._requests[outcome].inc()

    def preempted(self, count: int) -> None:
        """So many answers lost their blocks to others that come first."""
        self._preemptions.inc(count)

    def prefix_looked_up(self, num_tokens: int, *, num_cached: int) -> None:
        """The KV cache of the first `num_cached` of so many tokens was found here."""
        self._prefix_queries.inc(num_tokens)
        self._prefix_hits.inc(num_cached)

    def step_completed(
        self, seconds: float, *, num_tokens: int, num_prompt_tokens: int, num_generated: int
    ) -> None:
        """num_tokens: computed in this step. num_prompt_tokens: those of them that belong to prompts.
        num_generated: tokens sampled at its end."""
        self._step_seconds.observe(seconds)
        self._step_tokens.observe(num_tokens)
        self._prompt_tokens.inc(num_prompt_tokens)
        self._generation_tokens.inc(num_generated)

    # ----------------------------------------------------------------------------------- states

    def watch_worker(
        self,
        *,
        load: Callable[[], Load],
        num_leases: Callable[[], int],
        why_not_ready: Callable[[], str | None],
    ) -> None:
        """Let the states of a worker be read whenever somebody asks, on the thread that asks. Call this once.

        num_leases: granted, and neither released nor expired. why_not_ready: one line, or None.
        """
        self._registry.register(_LoadCollector(load, num_leases))
        self._why_not_ready = why_not_ready

    def watch_sockets(self, sockets: Mapping[str, ServerSocket[Any]]) -> None:
        """Export what these refuse, by the names of their ports. Call this once."""
        self._registry.register(RefusalCollector(lambda: sockets))

    def watch_progress_gaps(self, progress_gaps: Callable[[], ProgressGaps]) -> None:
        """Export the histogram that `progress_gaps` returns at each scrape. Call this once."""
        self._registry.register(_GapsCollector(progress_gaps))

    def why_not_ready(self) -> str | None:
        """What keeps the worker from taking requests, in one line."""
        return self._why_not_ready()

    def exposition(self) -> bytes:
        """All metrics, in Prometheus' text format."""
        return generate_latest(_WithoutCreationTimes(self._registry))

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(name, documentation, labels, registry=self._registry)


class _LoadCollector(Collector):
    """Gauges that belong to one moment, because all come from one call of `load`."""

    def __init__(self, load: Callable[[], Load], num_leases: Callable[[], int]) -> None:
        self._load = load
        self._num_leases = num_leases

    def collect(self) -> Iterator[Metric]:
        load = self._load()
        for name, documentation, value in (
            ("pdengine_kv_blocks", "KV blocks of the pool.", load.num_blocks),
            ("pdengine_kv_used_blocks", "KV blocks that are not free.", load.num_blocks - load.free_blocks),
            (
                "pdengine_kv_idle_blocks",
                "Free KV blocks that the prefix cache can still give.",
                load.idle_blocks,
            ),
            (
                "pdengine_kv_pinned_blocks",
                "KV blocks of prompts computed for other workers, running or leased.",
                load.pinned_blocks,
            ),
            (
                "pdengine_kv_quarantined_blocks",
                "KV blocks that a given-up pull or push may still write.",
                load.quarantined_blocks,
            ),
            ("pdengine_kv_leases_granted", "Leases on KV caches of this worker now.", self._num_leases()),
            ("pdengine_requests_running", "Answers that hold KV blocks.", load.running),
            ("pdengine_requests_waiting", "Answers that wait for KV blocks.", load.waiting),
            (
                "pdengine_step_age_seconds",
                "Time since the engine loop last turned, while it has work; otherwise 0.",
                load.step_age,
            ),
        ):
            yield GaugeMetricFamily(name, documentation, value)


class _GapsCollector(Collector):
    """A histogram without a sum, which is not known."""

    def __init__(self, progress_gaps: Callable[[], ProgressGaps]) -> None:
        self._progress_gaps = progress_gaps

    def collect(self) -> Iterator[Metric]:
        name, total = "pdengine_ucx_progress_gap_seconds", 0
        histogram = HistogramMetricFamily(
            name, "Time for which UCX was left alone between two progress calls while its thread was awake."
        )
        for upper_bound, count in self._progress_gaps():
            total += count
            label = "+Inf" if isinf(upper_bound) else str(upper_bound)
            histogram.add_sample(f"{name}_bucket", {"le": label}, total)
        histogram.add_sample(f"{name}_count", {}, total)
        yield histogram


class _WithoutCreationTimes(Collector):
    """The library adds the time of creation to every series, which doubles the counters and helps nobody."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = [s for s in family.samples if not s.name.endswith("_created")]
            yield family
