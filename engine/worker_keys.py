"""A worker's keys: it proves itself with them to the router and to other workers, and lets these in."""

from collections.abc import Callable
from pathlib import Path

import zmq.asyncio

from pdengine.transport.doorkeeper import Doorkeeper
from pdengine.transport.keys import KeysError, PeerKeys, key_file_path, read_key_file
from pdengine.transport.messages import PeerDescriptor
from pdengine.transport.sockets import ServerKeys

WORKERS = "workers"


class WorkerKeys:
    """Other workers get in while `run` runs. keys: the worker's file, or a directory that has it. Raises
    KeysError."""

    def __init__(self, context: zmq.asyncio.Context, keys: Path) -> None:
        path = key_file_path(keys, "worker")
        self._keys = read_key_file(path, ["worker"])
        self._doorkeeper = Doorkeeper(context, path, self._keys, {WORKERS: ("worker",)})
        self.public_key = self._keys.public_key

    def to_serve(self) -> ServerKeys:
        """For the socket that other workers connect to."""
        return self._doorkeeper.server_keys(WORKERS)

    def to_router(self) -> PeerKeys:
        return self._keys.to_connect()

    def to_peer(self, peer: PeerDescriptor) -> PeerKeys:
        """Raises KeysError for a worker that would not be let in here: the router cannot vouch for it."""
        if not self._doorkeeper.admits(WORKERS, peer.public_key):
            raise KeysError(
                f"its key {peer.public_key or '(none)'} is not one of a worker that is admitted here"
            )
        return self._keys.to_connect(peer.public_key)

    async def run(self, on_change: Callable[[], None]) -> None:
        """Let other workers in until cancelled. on_change: other keys are admitted than before."""
        await self._doorkeeper.run(on_change)

    def close(self) -> None:
        self._doorkeeper.close()
