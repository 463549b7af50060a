"""Where the workers of `pdengine up` serve their metrics."""

from pathlib import Path

import pytest

from pdengine.cli.up import metrics_addresses
from pdengine.engine.worker_config import WorkerConfig
from pdengine.transport.messages import Role


def worker(role: Role, address: str | None) -> WorkerConfig:
    return WorkerConfig(role, Path("model"), "tcp://127.0.0.1:5556", metrics_address=address)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([None, None], ["", ""]),
        (["9100", "9100", "127.0.0.1:9100"], ["127.0.0.1:9100", "127.0.0.1:9101", "127.0.0.1:9102"]),
        (["9100", None, "10.0.0.1:9100"], ["127.0.0.1:9100", "", "10.0.0.1:9100"]),
        (["[::1]:9100", "[::1]:9100"], ["[::1]:9100", "[::1]:9101"]),
        (["0", "0"], ["127.0.0.1:0", "127.0.0.1:0"]),
    ],
)
def test_workers_that_are_told_the_same_take_consecutive_ports(
    given: list[str | None], expected: list[str]
) -> None:
    assert metrics_addresses([worker("decode", address) for address in given]) == expected
