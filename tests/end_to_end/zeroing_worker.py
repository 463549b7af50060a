"""`pdengine` with a fault: the first block of every pull is zeroed after it has landed."""

from pdengine.cli.main import main
from pdengine.engine.pulls import PullInFlight, Pulls
from pdengine.engine.runner import Runner
from pdengine.transport.transfer import PullCompleted, PullFailed

finish = Pulls.finish
make_runner = Runner.__init__
pools = []


def remember_pool(self: Runner, *arguments: object) -> None:
    make_runner(self, *arguments)  # type: ignore[arg-type]
    pools.append(self._kv_cache.pool)


def finish_and_zero(self: Pulls, event: PullCompleted | PullFailed) -> PullInFlight:
    pull = finish(self, event)
    assert pull.sequence is not None
    pools[0][pull.sequence.block_ids[0]] = 0
    return pull


Runner.__init__ = remember_pool  # type: ignore[method-assign]
Pulls.finish = finish_and_zero  # type: ignore[method-assign]
main()
