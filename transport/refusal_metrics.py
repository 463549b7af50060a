"""Connections and messages that server sockets have refused, for Prometheus."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from pdengine.transport.sockets import ServerSocket


class RefusalCollector(Collector):
    """look: the sockets by the names of their ports. It is called on the thread that asks; the numbers of
    connections are those of the last look of `watch_handshakes`."""

    def __init__(self, look: Callable[[], Mapping[str, ServerSocket[Any]]]) -> None:
        self._look = look

    def collect(self) -> Iterator[Metric]:
        sockets = self._look()
        connections = CounterMetricFamily(
            "pdengine_refused_connections",
            "Connections that ended in the handshake.",
            labels=("port", "reason"),
        )
        messages = CounterMetricFamily(
            "pdengine_refused_messages", "Messages that were dropped.", labels=("port", "reason")
        )
        for port, socket in sockets.items():
            for failure, number in socket.failed_handshakes.items():
                connections.add_metric((port, failure), number)
            for refusal, number in socket.refused_messages.items():
                messages.add_metric((port, refusal), number)
        yield connections
        yield messages
