"""What a router is told when it starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

OnFailure = Literal["recompute", "fail"]
TransferMode = Literal["early-pull", "pull", "push"]


@dataclass(frozen=True)
class RouterConfig:
    """heartbeat_seconds: asked of the workers. silence_seconds: a worker that is not heard of for so long is
    given up. on_failure: of a request's worker: compute the request anew on another one, with the tokens
    written so far, or fail it. max_attempts: workers that a request is given to before it fails. transfer:
    whether a KV cache is pulled when its prompt is complete, or also before, where a decode worker has room;
    or pushed layer by layer, into blocks that are held from before the prompt is begun. local_prefill_tokens:
    a decode worker that has all but so many tokens of a prompt in its prefix cache computes them itself; 0 is
    never. keys: the router's file of keys, or a directory that has it (transport/keys.py); None: whoever can
    connect is served, and the addresses must be on loopback unless `insecure`.
    """

    model_directory: Path
    client_address: str = "tcp://127.0.0.1:5555"
    worker_address: str = "tcp://127.0.0.1:5556"
    heartbeat_seconds: float = 1.0
    silence_seconds: float = 5.0
    on_failure: OnFailure = "recompute"
    max_attempts: int = 3
    transfer: TransferMode = "early-pull"
    local_prefill_tokens: int = 256
    keys: Path | None = None
    insecure: bool = False
