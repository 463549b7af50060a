"""The router's two server sockets, and who may connect to them."""

import asyncio
from collections.abc import Callable
from typing import Any

import zmq.asyncio

from pdengine.router.config import RouterConfig
from pdengine.transport.addresses import check_exposure, split_tcp_address
from pdengine.transport.doorkeeper import Doorkeeper
from pdengine.transport.handshakes import REFUSED, watch_handshakes
from pdengine.transport.keys import KeyRole, PeerKeys, key_file_path, read_key_file
from pdengine.transport.messages import ClientToRouter, WorkerToRouter
from pdengine.transport.sockets import MAX_REQUEST_BYTES, ServerKeys, ServerSocket

CLIENTS, WORKERS = "clients", "workers"
ADMITTED: dict[str, tuple[KeyRole, ...]] = {CLIENTS: ("client", "operator"), WORKERS: ("worker",)}
REQUEST_QUEUE = 8  # messages of one client that wait in memory to be read, each up to MAX_REQUEST_BYTES
ANSWER_QUEUE = 1_000  # messages to one client that does not read, each what one engine step wrote for it


class Ports:
    """Bound when made; with keys nobody gets in until `watch` runs.

    client_keys: for a client in this process; None in a cluster without keys.
    Raises AddressError or KeysError.
    """

    def __init__(self, config: RouterConfig) -> None:
        for option, address in (
            ("--client-address", config.client_address),
            ("--worker-address", config.worker_address),
        ):
            host, _ = split_tcp_address(address)
            has_keys = config.keys is not None
            check_exposure(f"{option} {address}", host, has_keys=has_keys, insecure=config.insecure)
        self._context = zmq.asyncio.Context()
        self._doorkeeper: Doorkeeper | None = None
        self.client_keys: PeerKeys | None = None
        try:
            if config.keys is not None:
                path = key_file_path(config.keys, "router")
                keys = read_key_file(path, ["router"])
                self.client_keys = keys.to_connect()
                self._doorkeeper = Doorkeeper(self._context, path, keys, ADMITTED)
            self.clients = ServerSocket[ClientToRouter](
                self._context,
                ClientToRouter,
                keys=self._server_keys(CLIENTS),
                max_message_bytes=MAX_REQUEST_BYTES,
                receive_queue=REQUEST_QUEUE,
                send_queue=ANSWER_QUEUE,
            )
            self.workers = ServerSocket[WorkerToRouter](
                self._context,
                WorkerToRouter,
                keys=self._server_keys(WORKERS),
            )
            self.by_name: dict[str, ServerSocket[Any]] = {CLIENTS: self.clients, WORKERS: self.workers}
            self.client_address = self.clients.bind(config.client_address)
            self.worker_address = self.workers.bind(config.worker_address)
        except BaseException:
            self._context.destroy(linger=0)
            raise

    async def watch(self, on_change: Callable[[], None]) -> None:
        """Let in who has a key, and log how many were refused, until cancelled. on_change: other keys are
        admitted than before."""
        async with asyncio.TaskGroup() as group:
            group.create_task(watch_handshakes(lambda: self.by_name, REFUSED))
            if self._doorkeeper is not None:
                group.create_task(self._doorkeeper.run(on_change))

    def _server_keys(self, port: str) -> ServerKeys | None:
        return self._doorkeeper.server_keys(port) if self._doorkeeper is not None else None

    def close(self) -> None:
        self.clients.close()
        self.workers.close()
        if self._doorkeeper is not None:
            self._doorkeeper.close()
        self._context.destroy(linger=None)
