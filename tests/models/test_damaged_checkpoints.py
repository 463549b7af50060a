"""Damaged checkpoints, kind by kind: each is refused with one sentence, before memory is spent on it."""

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoint_damage import (
    HEAD,
    IN_SHARDS,
    IN_SINGLE_FILE,
    NORM,
    WEIGHTS,
    Damage,
    edit_json,
    edit_tensors,
    header_bytes,
    replace_bytes,
)
from checkpoints import write_checkpoint
from fork_server import fork_server
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdengine.models.checkpoint import CheckpointError
from pdengine.models.config import load_config
from pdengine.models.decoder import Decoder
from pdengine.models.fingerprint import model_fingerprint, weights_fingerprint
from pdengine.models.tokenizer import Tokenizer
from pdengine.models.weights import load_decoder

MEMORY_TO_SPARE = 2**30  # bytes that a refusal may take beyond what the process has
NOBODY = 65534
PROCESS_SECONDS = 120.0


def load(directory: Path, progress: Callable[[int, int], None] | None = None) -> Decoder:
    config = load_config(directory)
    return load_decoder(directory, config, dtype=torch.float32, device=torch.device("cpu"), progress=progress)


def start_router(directory: Path) -> None:
    """What a router reads, in its order."""
    load_config(directory)
    Tokenizer.load(directory)
    model_fingerprint(directory)


def start_worker(directory: Path) -> None:
    """What a worker reads, in its order."""
    load_config(directory)
    model_fingerprint(directory)
    weights_fingerprint(directory)
    load(directory)


@contextmanager
def little_memory() -> Iterator[None]:
    """Allocations beyond MEMORY_TO_SPARE fail inside the block, by something else than CheckpointError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_TO_SPARE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def assert_one_sentence(message: str, directory: Path) -> None:
    assert message.startswith(str(directory))
    reason = message.removeprefix(str(directory))
    assert message.isprintable(), "one line"
    assert re.search(r"\. [A-Z]", reason) is None, "one sentence"
    assert len(reason) < 400
    for internal in ("Error", "Errno", "Traceback", "serde", "object at 0x", "<class", "set_int_max"):
        assert internal not in reason


@pytest.fixture
def single(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """A good checkpoint of one file."""
    return shutil.copytree(checkpoint_of("llama-gqa"), tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def good_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards")
    write_checkpoint("llama-gqa", directory, max_shard_size="100KB")
    return directory


@pytest.fixture
def sharded(good_shards: Path, tmp_path: Path) -> Path:
    """A good checkpoint of several files and their index."""
    return shutil.copytree(good_shards, tmp_path / "checkpoint")


@pytest.mark.parametrize(("damage", "sentence"), IN_SINGLE_FILE.values(), ids=IN_SINGLE_FILE.keys())
def test_damage_in_a_checkpoint_of_one_file(damage: Damage, sentence: str, single: Path) -> None:
    damage(single)
    with little_memory(), pytest.raises(CheckpointError, match=sentence) as raised:
        start_worker(single)
    assert_one_sentence(str(raised.value), single)


@pytest.mark.parametrize(("damage", "sentence"), IN_SHARDS.values(), ids=IN_SHARDS.keys())
def test_damage_in_a_checkpoint_of_shards(damage: Damage, sentence: str, sharded: Path) -> None:
    damage(sharded)
    for read in (start_worker, load):
        with little_memory(), pytest.raises(CheckpointError, match=sentence) as raised:
            read(sharded)
        assert_one_sentence(str(raised.value), sharded)


ROUTER_READS = ("config", "tokenizer", "vocabulary", "added token", "eps", "architecture", "heads", "Unigram")
OF_THE_ROUTER = [kind for kind in IN_SINGLE_FILE if any(word in kind for word in ROUTER_READS)]


@pytest.mark.parametrize("kind", [kind for kind in OF_THE_ROUTER if kind != "other vocabulary"])
def test_the_router_refuses_what_it_reads(kind: str, single: Path) -> None:
    damage, sentence = IN_SINGLE_FILE[kind]
    damage(single)
    with little_memory(), pytest.raises(CheckpointError, match=sentence) as raised:
        start_router(single)
    assert_one_sentence(str(raised.value), single)


def test_the_undamaged_are_taken(single: Path, good_shards: Path) -> None:
    for directory in (single, good_shards):
        with little_memory():
            start_router(directory)
            start_worker(directory)


def test_no_tensor_may_be_named_twice(single: Path) -> None:
    def repeat(content: bytes) -> bytes:
        end = header_bytes(content)
        header = content[8:end].rstrip()
        entry = json.dumps(json.loads(header)[NORM])
        header = header[:-1] + f', "{NORM}": {entry}}}'.encode()
        return len(header).to_bytes(8, "little") + header + content[end:]

    replace_bytes(WEIGHTS, repeat)(single)
    with pytest.raises(CheckpointError, match="a JSON object names a field twice"):
        load(single)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(
    value: float, single: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(lambda tensors: tensors[name].view(-1)[5:6].fill_(value))(single)
    load(single)
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert f"{single / WEIGHTS}: tensor {name} has NaN or infinite values" in record.message


def test_large_weights_are_no_reason_to_warn(single: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Their sum overflows, they do not; as float16 they do."""
    edit_tensors(lambda tensors: tensors[HEAD].fill_(3e38))(single)
    load(single)
    assert not caplog.records
    load_decoder(single, load_config(single), dtype=torch.float16, device=torch.device("cpu"))
    assert [HEAD in record.message for record in caplog.records] == [True]


def test_a_file_that_shrinks_while_it_is_read(single: Path) -> None:
    def truncate(done: int, total: int) -> None:
        os.truncate(single / WEIGHTS, 10_000)

    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: the file has become shorter") as raised:
        load(single, progress=truncate)
    assert_one_sentence(str(raised.value), single)


def test_a_file_in_the_place_of_the_directory(single: Path) -> None:
    for path in (single / WEIGHTS, single / "nowhere"):
        for read in (start_router, start_worker):
            with pytest.raises(CheckpointError, match=f"{path.name}: no such directory$") as raised:
                read(path)
            assert_one_sentence(str(raised.value), path)


@contextmanager
def as_somebody_without_rights() -> Iterator[None]:
    """Permissions do not bind root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("name", ["", "config.json", "generation_config.json", "tokenizer.json", WEIGHTS])
def test_files_that_may_not_be_read(name: str, checkpoint_of: Callable[[str], Path]) -> None:
    with tempfile.TemporaryDirectory() as parent:  # pytest's own is closed to other users in any case
        os.chmod(parent, 0o755)
        directory = shutil.copytree(checkpoint_of("llama-gqa"), Path(parent) / "checkpoint")
        for path in (directory, *directory.iterdir()):
            path.chmod(0o755)
        (directory / name).chmod(0)
        denied = (directory / (name or "config.json")).name
        try:
            with (
                as_somebody_without_rights(),
                pytest.raises(
                    CheckpointError, match=rf"{denied}: cannot be read \(Permission denied\)"
                ) as raised,
            ):
                start_worker(directory)
        finally:
            directory.chmod(0o755)
        assert_one_sentence(str(raised.value), directory)


@contextmanager
def full_disk(directory: Path) -> Iterator[Callable[[], None] | None]:
    """`directory` takes no byte more (ENOSPC): a full tmpfs. Where mounting is not allowed, the function that
    is given makes every write of a child process fail (EFBIG)."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(directory)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        return
    try:
        with (directory / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(4096)):
                pass
        with pytest.raises(OSError, match="No space left"):
            (directory / "more").write_bytes(b"more")
        yield None
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def test_a_full_disk_does_not_keep_the_loop_from_being_compiled(tmp_path: Path) -> None:
    """All that a worker writes is numba's cache."""
    program = "from pdengine.transport.ucx_progress import compile_loop; compile_loop(); print('compiled')"
    with full_disk(tmp_path / "full") as limit:
        result = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=PROCESS_SECONDS,
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "full")},
            preexec_fn=limit,
            check=False,
        )
    assert result.stdout == "compiled\n", result.stderr


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return fork_server().run("pdengine.cli", arguments, {"OMP_NUM_THREADS": "1"}, PROCESS_SECONDS)


@pytest.mark.parametrize(
    ("role", "kind"),
    [
        ("prefill", "cut in the data"),
        ("prefill", "GPTQ"),
        ("router", "larger tokenizer"),
        ("router", "config is a pipe"),
    ],
)
def test_at_the_command_line_it_is_one_line(role: str, kind: str, single: Path) -> None:
    damage, sentence = IN_SINGLE_FILE[kind]
    damage(single)
    router = ["--router", "tcp://127.0.0.1:9"] if role == "prefill" else []
    result = run(role, "--model", str(single), *router)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    [line] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    with pytest.raises(CheckpointError, match=sentence) as raised:
        start_router(single) if role == "router" else start_worker(single)
    assert line == f"Error: {raised.value}"


def test_chat_without_a_template_is_refused(single: Path) -> None:
    edit_json("tokenizer_config.json", chat_template=None)(single)
    result = run("generate", "hello", "--chat", "--model", str(single))
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    [line] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert str(single) in line
    assert "no chat template" in line


@pytest.fixture(scope="module")
def flipped(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(checkpoint_of("llama-gqa"), tmp_path_factory.mktemp("flipped") / "checkpoint")


def assert_taken_or_refused(directory: Path, name: str, content: bytes) -> None:
    path = directory / name
    good = path.read_bytes()
    path.write_bytes(content)
    try:
        for read in (start_router, start_worker, load):
            with little_memory():
                try:
                    read(directory)
                except CheckpointError as error:
                    assert_one_sentence(str(error), directory)
    finally:
        path.write_bytes(good)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), mask=st.integers(1, 255))
def test_flips_in_the_header_of_the_weights(flipped: Path, data: st.DataObject, mask: int) -> None:
    content = bytearray((flipped / WEIGHTS).read_bytes())
    content[data.draw(st.integers(0, header_bytes(content) - 1), "position")] ^= mask
    assert_taken_or_refused(flipped, WEIGHTS, bytes(content))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), mask=st.integers(1, 255))
def test_flips_in_the_config(flipped: Path, data: st.DataObject, mask: int) -> None:
    content = bytearray((flipped / "config.json").read_bytes())
    content[data.draw(st.integers(0, len(content) - 1), "position")] ^= mask
    assert_taken_or_refused(flipped, "config.json", bytes(content))
