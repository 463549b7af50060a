"""What a worker publishes so that UCX of another process can reach it, whole and with its namespaces."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec

from pdengine.transport.transfer import TransferError

CHECKSUM_BYTES = 8
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class UcxAddress(msgspec.Struct, frozen=True, array_like=True):
    """Two addresses of one ucp_worker.

    everything: over all transports; network: over network devices only. namespaces: of its process, see
    `shared_memory_namespaces`.
    """

    everything: bytes
    network: bytes
    namespaces: str

    def reachable_from_here(self) -> bytes:
        """The one that this process can use: UCX's shared memory needs the same namespaces on both sides."""
        return self.everything if self.namespaces == shared_memory_namespaces() else self.network


def shared_memory_namespaces() -> str:
    """What two processes must have in common to use UCX's shared memory: machine, PID and network namespace.

    UCX looks at the machine and the IPC namespace only. But its shared memory wakes a sleeping peer through
    an abstract Unix socket, which belongs to a network namespace, and takes one for dead whose process id it
    does not find: between containers that share just the IPC namespace it connects, and nothing arrives.
    """
    namespaces = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net")]
    return " ".join([BOOT_ID.read_text().strip(), *namespaces])


def pack_address(address: UcxAddress) -> bytes:
    return seal(msgspec.msgpack.encode(address))


def unpack_address(packed: bytes) -> UcxAddress:
    """Raises TransferError if it is not what `pack_address` gave."""
    whole = unseal(packed, "worker address")
    try:
        return msgspec.msgpack.decode(whole, type=UcxAddress)
    except msgspec.DecodeError as error:
        raise TransferError(f"the peer's worker address is not valid: {error}") from None


def seal(packed: bytes) -> bytes:
    """What UCX packed, with a checksum before it, because UCX aborts the process on a damaged address."""
    return _checksum(packed) + packed


def unseal(sealed: bytes, name: str) -> bytes:
    """The bytes that were sealed. Raises TransferError, with `name` in it, if they are not whole."""
    if not sealed:
        raise TransferError(f"the peer's {name} is empty")
    packed = sealed[CHECKSUM_BYTES:]
    if _checksum(packed) != sealed[:CHECKSUM_BYTES]:
        raise TransferError(f"the peer's {name} is damaged: its checksum does not match")
    return packed


def _checksum(packed: bytes) -> bytes:
    return hashlib.blake2b(packed, digest_size=CHECKSUM_BYTES, person=b"pdengine-ucx").digest()
