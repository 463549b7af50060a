"""Models by id, fetched by real processes from a server on the loopback interface."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer

from pdengine.models.checkpoint import CheckpointError
from pdengine.models.hub import resolve_model

MODEL = "owner/small"
BIG = "model-00001-of-00002.safetensors"
INDEX = {"weight_map": {"a": BIG, "b": "model-00002-of-00002.safetensors"}}
READ = {
    "config.json": b'{"a": 1}',
    "generation_config.json": b'{"b": 1}',
    "tokenizer.json": b'{"c": 1}',
    "tokenizer_config.json": b'{"d": 1}',
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    BIG: bytes(range(256)) * 4096,
    "model-00002-of-00002.safetensors": b"second" * 1000,
}
NOT_READ = {
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"again",
    "original/params.json": b"{}",
    "onnx/config.json": b"{}",
    "README.md": b"#",
}
# A client writes pieces of 10 MB; the socket buffers hold a few MB more.
HUGE_SIZE = 48_000_000
HELD_AT = 40_000_000
SCRIPT = "import sys; from pdengine.models.hub import resolve_model; "
FETCH = SCRIPT + "print(resolve_model(sys.argv[1], revision=sys.argv[2] if len(sys.argv) > 2 else None))"
FETCH_OR_SAY_WHY = (
    "from pdengine.models.checkpoint import CheckpointError\n"
    "try:\n"
    f"    {FETCH}\n"
    "except CheckpointError as error:\n"
    "    sys.exit(str(error))\n"
)


@pytest.fixture
def hub():
    with HubServer() as server:
        server.add(MODEL, {**READ, **NOT_READ})
        yield server


class Fetcher:
    """Runs `resolve_model` in processes that know nothing but this server and this cache."""

    def __init__(self, home: Path, endpoint: str) -> None:
        self.home = home
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        self.environment = {**kept, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "NO_PROXY": "*"}

    def start(self, *arguments: str, code: str = FETCH_OR_SAY_WHY, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**self.environment, **environment},
            cwd=self.home.parent,
            text=True,
            # A shell that runs the tests in the background has them, and their children, ignore it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def __call__(self, *arguments: str, **options: str) -> Path:
        output, errors = self.start(*arguments, **options).communicate(timeout=60)
        assert output, errors
        return Path(output.strip())

    def error(self, *arguments: str, **options: str) -> str:
        """The sentence of the CheckpointError, the last line of what the process said."""
        process = self.start(*arguments, **options)
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output) == (1, ""), errors
        assert "Traceback" not in errors
        return errors.strip().splitlines()[-1]


@pytest.fixture
def fetch(hub, tmp_path):
    return Fetcher(tmp_path / "home", hub.endpoint)


def contents(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_exactly_what_is_read_is_fetched_once(hub, fetch):
    directory = fetch(MODEL)
    assert contents(directory) == READ
    assert directory.is_relative_to(fetch.home)
    assert dict(hub.bytes_served) == {path: len(content) for path, content in READ.items()}
    hub.requests.clear()
    assert fetch(MODEL) == directory
    # Only the question which commit the branch is at.
    assert [request.target for request in hub.requests] == [f"/api/models/{MODEL}/revision/main"]


def test_a_single_file_of_weights(hub, fetch):
    files = {"config.json": b"{}", "model.safetensors": b"weights"}
    hub.add(MODEL, files)
    assert contents(fetch(MODEL)) == files


def test_what_another_library_fetched_is_used(hub, fetch):
    library = "import sys, huggingface_hub; print(huggingface_hub.snapshot_download(sys.argv[1]))"
    directory = fetch(MODEL, code=library)
    hub.count_anew()
    assert fetch(MODEL) == directory
    assert not hub.bytes_served


def test_a_killed_download_is_resumed(hub, fetch):
    content = os.urandom(HUGE_SIZE)
    files = {"config.json": b"{}", "model.safetensors": content}
    hub.add(MODEL, files)
    hold = hub.hold("model.safetensors", HELD_AT)
    process = fetch.start(MODEL)
    assert hold.reached.wait(60), "the download never came so far"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    (partial,) = (fetch.home / "hub").rglob("*.incomplete")
    kept = partial.stat().st_size
    assert kept > 0
    hold.resume.set()
    hub.holds.clear()
    hub.count_anew()

    assert contents(fetch(MODEL)) == files
    assert hub.large_requests("model.safetensors")[-1].headers["range"] == f"bytes={kept}-"
    assert hub.bytes_served["model.safetensors"] == HUGE_SIZE - kept
    assert not list((fetch.home / "hub").rglob("*.incomplete"))


def test_a_cut_connection_is_continued(hub, fetch):
    content = os.urandom(HUGE_SIZE)
    hub.add(MODEL, {"config.json": b"{}", "model.safetensors": content})
    hub.cuts["model.safetensors"] = HELD_AT
    directory = fetch(MODEL)
    assert (directory / "model.safetensors").read_bytes() == content
    first, second = hub.large_requests("model.safetensors")
    assert "range" not in first.headers
    assert "range" in second.headers


@pytest.mark.parametrize("size", [5, len(READ[BIG]), len(READ[BIG]) + 1])
def test_a_wrong_part_is_thrown_away(hub, fetch, size):
    blob = (fetch(MODEL) / BIG).resolve()
    blob.rename(blob.with_name(f"{blob.name}.incomplete"))
    blob.with_name(f"{blob.name}.incomplete").write_bytes(b"x" * size)
    assert contents(fetch(MODEL)) == READ


def test_damaged_weights_are_refused(hub, fetch):
    hub.damaged.add(BIG)
    assert fetch.error(MODEL) == f"{MODEL}: {BIG} arrived damaged (wrong SHA-256), try again"
    hub.damaged.clear()
    assert contents(fetch(MODEL)) == READ


def test_two_processes_fetch_it_once(hub, fetch):
    hold = hub.hold(BIG, 2**16)
    first, second = fetch.start(MODEL), fetch.start(MODEL)
    assert hold.reached.wait(60)
    hold.resume.set()
    outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert outputs[0] == outputs[1]
    assert contents(Path(outputs[0].strip())) == READ
    assert hub.bytes_served[BIG] == len(READ[BIG])


def test_revisions(hub, fetch):
    old = hub.models[MODEL].references["main"]
    new = hub.add(MODEL, {**READ, "config.json": b'{"a": 2}'}, "main", "v2")
    assert (fetch(MODEL) / "config.json").read_bytes() == b'{"a": 2}'
    hub.count_anew()
    assert (fetch(MODEL, old) / "config.json").read_bytes() == b'{"a": 1}'
    assert dict(hub.bytes_served) == {"config.json": 8}, "the files that are the same are shared"
    assert fetch(MODEL, "v2").name == new
    assert fetch.error(MODEL, "v3") == f"{MODEL}: the model has no revision 'v3'"


def test_the_token_goes_to_the_hub_only(fetch, hub):
    hub.token = "secret"
    assert "no such model at http://127.0.0.1" in fetch.error(MODEL)
    assert fetch(MODEL, HF_TOKEN="secret")
    hub.requests.clear()
    (fetch.home / "token").write_text("secret")
    for blob in fetch.home.glob("hub/*/blobs/*"):
        blob.unlink()
    assert contents(fetch(MODEL)) == READ
    to_hub = [request for request in hub.requests if not request.target.startswith("/large/")]
    assert {request.headers.get("authorization") for request in to_hub} == {"Bearer secret"}
    elsewhere = [request for request in hub.requests if request.target.startswith("/large/")]
    assert elsewhere
    assert not any("authorization" in request.headers for request in elsewhere)


def test_offline(hub, fetch):
    sentence = fetch.error(MODEL, HF_HUB_OFFLINE="1")
    home = fetch.home / "hub"
    assert sentence == f"{MODEL}: not all of it is in {home}, and HF_HUB_OFFLINE forbids to fetch it"
    directory = fetch(MODEL)
    hub.requests.clear()
    assert fetch(MODEL, HF_HUB_OFFLINE="1") == directory
    assert not hub.requests
    (directory / BIG).unlink()
    assert fetch.error(MODEL, HF_HUB_OFFLINE="1") == sentence


def test_no_network(hub, fetch):
    nowhere = "http://127.0.0.1:1"
    sentence = fetch.error(MODEL, HF_ENDPOINT=nowhere)
    assert sentence.startswith(f"{MODEL}: cannot be fetched from {nowhere} (")
    assert "refused" in sentence
    directory = fetch(MODEL)
    assert fetch(MODEL, HF_ENDPOINT=nowhere) == directory, "what is in the cache needs no network"


def test_models_that_are_not_there(hub, fetch):
    assert fetch.error("owner/other").startswith("owner/other: no such directory, and no such model at http")
    hub.add("owner/pickle", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    assert "the model has no model.safetensors (only safetensors" in fetch.error("owner/pickle")
    hub.add("owner/gated", READ, is_gated=True)
    sentence = f"owner/gated: access is restricted, ask for it at {hub.endpoint}/owner/gated and set HF_TOKEN"
    assert fetch.error("owner/gated").startswith(sentence)
    hub.add("owner/broken", {"model.safetensors.index.json": b'{"weight_map": 3}'})
    assert "weight_map must be an object" in fetch.error("owner/broken")


def test_a_full_disk(hub, fetch):
    full = "import shutil, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free=10**6)\n"
    sentence = fetch.error(MODEL, code=full + FETCH_OR_SAY_WHY)
    assert sentence == f"{MODEL}: 1.1 MB are left to fetch, but {fetch.home / 'hub'} has only 1.0 MB free"


def test_a_disk_that_fills_up(hub, fetch):
    directory = fetch(MODEL)
    blob = (directory / BIG).resolve()
    blob.unlink()
    blob.with_name(f"{blob.name}.incomplete").symlink_to("/dev/full")
    sentence = fetch.error(MODEL)
    assert sentence == f"{MODEL}: cannot be written to {fetch.home / 'hub'} (No space left on device)"


def test_ctrl_c_ends_the_download_at_once(hub, fetch):
    hold = hub.hold(BIG, 2**16)
    process = fetch.start(MODEL)
    assert hold.reached.wait(60)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)  # the server still holds the file back
    assert "KeyboardInterrupt" in errors


@pytest.mark.parametrize("name", ["/no/such", "./no", "../no", "~/no-such-directory", "a/b/c"])
def test_names_that_look_like_paths(name):
    with pytest.raises(CheckpointError, match=f"^{name}: no such directory$"):
        resolve_model(name)


@pytest.mark.parametrize("name", ["", "a/", "no model", "--model"])
def test_names_that_are_neither(name):
    with pytest.raises(CheckpointError, match=f"^{name}: no such directory, and no id of a model"):
        resolve_model(name)


def test_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "small").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model("owner/small") == Path("owner/small")
    assert resolve_model("~/owner") == tmp_path / "owner"
    with pytest.raises(CheckpointError, match=r"^file: not a directory$"):
        resolve_model("file")
    with pytest.raises(CheckpointError, match=r"^owner: a directory has no revisions, found revision 'v1'$"):
        resolve_model("owner", revision="v1")


def test_a_directory_needs_no_hub_library():
    code = f"{SCRIPT} resolve_model('/'); sys.exit('huggingface_hub.hf_api' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
