"""What benchmarks do to the processes of `pdengine up`."""

from __future__ import annotations

import os
import subprocess
import sys

from pdengine.bench.cluster import pin_workers, processes_of

FAKE_UP = """
import subprocess, sys
idle = "print(flush=True); input()"
roles = ("router", "unified", "unified")
command = [sys.executable, "-c", idle, "pdengine.cli"]
children = [subprocess.Popen([*command, role], stdout=subprocess.PIPE) for role in roles]
for child in children:
    child.stdout.readline()
print("ready", flush=True)
input()
"""


def test_workers_get_a_core_each_and_the_router_all() -> None:
    command = [sys.executable, "-c", FAKE_UP, "pdengine.cli", "up"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as up:
        assert up.stdin is not None
        assert up.stdout is not None
        assert up.stdout.readline() == b"ready\n"
        processes = sorted(processes_of(up.pid))
        assert [role for role, _ in processes] == ["router", "unified", "unified", "up"]
        pin_workers(up.pid)
        cores = {pid: os.sched_getaffinity(pid) for _, pid in processes}
        ours = sorted(os.sched_getaffinity(0))
        workers = [cores[pid] for role, pid in processes if role == "unified"]
        assert workers[0] == {ours[0]}
        assert workers[1] == ({ours[1]} if len(ours) > 1 else {ours[0]})
        assert all(cores[pid] == set(ours) for role, pid in processes if role != "unified")
        up.stdin.close()
