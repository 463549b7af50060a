"""Two hosts on one machine, for tests: skipped where they cannot be made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from pdengine.bench.network_namespaces import NamespacesUnavailable, NetworkNamespace, network_namespaces


@contextmanager
def two_hosts(*, rate: str | None = None) -> Iterator[tuple[NetworkNamespace, NetworkNamespace]]:
    """`network_namespaces`, or the test is skipped with the reason why there are none."""
    with ExitStack() as stack:
        try:
            hosts = stack.enter_context(network_namespaces(rate=rate))
        except NamespacesUnavailable as error:
            pytest.skip(str(error))
        yield hosts
