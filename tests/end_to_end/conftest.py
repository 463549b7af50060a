from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from deployment import Deployment
from scenario import FLOAT32, cluster

from pdengine.client import Client


@pytest.fixture(scope="session")
def wandering_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a context of 8 192 tokens, so that streams and prompts can be long."""
    directory = tmp_path_factory.mktemp("checkpoint") / "model"
    write_checkpoint("qwen3", directory, overrides={"max_position_embeddings": 8192})
    return directory


@pytest.fixture(scope="session")
def undisturbed(wandering_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of one worker that does all of a request alone and to which nothing happens."""
    with Deployment(wandering_model, tmp_path_factory.mktemp("undisturbed")) as deployment:
        deployment.start_router()
        deployment.start_worker("unified", *FLOAT32)
        deployment.wait_workers("unified")
        with Client(deployment.client_address) as client:
            yield client


@pytest.fixture(scope="session")
def calm_cluster(wandering_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A prefill and a decode worker to which nothing happens.

    Leases outlast the tests: what is free after a request was given back.
    """
    logs, prefill = tmp_path_factory.mktemp("calm"), ("--lease-seconds", "3600")
    with cluster(wandering_model, logs, prefill=prefill) as deployment:
        deployment.start_worker("decode", *FLOAT32)
        deployment.wait_workers("prefill", "decode")
        yield deployment
