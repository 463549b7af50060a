"""The UCX settings that pdengine needs, and the network devices behind an address."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

import cffi

from pdengine.transport.transfer import TransferError
from pdengine.transport.ucx_library import INFINIBAND_DEVICES, UcxLibrary, has_rdma

# The environment variables of a setting, its name for ucp_config_modify, and its name there before UCX 1.17,
# which knew no transport prefixes.
# Shared memory takes part in error handling only if told so; with UCX's default segments of 8 KiB an emulated
# read over TCP reaches a fifth of its speed.
_TRANSPORT_SETTINGS = (
    (("UCX_SYSV_ERROR_HANDLING", "UCX_MM_ERROR_HANDLING"), "SYSV_ERROR_HANDLING", "MM_ERROR_HANDLING", "y"),
    (("UCX_POSIX_ERROR_HANDLING", "UCX_MM_ERROR_HANDLING"), "POSIX_ERROR_HANDLING", "MM_ERROR_HANDLING", "y"),
    (("UCX_TCP_TX_SEG_SIZE",), "TCP_TX_SEG_SIZE", "TX_SEG_SIZE", "64k"),
    (("UCX_TCP_RX_SEG_SIZE",), "TCP_RX_SEG_SIZE", "RX_SEG_SIZE", "64k"),
)
# Without NVLink UCX would not read by CUDA IPC but emulate it, even between processes on one GPU.
_CUDA_SETTINGS = (
    (("UCX_CUDA_IPC_ENABLE_GET_ZCOPY",), "CUDA_IPC_ENABLE_GET_ZCOPY", "ENABLE_GET_ZCOPY", "on"),
)
_FIRST_VERSION_WITH_PREFIXES = (1, 17)

_INTERFACE_DECLARATIONS = """
struct ifaddrs {
    struct ifaddrs *next;
    char *name;
    unsigned flags;
    unsigned char *address;
    unsigned char *netmask;
    unsigned char *broadcast;
    void *data;
};
int getifaddrs(struct ifaddrs **list);
void freeifaddrs(struct ifaddrs *list);
"""


def ucx_settings(
    library: UcxLibrary, advertise_host: str, environ: Mapping[str, str], *, cuda: bool = False
) -> dict[str, str]:
    """The names and values for ucp_config_modify; a variable that the user has set is left alone.

    cuda: the pool is on a GPU, and the library comes with the CUDA module, which knows its settings.
    Raises TransferError if no network interface owns `advertise_host`.
    """
    prefixed = library.version >= _FIRST_VERSION_WITH_PREFIXES
    settings = {
        (name if prefixed else old_name): value
        for variables, name, old_name, value in _TRANSPORT_SETTINGS + (_CUDA_SETTINGS if cuda else ())
        if not any(variable in environ for variable in variables)
    }
    if "UCX_NET_DEVICES" not in environ:
        interface = interface_of(advertise_host)
        devices = [interface]
        if has_rdma(library.path):
            devices += rdma_ports(interface)
        settings["NET_DEVICES"] = ",".join(devices)
    return settings


def interface_of(host: str) -> str:
    """The network interface that owns the address of `host`. Raises TransferError if there is none."""
    try:
        resolved = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise TransferError(f"the advertised host {host!r} cannot be resolved: {error}") from None
    wanted = {(family, socket.inet_pton(family, str(address[0]))) for family, _, _, _, address in resolved}
    for interface, family, packed in interface_addresses():
        if (family, packed) in wanted:
            return interface
    raise TransferError(f"no network interface of this machine owns the advertised host {host!r}")


def rdma_ports(interface: str, devices: Path = INFINIBAND_DEVICES) -> list[str]:
    """The RDMA ports ("mlx5_0:1") whose network device is `interface`, from sysfs."""
    return [
        f"{device.name}:{port.name}"
        for device in sorted(devices.glob("*"))
        if (device / "device" / "net" / interface).exists()
        for port in sorted((device / "ports").glob("*"))
    ]


def interface_addresses() -> list[tuple[str, socket.AddressFamily, bytes]]:
    """(interface, family, packed address) of every address of this machine, by getifaddrs(3)."""
    ffi = cffi.FFI()
    ffi.cdef(_INTERFACE_DECLARATIONS)
    libc = ffi.dlopen(None)
    head = ffi.new("struct ifaddrs **")
    if libc.getifaddrs(head) != 0:
        raise TransferError("the addresses of this machine cannot be listed: getifaddrs failed")
    addresses = []
    entry = head[0]
    while entry:
        # sockaddr: the family in the first two bytes; the address at byte 4 (IPv4) or 8 (IPv6)
        if entry.address:
            family = int(ffi.cast("uint16_t *", entry.address)[0])
            name = ffi.string(entry.name).decode()
            if family == socket.AF_INET:
                addresses.append((name, socket.AF_INET, bytes(ffi.buffer(entry.address + 4, 4))))
            elif family == socket.AF_INET6:
                addresses.append((name, socket.AF_INET6, bytes(ffi.buffer(entry.address + 8, 16))))
        entry = entry.next
    libc.freeifaddrs(head[0])
    return addresses
