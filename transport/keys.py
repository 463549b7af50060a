"""Files of CURVE keys (ZeroMQ RFC 26, https://rfc.zeromq.org/spec/26), one for each process.

A file holds the key pair of its process, the router's public key, and the public keys that the process
admits, by role and name. Keys are in Z85 (RFC 32), 40 characters each. Only its owner may read a file.
"""

import os
import re
import stat
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import zmq
from zmq.utils import z85

KeyRole = Literal["router", "worker", "client", "operator"]
ROLES: tuple[KeyRole, ...] = get_args(KeyRole)

KEY_BYTES = 32
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
FIELDS = ("role", "public-key", "secret-key", "router-key", "admit")
HEADER = """\
# Keys of a pdengine {role}. Whoever can read this file can take its place: keep it to its owner.
# "pdengine keygen DIRECTORY --add" writes the file anew; other changes can be made by hand.
"""


class KeysError(ValueError):
    """A file of keys that cannot be used; the message names it and says why, and shows no key."""


@dataclass(frozen=True)
class PeerKeys:
    """What a socket needs to connect to a server with keys. server_key: the server's public key."""

    public_key: str
    secret_key: str = field(repr=False)
    server_key: str


KeysLike = PeerKeys | Path | str | None
"""What a client may be given: a file of keys, a directory that has it, or its content."""


@dataclass(frozen=True)
class KeyFile:
    """The keys of one process. router_key: the router's public key, empty in the router's own file.
    admitted: the public keys that may connect to this process, by role and name."""

    role: KeyRole
    public_key: str
    secret_key: str = field(repr=False)
    router_key: str = ""
    admitted: Mapping[KeyRole, Mapping[str, str]] = field(default_factory=dict)

    def to_connect(self, server_key: str | None = None) -> PeerKeys:
        """For a connection to the owner of `server_key`, by default to the router.

        The router's own file does for a client in the router's process.
        """
        return PeerKeys(self.public_key, self.secret_key, server_key or self.router_key or self.public_key)

    def admits(self, role: KeyRole, public_key: str) -> bool:
        return public_key in self.admitted.get(role, {}).values()

    def admitting(self, role: KeyRole, name: str, public_key: str) -> "KeyFile":
        """A copy that admits one key more."""
        names = {**self.admitted.get(role, {}), name: public_key}
        return replace(self, admitted={**self.admitted, role: names})


def new_key_file(role: KeyRole, *, router_key: str = "") -> KeyFile:
    """A new key pair, which nobody admits yet."""
    public, secret = zmq.curve_keypair()
    return KeyFile(role, public.decode(), secret.decode(), router_key)


def key_file_path(keys: Path, role: KeyRole) -> Path:
    """`keys` itself, or in a directory the file that `pdengine keygen` made for a process of this role."""
    return keys / f"{role}.toml" if keys.is_dir() else keys


def read_key_file(path: Path, roles: Collection[KeyRole]) -> KeyFile:
    """Read a file that must be of one of `roles`. Raises KeysError."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise KeysError(
                    f"{path}: others than its owner can read or write it (mode {mode:04o}), and it has a "
                    f"secret key in it: chmod 600 {path}"
                )
            content = tomllib.load(file)
    except OSError as error:
        raise KeysError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        # The parser's own words could quote the line, and with it a key.
        raise KeysError(f"{path}: not valid TOML") from error
    keys = _from_toml(path, content)
    if keys.role not in roles:
        raise KeysError(
            f"{path}: these are the keys of a {keys.role}, needed are those of a {_one_of(roles)}"
        )
    return keys


def write_key_file(path: Path, keys: KeyFile, *, overwrite: bool = False) -> None:
    """Write a file that only its owner may read, at once or not at all. As root, one that is there keeps
    its owner. Raises KeysError."""
    beside = path.with_name(f".{path.name}.new")
    try:
        if path.exists() and not overwrite:
            raise KeysError(f"{path}: is there already; keys are not overwritten")
        beside.unlink(missing_ok=True)
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            if path.exists() and os.geteuid() == 0:  # else the process that reads it no longer could
                owner = path.stat()
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
            file.write(_to_toml(keys))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise KeysError(f"{path}: cannot be written ({error.strerror})") from error


def client_keys(keys: KeysLike) -> PeerKeys | None:
    """What a client needs to connect to a router: from its file, or a directory that has one. Raises
    KeysError."""
    if keys is None or isinstance(keys, PeerKeys):
        return keys
    return read_key_file(key_file_path(Path(keys), "client"), ["client", "operator"]).to_connect()


def check_name(name: str) -> None:
    """Raise KeysError unless `name` can be the name of a key and of its file."""
    if NAME.fullmatch(name) is None:
        raise KeysError(f"name {name!r} must be 1 to 64 letters, digits, dots, dashes and underscores")


def _from_toml(path: Path, content: Mapping[str, Any]) -> KeyFile:
    for key in content:
        if key not in FIELDS:
            raise KeysError(f"{path}: {key} is not one of {', '.join(FIELDS)}")
    role = content.get("role")
    if role not in ROLES:
        raise KeysError(f"{path}: role must be one of {', '.join(ROLES)}")
    public, secret = (_key(path, name, content.get(name)) for name in ("public-key", "secret-key"))
    if zmq.curve_public(secret.encode()).decode() != public:
        raise KeysError(f"{path}: public-key and secret-key are not of one pair")
    router_key = "" if role == "router" else _key(path, "router-key", content.get("router-key"))
    return KeyFile(role, public, secret, router_key, _admitted(path, content.get("admit", {})))


def _admitted(path: Path, tables: Any) -> dict[KeyRole, dict[str, str]]:
    if not isinstance(tables, dict):
        raise KeysError(f"{path}: admit must be a table")
    admitted = {}
    for role, names in tables.items():
        if role not in ROLES or not isinstance(names, dict):
            raise KeysError(
                f"{path}: admit.{role} must be a table, and one of admit.worker, .client, .operator"
            )
        admitted[role] = {name: _key(path, f"admit.{role}.{name}", key) for name, key in names.items()}
    return admitted


def _key(path: Path, name: str, value: Any) -> str:
    try:
        if isinstance(value, str) and len(z85.decode(value)) == KEY_BYTES:
            return value
    except (ValueError, KeyError, IndexError):
        pass
    raise KeysError(f"{path}: {name} must be a key, 40 characters in Z85")


def _to_toml(keys: KeyFile) -> str:
    # Nothing in Z85 needs an escape in a string of TOML's.
    lines = [
        HEADER.format(role=keys.role),
        f'role = "{keys.role}"',
        f'public-key = "{keys.public_key}"',
        f'secret-key = "{keys.secret_key}"',
    ]
    if keys.router_key:
        lines += [f'router-key = "{keys.router_key}"']
    for role, names in keys.admitted.items():
        lines += ["", f"[admit.{role}]", *(f'"{name}" = "{key}"' for name, key in names.items())]
    return "\n".join(lines) + "\n"


def _one_of(roles: Collection[KeyRole]) -> str:
    return " or ".join(sorted(roles))
