"""`pdengine keygen`, and what is refused without keys."""

import socket
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pdengine.cli.main import main
from pdengine.models.demo.facts import checkpoint_directory
from pdengine.transport.keys import KeyFile, KeyRole, read_key_file

ROLES: tuple[KeyRole, ...] = ("router", "worker", "client", "operator")
MODEL = ["--model", str(checkpoint_directory())]
NOBODY = "tcp://127.0.0.1:9"


def keygen(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["keygen", *map(str, arguments)])


def read_all(directory: Path) -> dict[str, KeyFile]:
    return {path.stem: read_key_file(path, ROLES) for path in directory.glob("*.toml")}


def test_a_cluster_gets_four_files(tmp_path: Path) -> None:
    directory = tmp_path / "keys"
    result = keygen(directory)
    assert result.exit_code == 0
    files = read_all(directory)
    router, worker = files["router"], files["worker"]
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {name: keys.role for name, keys in files.items()} == {role: role for role in ROLES}
    for role in ROLES[1:]:
        assert files[role].router_key == router.public_key
        assert router.admitted[role] == {role: files[role].public_key}
        assert f"{role}.toml: keys of a {role}" in result.output
    assert worker.admitted == {"worker": {"worker": worker.public_key}}
    assert files["client"].admitted == {}
    secrets = [keys.secret_key for keys in files.values()]
    assert len(set(secrets)) == len(ROLES)
    assert not any(secret in result.output for secret in secrets)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "operator.toml").touch()
    result = keygen(tmp_path)
    assert result.exit_code == 1
    assert "operator.toml: is there already" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["operator.toml"]


@pytest.mark.parametrize("role", ["client", "operator"])
def test_one_more_client(role: KeyRole, tmp_path: Path) -> None:
    keygen(tmp_path)
    before = read_all(tmp_path)
    result = keygen(tmp_path, "--add", role, "laptop")
    assert result.exit_code == 0, result.output
    after = read_all(tmp_path)
    laptop = after.pop("laptop")
    assert (laptop.role, laptop.router_key) == (role, before["router"].public_key)
    expected = before["router"].admitting(role, "laptop", laptop.public_key)
    assert after == {**before, "router": expected}


def test_one_more_worker_knows_the_others_and_they_know_it(tmp_path: Path) -> None:
    keygen(tmp_path)
    for name in ("second", "third"):
        assert keygen(tmp_path, "--add", "worker", name).exit_code == 0
    files = read_all(tmp_path)
    names = ("worker", "second", "third")
    workers = {name: files[name].public_key for name in names}
    for name in ("router", *names):
        assert files[name].admitted["worker"] == workers


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["client", "a/b"], "must be 1 to 64 letters"),
        (["client", "client"], "a client of the name client is admitted already"),
        (["client", "operator"], "operator.toml: is there already"),
        (["router", "second"], "'router' is not one of"),
    ],
)
def test_what_cannot_be_added(arguments: list[str], reason: str, tmp_path: Path) -> None:
    keygen(tmp_path)
    before = read_all(tmp_path)
    result = keygen(tmp_path, "--add", *arguments)
    assert result.exit_code != 0
    assert reason in result.output
    assert read_all(tmp_path) == before


def test_nothing_can_be_added_where_there_are_no_keys(tmp_path: Path) -> None:
    result = keygen(tmp_path, "--add", "client", "me")
    assert result.exit_code == 1
    assert "router.toml: cannot be read" in result.output


ROUTER = ["router", "--client-address", "tcp://127.0.0.1:0", "--worker-address", "tcp://127.0.0.1:0"]
WORKER = ["decode", "--router", NOBODY, "--kv-memory", "1MiB"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([*ROUTER, "--client-address", "tcp://0.0.0.0:0"], ["--client-address tcp://0.0.0.0:0", "--keys"]),
        ([*ROUTER, "--worker-address", "tcp://[::]:0"], ["--worker-address tcp://[::]:0", "--keys"]),
        ([*ROUTER, "--worker-address", "tcp://*:0"], ["--worker-address tcp://*:0", "--insecure"]),
        ([*ROUTER, "--keys", "{keys}/client.toml"], ["keys of a client", "a router"]),
        ([*ROUTER, "--keys", "{keys}/none.toml"], ["none.toml", "cannot be read"]),
        ([*WORKER, "--bind", "tcp://0.0.0.0:0"], ["--bind tcp://0.0.0.0:0", "--keys"]),
        ([*WORKER, "--advertise", "tcp://10.0.0.2:0"], ["--advertise tcp://10.0.0.2:0", "--insecure"]),
        ([*WORKER, "--keys", "{keys}/router.toml"], ["keys of a router", "a worker"]),
        (
            ["http", "--http", "127.0.0.1:0", "--keys", "{keys}/worker.toml"],
            ["keys of a worker", "client or"],
        ),
        (["up", "--keys", "{keys}/router.toml"], ["is no directory"]),
    ],
)
def test_what_is_refused(command: list[str], words: list[str], tmp_path: Path) -> None:
    keygen(tmp_path)
    arguments = [argument.replace("{keys}", str(tmp_path)) for argument in command]
    result = CliRunner().invoke(main, [*arguments, *MODEL])
    assert result.exit_code == 1, result.output
    [line] = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert all(word in line for word in words), line


@pytest.mark.parametrize("options", [["--insecure"], ["--keys", "{keys}"]])
def test_what_is_let_through(options: list[str], tmp_path: Path) -> None:
    """The next thing that is wrong is reported: the port is taken."""
    keygen(tmp_path)
    with socket.create_server(("0.0.0.0", 0)) as taken:
        address = f"tcp://0.0.0.0:{taken.getsockname()[1]}"
        arguments = [option.replace("{keys}", str(tmp_path)) for option in options]
        result = CliRunner().invoke(main, [*ROUTER, "--client-address", address, *arguments, *MODEL])
    assert f"cannot listen on {address}" in result.output
