"""What a router counts, for Prometheus; docs/metrics.md describes all metrics."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pdengine.router.ledger import Ledger
from pdengine.router.registry import Registry
from pdengine.router.request_log import RequestLog
from pdengine.transport.messages import Role
from pdengine.transport.refusal_metrics import RefusalCollector
from pdengine.transport.sockets import ServerSocket


class RouterMetrics:
    """Reads when it is asked what the parts of the router count anyway. On any thread: each read is of one
    number, or of a list that is copied at once."""

    def __init__(
        self,
        ports: Mapping[str, ServerSocket[Any]],
        registry: Registry,
        ledger: Ledger,
        log: RequestLog,
    ) -> None:
        self._workers = registry
        self._metrics = CollectorRegistry()
        self._metrics.register(_RequestCollector(registry, ledger, log))
        self._metrics.register(RefusalCollector(lambda: ports))

    def exposition(self) -> bytes:
        """All metrics, in Prometheus' text format."""
        return generate_latest(self._metrics)

    def why_not_ready(self) -> str | None:
        """What keeps the router from serving requests, in one line."""
        return None if self._workers.roles else "no worker has joined this router"


class _RequestCollector(Collector):
    def __init__(self, registry: Registry, ledger: Ledger, log: RequestLog) -> None:
        self._registry = registry
        self._ledger = ledger
        self._log = log

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "pdengine_router_requests", "Requests that have ended.", labels=("outcome",)
        )
        for outcome, number in self._log.num_ended.items():
            requests.add_metric((outcome,), number)
        yield requests
        yield GaugeMetricFamily(
            "pdengine_router_requests_in_flight", "Requests that have not ended.", len(self._ledger)
        )
        workers = GaugeMetricFamily("pdengine_router_workers", "Workers that have joined.", labels=("role",))
        numbers = Counter(self._registry.roles)
        for role in get_args(Role):
            workers.add_metric((role,), numbers[role])
        yield workers
