"""What `pdengine http` and `pdengine router --http` refuse to start with, and what they call the model."""

import re
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from pdengine.cli.http import address_list
from pdengine.cli.main import main
from pdengine.models.demo.facts import checkpoint_directory
from pdengine.router.http.config import (
    ApiKeysError,
    address_to_connect,
    default_model_name,
    read_api_keys,
)
from pdengine.transport.addresses import InsecureAddress, check_exposure, split_host_port

ROUTER = ["router", "--client-address", "tcp://127.0.0.1:0", "--worker-address", "tcp://127.0.0.1:0"]
KEYS, TAKEN = "{keys}", "{taken}"


@pytest.mark.parametrize("command", [["http"], ROUTER], ids=["http", "router"])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--http", "0.0.0.0:0"], "can be reached from other hosts"),
        (["--http", "[::]:0"], "can be reached from other hosts"),
        (["--http", "0.0.0.0:0", "--api-keys", KEYS], "there is no key in it"),
        (["--http", "127.0.0.1:0", "--api-keys", "/nowhere"], "cannot be read"),
        (["--http", "here"], "must be HOST:PORT or PORT"),
        (["--http", "127.0.0.1:99999"], "must be HOST:PORT or PORT"),
        (["--http", TAKEN], "cannot serve HTTP on 127.0.0.1"),
    ],
)
def test_what_cannot_be_served_is_refused(
    command: list[str], options: list[str], reason: str, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# none yet\n\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        values = {KEYS: str(keys), TAKEN: f"127.0.0.1:{taken.getsockname()[1]}"}
        options = [values.get(option, option) for option in options]
        result = CliRunner().invoke(main, [*command, "--model", str(checkpoint_directory()), *options])
    assert result.exit_code == 1
    [line] = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert reason in line


def test_a_list_of_routers() -> None:
    assert address_list("tcp://a:1, tcp://b:2 ,,") == ("tcp://a:1", "tcp://b:2")
    result = CliRunner().invoke(main, ["http", "--model", str(checkpoint_directory()), "--router", " ,"])
    assert result.exit_code == 2
    assert "there is no address in it" in result.output


def test_exposure() -> None:
    """Loopback is open to all, any other address to those with a key, or to all if that is wanted."""
    for host in ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"):
        check_exposure(f"--bind {host}", host, has_keys=False, insecure=False)
    for host in ("0.0.0.0", "*", "::", "[::]", "10.0.0.1", "some-host"):
        check_exposure(f"--bind {host}", host, has_keys=True, insecure=False)
        check_exposure(f"--bind {host}", host, has_keys=False, insecure=True)
        with pytest.raises(InsecureAddress, match=f"^--bind {re.escape(host)} can .* give --api-keys, or"):
            check_exposure(f"--bind {host}", host, has_keys=False, insecure=False, keys_option="--api-keys")


def test_addresses() -> None:
    assert split_host_port("HTTP", "8000") == ("127.0.0.1", 8000)
    assert split_host_port("HTTP", "[::1]:8000") == ("::1", 8000)
    assert address_to_connect("tcp://0.0.0.0:5555") == "tcp://127.0.0.1:5555"
    assert address_to_connect("tcp://10.0.0.1:5555") == "tcp://10.0.0.1:5555"


def test_a_file_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\nfirst\n\n  second  \n")
    assert read_api_keys(path) == ("first", "second")
    for content, reason in (
        (b"", "no key"),
        (b"a b\n", "line 1 has a space"),
        ("schlüssel".encode(), "not ASCII"),
    ):
        path.write_bytes(content)
        with pytest.raises(ApiKeysError, match=reason) as error:
            read_api_keys(path)
        assert "schl" not in str(error.value)


def test_a_model_from_the_hub_has_its_id_for_a_name(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / "c1899de"
    snapshot.mkdir(parents=True)
    assert default_model_name(snapshot) == "Qwen/Qwen3-0.6B"
    assert default_model_name(tmp_path) == tmp_path.name
