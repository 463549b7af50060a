"""Who may join a cluster: a worker that differs in anything that must be equal is told in what."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from deployment import DEADLINE_SECONDS, Deployment

from pdengine.client import Client
from pdengine.engine.kv_cache import LAYOUT
from pdengine.models.fingerprint import model_fingerprint, weights_fingerprint
from pdengine.transport.messages import PROTOCOL_VERSION
from pdengine.transport.ucx_library import load_ucx


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "model"
    write_checkpoint("llama-gqa", directory)
    return directory


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A router and one worker, float32, blocks of 16 tokens."""
    with Deployment(model, tmp_path_factory.mktemp("logs")) as deployment:
        deployment.start_router()
        deployment.start_worker("unified")
        deployment.wait_workers("unified")
        yield deployment
        deployment.wait_baseline()


def assert_refused(
    cluster: Deployment,
    field: str,
    theirs: object,
    ours: object,
    *options: str,
    model: Path | None = None,
    module: str = "pdengine.cli",
) -> None:
    """A worker with these options ends with exit status 1, both logs say why, the cluster still serves."""
    router, resident = cluster.processes
    stranger = cluster.start_worker(
        "prefill",
        *options,
        model=model,
        module=module,
        environment={"PYTHONPATH": str(Path(__file__).parent), "FOREIGN": f"{field}={theirs}"},
    )
    assert stranger.wait(DEADLINE_SECONDS) == 1
    cluster.processes.remove(stranger)
    difference = f"its {field} is {theirs}, the cluster's is {ours}"
    log = cluster.log_of(stranger)
    assert f"Error: the router refused this worker: {difference}\n" in log
    assert "Traceback" not in log
    assert f"refused a prefill worker: {difference}\n" in cluster.log_of(router)
    with Client(cluster.client_address) as client:
        assert len(client.generate("the cat", max_tokens=4, temperature=0, ignore_eos=True).token_ids) == 4
        assert [worker.role for worker in client.status().workers] == ["unified"]
    assert router.poll() is None
    assert resident.poll() is None


def test_another_model(cluster: Deployment, model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.01}))
    assert_refused(cluster, "model", model_fingerprint(other), model_fingerprint(model), model=other)


def test_other_weights_of_the_same_shape(cluster: Deployment, model: Path, tmp_path: Path) -> None:
    write_checkpoint("llama-gqa", tmp_path / "other", seed=1)
    ours, theirs = weights_fingerprint(model), weights_fingerprint(tmp_path / "other")
    assert_refused(cluster, "weights", theirs, ours, model=tmp_path / "other")


def test_another_dtype(cluster: Deployment) -> None:
    assert_refused(cluster, "dtype", "bfloat16", "float32", "--dtype", "bfloat16")


def test_another_block_size(cluster: Deployment) -> None:
    assert_refused(cluster, "block_size", 32, 16, "--block-size", "32")


def test_another_version_of_the_protocol(cluster: Deployment) -> None:
    theirs = PROTOCOL_VERSION + 1
    assert_refused(cluster, "protocol", theirs, PROTOCOL_VERSION, module="foreign_worker")


def test_another_layout_of_the_pool(cluster: Deployment) -> None:
    assert_refused(cluster, "layout", "column-major", LAYOUT, module="foreign_worker")


def test_another_ucx(cluster: Deployment) -> None:
    ours = "ucx {}.{}.{}".format(*load_ucx().version)
    assert_refused(cluster, "ucx", "ucx 1.0.0", ours, module="foreign_worker")
