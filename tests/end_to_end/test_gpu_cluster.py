"""Prefill and decode on one GPU: the KV cache goes from one to the other by CUDA IPC."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deployment import DEADLINE_SECONDS, wait_for

from pdengine.client import Client
from pdengine.models.demo.facts import checkpoint_directory, demo_questions


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")
def test_answers_that_only_a_pulled_kv_cache_can_give(tmp_path: Path) -> None:
    log = tmp_path / "up.log"
    command = [sys.executable, "-u", "-m", "pdengine.cli", "up", "--client-address", "tcp://127.0.0.1:0"]
    command += ["--model", str(checkpoint_directory()), "--device", "cuda:0"]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ})
    try:
        ready = wait_for(
            lambda: re.search(r"^ready: .* behind (\S+)", log.read_text(), re.MULTILINE), process
        )
        with Client(ready[1]) as client:
            for question in demo_questions(seed=1, num_facts=8):
                completion = client.generate(question.prompt, max_tokens=8, temperature=0)
                assert completion.text == f" {question.answer}"
                assert completion.transfer is not None
                assert "cuda_ipc" in completion.transfer.lanes
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(DEADLINE_SECONDS)
        print(log.read_text())
    assert len(re.findall(r"left free", log.read_text())) == 2
