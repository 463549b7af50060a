"""Addresses that processes listen on and connect to, and which of them other hosts can reach."""

import ipaddress


class AddressError(ValueError):
    """An address that cannot be used; the message says which and why."""


class InsecureAddress(AddressError):
    """Other hosts could connect, and no key is asked for."""


def split_tcp_address(address: str) -> tuple[str, int]:
    """`tcp://HOST:PORT` -> (HOST, PORT). Port 0 stands for any free one. Raises AddressError."""
    host, separator, port = address.removeprefix("tcp://").rpartition(":")
    if not address.startswith("tcp://") or not separator or not host:
        raise AddressError(f"address {address!r} must be tcp://HOST:PORT")
    if not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise AddressError(f"address {address!r}: port {port!r} must be a number from 0 to 65535")
    return host, int(port)


def check_address(address: str) -> None:
    """Raise AddressError unless `address` is one that can be connected to."""
    _, port = split_tcp_address(address)
    if port == 0:
        raise AddressError(f"address {address!r} needs a port to connect to")


def split_host_port(name: str, address: str) -> tuple[str, int]:
    """`HOST:PORT`, or `PORT` on loopback -> (HOST, PORT). Port 0 is any free one.

    name: of the address, for the message. Raises AddressError.
    """
    host, separator, port = address.rpartition(":")
    try:
        host, number = split_tcp_address(f"tcp://{host if separator else '127.0.0.1'}:{port}")
    except AddressError as error:
        reason = "must be HOST:PORT or PORT, and the port a number from 0 to 65535"
        raise AddressError(f"{name} {address!r} {reason}") from error
    return host.removeprefix("[").removesuffix("]"), number


def join_host_port(host: str, port: int) -> str:
    """HOST:PORT, as `split_host_port` takes it and as it stands in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to `host`; a name that is not known to be such is not."""
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(
    address: str,
    host: str,
    *,
    has_keys: bool,
    insecure: bool,
    keys_option: str = "--keys (pdengine keygen makes them)",
) -> None:
    """Raise InsecureAddress if other hosts could connect to `host` and no key is asked for.

    address: as it was given, after the option that gave it. keys_option: what would ask for keys. Both are
    for the message.
    """
    if has_keys or insecure or is_loopback(host):
        return
    raise InsecureAddress(
        f"{address} can be reached from other hosts, and no key is asked for: give {keys_option}, or "
        f"--insecure (PDENGINE_INSECURE=1) if everyone on the network is trusted"
    )
