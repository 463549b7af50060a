"""What the tests of failures share: questions, and a worker whose faults can be switched on."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from checkpoints import VOCAB_SIZE
from deployment import Deployment
from fork_server import ForkedProcess

from pdengine.client import Client, Completion

# An answer that is continued elsewhere is the same as long as no choice in it is nearer than the rounding of
# float32, about 1e-5 here, which depends on the batch. Of the prompts and seeds with answers of hundreds of
# tokens those were taken whose nearest choice is more than 3e-4 apart; one in a few of them has a nearer one.
FLOAT32 = ("--dtype", "float32")
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "seed": 13, "ignore_eos": True}
CLIENT_SECONDS = 120.0  # no request of these tests may take longer
BLOCK_BYTES = 2 * 3 * 2 * 16 * 32 * 4  # KV heads, layers, K and V, tokens, head_dim, float32

# How two workers on one host move the KV cache, as options and environment of both: memory that is mapped,
# and UCX over shared memory and over TCP, where the worker that is read from must help.
TransferPath = tuple[tuple[str, ...], dict[str, str]]
MAPPING: TransferPath = (("--same-host", "mapping"), {})
UCX_SHARED_MEMORY: TransferPath = (("--same-host", "ucx"), {})
UCX_TCP: TransferPath = (("--same-host", "ucx"), {"UCX_TLS": "tcp"})


def kv_memory(num_blocks: int) -> tuple[str, str]:
    """The option for a KV cache of so many blocks."""
    return "--kv-memory", f"{num_blocks * BLOCK_BYTES}B"


def random_prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1_000 * length + seed)
    return torch.randint(10, VOCAB_SIZE - 40, (length,), generator=generator).tolist()


def ask(client: Client, prompt: list[int], *, max_tokens: int = 24, **sampling: Any) -> Completion:
    return client.generate(prompt, max_tokens=max_tokens, **{"timeout": CLIENT_SECONDS, **sampling})


def tokens(client: Client, prompt: list[int], **options: Any) -> list[int]:
    return ask(client, prompt, **options).token_ids


def check_healthy(deployment: Deployment, undisturbed: Client) -> None:
    """All pools are at their baseline, and a fresh request gets the right tokens."""
    deployment.wait_baseline()
    prompt = random_prompt(70, seed=99)
    with Client(deployment.client_address) as client:
        assert tokens(client, prompt, **SAMPLED) == tokens(undisturbed, prompt, **SAMPLED)
    deployment.wait_baseline()


@contextmanager
def cluster(
    model: Path, logs: Path, *, router: tuple[str, ...] = (), prefill: tuple[str, ...] = ()
) -> Iterator[Deployment]:
    """A router and a prefill worker."""
    with Deployment(model, logs) as deployment:
        deployment.start_router(options=router)
        deployment.start_worker("prefill", *FLOAT32, *prefill)
        yield deployment


class FaultyWorker:
    """A process of the module `faulty_worker`, and the switches of its faults."""

    def __init__(
        self, deployment: Deployment, role: str, *options: str, environment: dict[str, str] | None = None
    ) -> None:
        self._deployment = deployment
        self._faults = Path(tempfile.mkdtemp(prefix="faults-", dir=deployment.logs))
        self._num_held = 0
        self.process: ForkedProcess = deployment.start_worker(
            role,
            *options,
            module="faulty_worker",
            environment={
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
                "FAULTS": str(self._faults),
                **(environment or {}),
            },
        )

    def hold_next_pull(self) -> None:
        self._num_held += 1
        (self._faults / "hold-pulls").touch()

    def wait_held(self) -> None:
        """Wait until a pull is held, and the router has been told all that went before."""
        self._deployment.wait_log(self.process, "^a pull is held$", self._num_held)
        self._deployment.wait_heartbeats()

    def let_pull_go(self) -> None:
        """Does not wait: the process may be stopped."""
        (self._faults / "hold-pulls").unlink()

    def wait_pull_begun(self) -> None:
        self._deployment.wait_log(self.process, "^the pull has begun$", self._num_held)

    def hang_next_step(self) -> None:
        (self._faults / "hang-steps").touch()

    def wait_hanging(self) -> None:
        self._deployment.wait_log(self.process, "^a step hangs$")

    def slow_down(self) -> None:
        (self._faults / "slow-steps").touch()

    def lose_releases(self) -> None:
        (self._faults / "lose-releases").touch()

    def stop_losing_releases(self) -> None:
        (self._faults / "lose-releases").unlink()
