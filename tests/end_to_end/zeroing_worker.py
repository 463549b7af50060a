"""`pdengine` with a fault: the first block of every pull is zeroed after it has landed."""

from typing import Any

from torch import Tensor

from pdengine.cli.main import main
from pdengine.engine.pulls import Pull, Pulls
from pdengine.engine.runner import Runner

remove_pull = Pulls.remove
make_runner = Runner.__init__
pools: list[Tensor] = []


def remember_pool(self: Runner, *arguments: Any) -> None:
    make_runner(self, *arguments)
    pools.append(self._kv_cache.pool)


def remove_and_zero(self: Pulls, pull: Pull) -> None:
    remove_pull(self, pull)
    pools[0][pull.block_ids[0]] = 0


Runner.__init__ = remember_pool  # type: ignore[method-assign, assignment]
Pulls.remove = remove_and_zero  # type: ignore[method-assign]
main()
