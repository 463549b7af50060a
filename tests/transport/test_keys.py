"""Files of keys: who may read them, what is refused in them, and that no message shows a secret."""

import os
from pathlib import Path

import pytest
import zmq

from pdengine.transport.keys import (
    KeyFile,
    KeysError,
    PeerKeys,
    check_name,
    client_keys,
    key_file_path,
    new_key_file,
    read_key_file,
    write_key_file,
)

ROUTER = new_key_file("router").admitting("client", "me", "a" * 40).admitting("worker", "w-1.b", "b" * 40)
CLIENT = new_key_file("client", router_key=ROUTER.public_key)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    for keys in (ROUTER, CLIENT):
        path = tmp_path / f"{keys.role}.toml"
        write_key_file(path, keys)
        assert read_key_file(path, [keys.role]) == keys
        assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir(tmp_path)) == ["client.toml", "router.toml"]


def test_a_file_is_overwritten_only_where_that_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    write_key_file(path, ROUTER)
    with pytest.raises(KeysError, match="is there already"):
        write_key_file(path, CLIENT)
    assert read_key_file(path, ["router"]) == ROUTER
    write_key_file(path, CLIENT, overwrite=True)
    assert read_key_file(path, ["client"]) == CLIENT


def test_root_leaves_a_file_to_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Path, int, int]] = []

    def fchown(descriptor: int, user: int, group: int) -> None:
        given.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")), user, group))

    monkeypatch.setattr(os, "fchown", fchown)
    path = tmp_path / "keys.toml"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    write_key_file(path, ROUTER)
    assert given == []
    write_key_file(path, ROUTER, overwrite=True)
    assert given == [(tmp_path / ".keys.toml.new", path.stat().st_uid, path.stat().st_gid)]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    write_key_file(path, CLIENT, overwrite=True)
    assert len(given) == 1


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602, 0o677])
def test_a_file_that_others_can_read_or_write_is_refused(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    write_key_file(path, CLIENT)
    path.chmod(mode)
    with pytest.raises(KeysError, match=rf"mode {mode:04o}.*chmod 600 {path}"):
        read_key_file(path, ["client"])
    path.chmod(0o400)
    assert read_key_file(path, ["client"]) == CLIENT


SECRET = CLIENT.secret_key
LINES = {
    "role": 'role = "client"',
    "public-key": f'public-key = "{CLIENT.public_key}"',
    "secret-key": f'secret-key = "{SECRET}"',
    "router-key": f'router-key = "{CLIENT.router_key}"',
}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"role": ""}, "role must be one of router, worker, client, operator"),
        ({"role": 'role = "root"'}, "role must be one of"),
        ({"role": "role = [1]"}, "role must be one of"),
        ({"role": 'role = "worker"'}, "the keys of a worker, needed are those of a client or operator"),
        ({"public-key": ""}, "public-key must be a key, 40 characters in Z85"),
        ({"public-key": f'public-key = "{ROUTER.public_key}"'}, "are not of one pair"),
        ({"secret-key": f'secret-key = "{SECRET[:-1]}"'}, "secret-key must be a key"),
        ({"secret-key": f'secret-key = "{SECRET[:-1]}~"'}, "secret-key must be a key"),
        ({"secret-key": f'secret-key = "{SECRET}'}, "not valid TOML"),
        ({"router-key": ""}, "router-key must be a key"),
        ({"more": "secret = 1"}, "secret is not one of role, public-key"),
        ({"more": "admit = 1"}, "admit must be a table"),
        ({"more": "[admit]\nboss = {}"}, "admit.boss must be a table, and one of"),
        ({"more": "[admit.client]\nme = 5"}, "admit.client.me must be a key"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(changes: dict[str, str], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text("\n".join({**LINES, **changes}.values()))
    path.chmod(0o600)
    with pytest.raises(KeysError) as caught:
        read_key_file(path, ["client", "operator"])
    assert reason in str(caught.value)
    assert str(path) in str(caught.value)
    assert SECRET[:-1] not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="cannot be read"):
        read_key_file(tmp_path / "none.toml", ["client"])


def test_a_directory_stands_for_the_file_of_the_role(tmp_path: Path) -> None:
    assert key_file_path(tmp_path, "worker") == tmp_path / "worker.toml"
    assert key_file_path(tmp_path / "mine.toml", "worker") == tmp_path / "mine.toml"
    write_key_file(tmp_path / "client.toml", CLIENT)
    expected = PeerKeys(CLIENT.public_key, SECRET, ROUTER.public_key)
    assert client_keys(tmp_path) == client_keys(str(tmp_path / "client.toml")) == expected
    assert client_keys(None) is None


def test_secrets_are_not_printed() -> None:
    keys: list[KeyFile | PeerKeys] = [CLIENT, CLIENT.to_connect()]
    for each in keys:
        assert SECRET not in repr(each)
        assert CLIENT.public_key in repr(each)


def test_new_keys_are_pairs() -> None:
    assert zmq.curve_public(SECRET.encode()).decode() == CLIENT.public_key
    assert new_key_file("client").secret_key != SECRET


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "a b", "x" * 65, 'a"b', "ä", "-x"])
def test_names(name: str) -> None:
    with pytest.raises(KeysError, match="must be 1 to 64 letters"):
        check_name(name)
