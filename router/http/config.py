"""What an HTTP server is told when it starts."""

from dataclasses import dataclass
from pathlib import Path

from pdengine.transport.addresses import split_tcp_address
from pdengine.transport.keys import PeerKeys


class ApiKeysError(ValueError):
    """The file of API keys cannot be used; the message says why, and shows no key."""


@dataclass(frozen=True)
class HttpConfig:
    """address: HOST:PORT to listen on; port 0 is any free one. router_addresses: where
    routers take clients; each request goes to one of them. model_directory: their checkpoint.
    served_model_name: what requests call it. api_keys: any of them opens all endpoints but /live and /ready,
    which need none; empty: none is needed anywhere.

    max_body_bytes, max_prompts: of one request. max_arriving_bytes: in memory of all large bodies that are
    on their way; more get 503. max_in_flight: answers, n for each prompt, of all requests that are served at
    once; more get 429. head_seconds, body_seconds: for a request to arrive. rest_seconds: for what is left of
    a body when its request has been answered without it; then the connection is closed. write_seconds: a
    client that reads nothing for so long is disconnected. drain_seconds: what `close` leaves to requests in
    flight. connect_seconds: for the router to answer. router_keys: for a router that asks for keys.
    """

    address: str
    router_addresses: tuple[str, ...]
    model_directory: Path
    served_model_name: str
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 16 * 2**20
    max_arriving_bytes: int = 512 * 2**20
    max_prompts: int = 128
    max_in_flight: int = 1024
    head_seconds: float = 10.0
    body_seconds: float = 60.0
    rest_seconds: float = 5.0
    write_seconds: float = 60.0
    drain_seconds: float = 30.0
    connect_seconds: float = 5.0
    router_keys: PeerKeys | None = None


def read_api_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file, one per line; empty lines and those that begin with # are none.

    Raises ApiKeysError. A file without a key is an error, not an open door.
    """
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise ApiKeysError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ApiKeysError(
            f"{path}: byte {error.start} is not ASCII; a key is sent in an HTTP header"
        ) from error
    keys = []
    for number, line in enumerate(lines, 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if any(not character.isprintable() or character == " " for character in key):
            raise ApiKeysError(f"{path}: the key in line {number} has a space or a control character in it")
        keys.append(key)
    if not keys:
        raise ApiKeysError(f"{path}: there is no key in it")
    return tuple(keys)


def default_model_name(model_directory: Path) -> str:
    """The directory's name; of a model from the hub its id, since its directory is named by a commit."""
    directory = model_directory.resolve()
    repository = directory.parent.parent.name
    if directory.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return directory.name


def address_to_connect(address: str) -> str:
    """Where a router that is bound to `address` is reached from its own machine."""
    host, port = split_tcp_address(address)
    local = {"0.0.0.0": "127.0.0.1", "*": "127.0.0.1", "[::]": "[::1]"}
    return f"tcp://{local.get(host, host)}:{port}"
