"""What a worker tells the router of its prefix cache: which blocks can be found in it."""

from pdengine.engine.block_pool import BlockPool
from pdengine.transport.messages import PREFIX_TAG_BYTES, CacheUpdate

UPDATE_SECONDS = 0.25  # while the engine is busy, updates are at least so far apart


class CacheNews:
    """Belongs to the engine thread; times are time.monotonic()."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._told_at = float("-inf")
        self._is_new_router = False

    def start_anew(self) -> None:
        """Whoever is told next knows nothing yet: the next update is a whole one, and is due at once."""
        self._is_new_router = True

    def take(self, now: float, *, hurry: bool = False) -> CacheUpdate | None:
        """What has changed since the last update, if there is anything and it is time for it. hurry: nothing
        else will be told for a while."""
        pool = self._pool
        if self._is_new_router:
            update = CacheUpdate(_tags(pool.names()), b"", reset=True)
        elif (pool.added or pool.removed) and (hurry or now - self._told_at >= UPDATE_SECONDS):
            # A name can be in both lists, in either order; what counts is where it is now.
            names = dict.fromkeys([*pool.removed, *pool.added])
            added = [name for name in names if pool.find([name])]
            update = CacheUpdate(_tags(added), _tags([name for name in names if not pool.find([name])]))
        else:
            return None
        pool.added.clear()
        pool.removed.clear()
        self._told_at, self._is_new_router = now, False
        return update


def _tags(names: list[bytes]) -> bytes:
    return b"".join(name[:PREFIX_TAG_BYTES] for name in names)
