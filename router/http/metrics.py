"""What the HTTP server counts."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

TTFT_BUCKETS = (
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
)
LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5)


class LatencyHistogram(Collector):
    """A histogram of seconds that one thread observes and reads.

    The library's own locks for each value, which costs as much as writing a token to a socket's buffer.
    """

    def __init__(
        self, name: str, documentation: str, *, buckets: Sequence[float], registry: CollectorRegistry
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = list(buckets)
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterable[HistogramMetricFamily]:
        bounds = [*(repr(float(bound)) for bound in self._bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        return [HistogramMetricFamily(self._name, self._documentation, buckets, self._sum)]


class HttpMetrics:
    """Latencies are as the HTTP server sees them: from a request's arrival, and between arrivals of tokens.

    Tokens that arrive together have an interval of 0 between them.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "pdengine_http_requests",
            "Answered HTTP requests.",
            ["endpoint", "status"],
            registry=self._registry,
        )
        self.in_flight = Gauge(
            "pdengine_http_requests_in_flight",
            "HTTP requests that are being answered.",
            registry=self._registry,
        )
        self.time_to_first_token = LatencyHistogram(
            "pdengine_time_to_first_token_seconds",
            "From the arrival of a request to the first token of a prompt.",
            buckets=TTFT_BUCKETS,
            registry=self._registry,
        )
        self.inter_token_latency = LatencyHistogram(
            "pdengine_inter_token_latency_seconds",
            "Between two tokens of an answer.",
            buckets=LATENCY_BUCKETS,
            registry=self._registry,
        )

    def exposition(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
