"""`pdengine` with faults that a test switches on and off by files in the directory that FAULTS names.

hold-pulls: a pull waits before its first read, on the engine thread, for as long as the file is there.
lose-releases: messages that give leases back are not sent.
hang-steps: a step does not begin, for as long as the file is there.
slow-steps: each step begins late, so that an answer takes long.
"""

import os
from pathlib import Path
from threading import Event
from typing import Any

from pdengine.cli.main import main
from pdengine.engine import worker
from pdengine.engine.peers import Peers
from pdengine.engine.pulls import Pulls
from pdengine.engine.runner import Runner
from pdengine.transport.messages import Message, ReleaseLeases
from pdengine.transport.transfer import Transfer

POLL_SECONDS = 0.02
SLOW_STEP_SECONDS = 0.005
FAULTS = Path(os.environ["FAULTS"])

make_pulls = Pulls.__init__
send_to_peer = Peers.send
start_step = Runner.start


def is_on(fault: str) -> bool:
    return (FAULTS / fault).exists()


def make_pulls_that_can_be_held(
    self: Pulls, transfer: Transfer, *arguments: object, **options: object
) -> None:
    start = transfer.pull

    def pull(*arguments: object) -> None:
        was_held = is_on("hold-pulls")
        if was_held:
            print("a pull is held", flush=True)
            while is_on("hold-pulls"):
                Event().wait(POLL_SECONDS)
        start(*arguments)  # type: ignore[arg-type]
        if was_held:
            print("the pull has begun", flush=True)

    transfer.pull = pull  # type: ignore[method-assign, assignment]
    make_pulls(self, transfer, *arguments, **options)  # type: ignore[arg-type]


def send_to_peer_unless_lost(self: Peers, engine_id: str, message: Message) -> None:
    if isinstance(message, ReleaseLeases) and is_on("lose-releases"):
        print("a release is lost", flush=True)
    else:
        send_to_peer(self, engine_id, message)


def run_step_unless_it_hangs(self: Runner, *arguments: Any) -> Any:
    if is_on("hang-steps"):
        print("a step hangs", flush=True)
        while is_on("hang-steps"):
            Event().wait(POLL_SECONDS)
    if is_on("slow-steps"):
        Event().wait(SLOW_STEP_SECONDS)
    return start_step(self, *arguments)


Pulls.__init__ = make_pulls_that_can_be_held  # type: ignore[method-assign]
Peers.send = send_to_peer_unless_lost  # type: ignore[method-assign]
Runner.start = run_step_unless_it_hangs  # type: ignore[method-assign]
worker.MAX_STEP_SECONDS = float(os.environ.get("MAX_STEP_SECONDS", worker.MAX_STEP_SECONDS))
main()
