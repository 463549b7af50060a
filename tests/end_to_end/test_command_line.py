"""The commands, as a person types them."""

import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from checkpoints import write_checkpoint
from deployment import DEADLINE_SECONDS, Deployment, wait_for
from fork_server import fork_server

from pdengine.client import Client
from pdengine.models.demo.facts import checkpoint_directory, demo_questions

COMMAND = [sys.executable, "-P", "-m", "pdengine.cli"]
SMALL = ("--kv-memory", "64MiB")  # the default does not fit into every machine that runs tests


def run(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return fork_server().run("pdengine.cli", arguments, environment or {}, DEADLINE_SECONDS)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    write_checkpoint("llama-gqa", directory, max_shard_size="100KB")
    return directory


def assert_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """The command ended with one sentence, not with a traceback."""
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    [sentence] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    for word in words:
        assert word in sentence


def worker(
    model: Path, *options: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    arguments = ("--model", str(model), "--router", "tcp://127.0.0.1:9", *SMALL, *options)
    return run("prefill", *arguments, environment=environment)


def test_an_unknown_architecture_is_refused_by_name(model: Path) -> None:
    config = model / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "MambaForCausalLM"))
    for result in (worker(model), run("router", "--model", str(model))):
        assert_refused(result, "config.json", "MambaForCausalLM", "LlamaForCausalLM")


def test_a_missing_shard_is_named(model: Path) -> None:
    shard = sorted(model.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert_refused(worker(model), shard.name)


def test_a_missing_tokenizer_is_named(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    for result in (worker(model), run("router", "--model", str(model))):
        assert_refused(result, "tokenizer.json")


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    assert_refused(worker(tmp_path / "nowhere"), "nowhere")
    assert_refused(run("up", "--model", str(tmp_path / "nowhere")), "nowhere")


def test_a_pool_too_small_for_one_block(model: Path) -> None:
    assert_refused(
        worker(model, "--kv-memory", "1000B"), "1000 bytes", "one block of 16 tokens", "6144 bytes"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--dtype", "float8"), ("float8", "bfloat16")),
        (("--device", "cuda:999"), ("cuda:999", "torch")),
        (("--device", "gpu"), ("'gpu'", "cpu, cuda and cuda:N")),
        (("--block-size", "0"), ("block size", "0")),
        (("--block-size", "24", "--device", "cuda"), ("block size 24", "16, 32, 64, 128, 256")),
        (("--kv-memory", "40%", "--device", "cuda"), ("40%", "--gpu-memory-utilization")),
        (("--bind", "127.0.0.1"), ("127.0.0.1", "tcp://HOST:PORT")),
        (("--bind", "tcp://0.0.0.0:0"), ("--bind tcp://0.0.0.0:0", "--keys")),
        (("--bind", "tcp://0.0.0.0:0", "--insecure"), ("--advertise",)),
        (("--advertise", "tcp://192.0.2.1:0", "--insecure"), ("192.0.2.1",)),
    ],
)
def test_bad_options_are_named(options: tuple[str, ...], words: tuple[str, ...], model: Path) -> None:
    assert_refused(worker(model, *options), *words)


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        model = str(checkpoint_directory())
        assert_refused(run("router", "--model", model, "--client-address", address), address, "in use")
        result = run("up", "--model", model, "--client-address", address, *SMALL)
        assert result.returncode != 0
        assert f"cannot listen on {address}" in result.stderr
        assert "Traceback" not in result.stderr


def test_without_libucp_it_says_how_to_install_it(model: Path, tmp_path: Path) -> None:
    """A `libucx` package without libraries hides the installed one; the linker's cache has none here."""
    (tmp_path / "libucx").mkdir()
    (tmp_path / "libucx" / "__init__.py").touch()
    hidden = {"PYTHONPATH": str(tmp_path), "PDENGINE_UCX_LIB": str(tmp_path / "libucp.so")}
    assert_refused(worker(model, environment=hidden), "libucp")


def test_a_worker_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    config = other / "config.json"
    config.write_text(re.sub(r'"rms_norm_eps": [^,]*', '"rms_norm_eps": 0.01', config.read_text()))
    with Deployment(model, tmp_path) as deployment:
        router = deployment.start_router()
        stranger = deployment.start_worker("prefill", model=other)
        assert stranger.wait(DEADLINE_SECONDS) == 1
        deployment.processes.remove(stranger)
        assert "Error: the router refused this worker: its model is" in deployment.log_of(stranger)
        assert "Traceback" not in deployment.log_of(stranger)
        assert "its model is" in deployment.log_of(router)
        half = deployment.start_worker("unified", "--dtype", "bfloat16")
        deployment.wait_workers("unified")
        full = deployment.start_worker("unified", "--dtype", "float32")
        assert full.wait(DEADLINE_SECONDS) == 1
        assert "its dtype is float32, the cluster's is bfloat16" in deployment.log_of(full)
        assert half.poll() is None
        assert router.poll() is None


def test_generate_with_a_model_starts_what_it_needs() -> None:
    question = demo_questions(seed=3, num_facts=5)[2]
    environment = {"PDENGINE_KV_MEMORY": "64MiB"}
    result = run("generate", question.prompt, "--model", str(checkpoint_directory()), environment=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == question.answer


def test_the_demo_gets_every_answer_right() -> None:
    result = run("demo")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "32 of 32 answers are right" in result.stdout
    assert "✗" not in result.stdout


@pytest.fixture
def up(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`pdengine up` with the demo model, ready. Its working directory has other code of the same name."""
    log = tmp_path / "up.log"
    other = tmp_path / "pdengine" / "cli" / "__main__.py"
    other.parent.mkdir(parents=True)
    other.write_text("raise SystemExit('the code of the working directory was run')")
    arguments = [
        "up",
        "--model",
        str(checkpoint_directory()),
        "--client-address",
        "tcp://127.0.0.1:0",
        *SMALL,
    ]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=tmp_path,
            stdout=output,
            stderr=output,
            text=True,
            start_new_session=True,
        )
    try:
        wait_for(lambda: re.search(r"^ready", log.read_text(), re.MULTILINE), process=process)
        process.args = log.read_text()
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])  # SIGTERM: test_up_configuration
def test_up_leaves_no_process_behind(up: subprocess.Popen[str], number: int) -> None:
    children = psutil.Process(up.pid).children(recursive=True)
    assert len(children) == 3
    match = re.search(r"--router (tcp://\S+)", str(up.args))
    assert match is not None
    question = demo_questions(seed=4, num_facts=8)[5]
    with Client(match[1]) as client:
        assert client.generate(question.prompt, temperature=0).text.strip() == question.answer
    up.send_signal(number)
    assert up.wait(DEADLINE_SECONDS) == (-signal.SIGKILL if number == signal.SIGKILL else 0)
    _, alive = psutil.wait_procs(children, timeout=DEADLINE_SECONDS)
    assert not alive
