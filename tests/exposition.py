"""Reads what a process exports, with the parser of Prometheus' own library."""

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families


def families(exposition: bytes) -> dict[str, Metric]:
    """Name, as Prometheus shows it, -> metric."""
    found = list(text_string_to_metric_families(exposition.decode()))
    return {family.name + ("_total" if family.type == "counter" else ""): family for family in found}


def samples(exposition: bytes) -> dict[str, float]:
    """Series, such as `name`, `name{kind}` or `name_bucket{0.5}`, -> value."""
    return {
        sample.name + "".join(f"{{{value}}}" for value in sample.labels.values()): sample.value
        for family in families(exposition).values()
        for sample in family.samples
    }
