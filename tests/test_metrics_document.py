"""docs/metrics.md lists all metrics of workers and routers, and no others."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from exposition import families, samples

from pdengine.engine.metrics import WorkerMetrics
from pdengine.router.metrics import RouterMetrics
from pdengine.transport.messages import Load

DOCUMENT = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()


@pytest.fixture(scope="module")
def exposition() -> bytes:
    """Of a worker and a router, one after the other."""
    port = SimpleNamespace(failed_handshakes={"ended": 1}, refused_messages={"revoked": 1})
    worker = WorkerMetrics()
    worker.watch_worker(load=lambda: Load(4, 4), num_leases=lambda: 4, why_not_ready=lambda: None)
    worker.watch_progress_gaps(lambda: [(1e-6, 90)])
    registry, log = SimpleNamespace(roles=["decode"]), SimpleNamespace(num_ended={"finished": 1})
    router = RouterMetrics(cast(Any, {"workers": port}), cast(Any, registry), cast(Any, []), cast(Any, log))
    return worker.exposition().removesuffix(b"# EOF\n") + router.exposition()


def test_every_metric_is_documented_with_its_type_and_its_labels(exposition: bytes) -> None:
    documented = dict(re.findall(r"^\| `(pdengine_\w+)` \| (\w+) \|", DOCUMENT, re.MULTILINE))
    exported = families(exposition)
    assert documented == {name: family.type for name, family in exported.items()}
    for name, family in exported.items():
        labels = {v for s in family.samples for k, v in s.labels.items() if k != "le"}
        [row] = re.findall(rf"^\| `{name}` .*$", DOCUMENT, re.MULTILINE)
        assert labels <= set(re.findall(r"`(\w+)`", row)), name


def test_queries_in_the_document_use_series_that_exist(exposition: bytes) -> None:
    exported = {series.partition("{")[0] for series in samples(exposition)} | set(families(exposition))
    for line in DOCUMENT.splitlines():
        assert set(re.findall(r"pdengine_\w+", line)) <= exported, line
