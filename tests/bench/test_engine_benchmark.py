"""`pdengine bench engine` on the demo checkpoint: its arithmetic and its plumbing, not the times."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Sequence_
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from pdengine.bench.engine import (
    BLOCK_SIZE,
    WARM_UP_STEPS,
    DecodeFigure,
    EnginePlan,
    EngineResult,
    Measurement,
    PrefillFigure,
)
from pdengine.bench.engine_ceilings import Ceilings
from pdengine.bench.engine_costs import decode_flop, kv_bytes_per_step, prefill_flop, weight_bytes_per_step
from pdengine.bench.engine_report import as_json, plot
from pdengine.bench.engine_requests import OfflineEngine, RequestsFigure
from pdengine.bench.load import Request, Spread
from pdengine.bench.transfer_report import PlotUnavailable
from pdengine.cli.main import main
from pdengine.engine.kv_cache import KVCache
from pdengine.engine.memory import weight_bytes
from pdengine.engine.runner import ReadStep, Runner
from pdengine.engine.scheduler import SchedulerConfig
from pdengine.engine.step import BlockCopy, Chunk
from pdengine.engine.step_extras import StepResult
from pdengine.models.config import ModelConfig, RopeConfig, load_config
from pdengine.models.demo.facts import checkpoint_directory

CPU = torch.device("cpu")
DEMO = checkpoint_directory()
SMALL = [
    "--batch-sizes",
    "1,2",
    "--contexts",
    "16,33",
    "--prompt-tokens",
    "20",
    "--output-tokens",
    "3",
    "--steps",
    "2",
]


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def small_config() -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=10,
        hidden_size=8,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        intermediate_size=16,
        rms_norm_eps=1e-6,
        rope=RopeConfig(theta=1e4),
        max_position_embeddings=64,
        tie_word_embeddings=True,
        qkv_bias=False,
        attention_output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        dtype="bfloat16",
        eos_token_ids=(),
        bos_token_id=None,
    )


def test_bytes_and_operations_of_a_small_model_by_hand() -> None:
    config = small_config()
    # A layer: qkv 8 x (8 + 4 + 4) = 128, output 8 x 8 = 64, gate and up 8 x 32 = 256, down 16 x 8 = 128.
    # Two layers of 576 weights, and 8 x 10 of the logits.
    assert weight_bytes_per_step(config, 2) == 2 * (1152 + 80)
    # A token: keys and values, of 2 layers, 1 head and 4 dimensions.
    assert kv_bytes_per_step(config, 2, batch_size=3, context=5) == 3 * 5 * (2 * 2 * 1 * 4) * 2
    # A query and a key: 4 products and 4 sums in each of 2 heads and 2 layers, and as many for the value.
    assert decode_flop(config, batch_size=3, context=5) == 3 * (2 * 1152 + 2 * 80 + 5 * 64)
    # The first token attends to 1, the second to 2, the third to 3.
    assert prefill_flop(config, 3) == 3 * 2 * 1152 + 2 * 80 + (1 + 2 + 3) * 64


def test_the_bytes_are_those_of_the_checkpoint_but_for_embeddings_and_norms() -> None:
    config = load_config(DEMO)
    embeddings, norms = (
        config.vocab_size * config.hidden_size,
        (2 * config.num_layers + 1) * config.hidden_size,
    )
    assert not config.tie_word_embeddings
    in_file = weight_bytes(DEMO, config, item_bytes=4)
    assert weight_bytes_per_step(config, 4) == in_file - 4 * (embeddings + norms)


def decode_figure(*, read_rate: float = 100.0, matmul: float = 1000.0) -> DecodeFigure:
    return DecodeFigure(
        batch_size=4,
        context=8,
        seconds=Spread(mean=9.0, p50=2.0, p99=3.0),
        weight_bytes=60,
        kv_bytes=40,
        flop=500,
        read_rate=read_rate,
        matmul_rate=matmul,
    )


def test_shares_are_of_whatever_bounds_the_step() -> None:
    figure = decode_figure()
    assert (figure.tokens_per_second, figure.bytes_per_second) == (2.0, 50.0)
    assert (figure.share_of_read_rate, figure.floor_seconds, figure.share_of_floor) == (0.5, 1.0, 0.5)
    bound_by_arithmetic = decode_figure(matmul=250.0)
    assert (bound_by_arithmetic.floor_seconds, bound_by_arithmetic.share_of_floor) == (2.0, 1.0)
    assert bound_by_arithmetic.share_of_read_rate == 0.5
    prefill = PrefillFigure(10, Spread(mean=9.0, p50=2.0, p99=3.0), flop=800, matmul_rate=1600.0)
    assert (prefill.tokens_per_second, prefill.flop_per_second) == (5.0, 400.0)
    assert prefill.share_of_matmul_rate == 0.25


class RecordingRunner(Runner):
    def __init__(self) -> None:
        self.is_asynchronous = False
        self.steps: list[list[Chunk]] = []

    def start(
        self,
        chunks: Sequence_[Chunk],
        after_layer: Callable[[int], None] | None = None,
        copies: Sequence_[BlockCopy] = (),
    ) -> ReadStep:
        self.steps.append(list(chunks))
        token_ids = [0 for chunk in chunks if chunk.samples]
        return lambda: StepResult(token_ids)


def test_a_step_has_the_sequences_that_it_is_counted_for() -> None:
    config = small_config()
    plan = EnginePlan(DEMO, batch_sizes=(3,), contexts=(33,), prompt_tokens=50, output_tokens=0, steps=2)
    assert plan.worker_config(config).kv_memory == 3 * 5 * BLOCK_SIZE * 32  # 4 of a prompt, and one to grow
    kv_cache = KVCache(config, num_blocks=9, block_size=BLOCK_SIZE, dtype=torch.bfloat16)
    runner = RecordingRunner()
    measurement = Measurement(plan, config, kv_cache, runner, CPU)

    figure = measurement.decode(3, 33)
    assert len(runner.steps) == WARM_UP_STEPS + 1 + 2
    for chunk in runner.steps[-1]:
        assert (chunk.num_tokens, chunk.samples, chunk.sequence.num_computed) == (1, True, 32)
    blocks = [block_id for chunk in runner.steps[-1] for block_id in chunk.sequence.block_ids]
    assert sorted(blocks) == list(range(9)) != blocks
    assert (figure.weight_bytes, figure.kv_bytes) == (2464, 3 * 33 * 32)

    runner.steps.clear()
    prefill = measurement.prefill(50)
    assert len(runner.steps) == WARM_UP_STEPS + 2
    (chunk,) = runner.steps[-1]
    assert (chunk.num_tokens, chunk.samples, chunk.sequence.num_computed) == (50, True, 0)
    assert len(set(chunk.sequence.block_ids)) == 4
    assert prefill.flop == prefill_flop(config, 50)


@pytest.mark.parametrize("concurrency", [1, 3, 9])
def test_so_many_requests_run_at_any_time_and_all_of_their_tokens_are_timed(concurrency: int) -> None:
    runner = RecordingRunner()
    config = SchedulerConfig(BLOCK_SIZE, max_batch_tokens=64, max_requests=9, max_pinned_blocks=45)
    requests = [Request([1] * 20, 4 + index % 3) for index in range(7)]
    timings = OfflineEngine(config, 45, runner).run(requests, concurrency)
    assert [len(timing.arrivals) for timing in timings] == [request.output_tokens for request in requests]
    for timing in timings:
        assert timing.sent_at <= timing.arrivals[0]
        assert list(timing.arrivals) == sorted(timing.arrivals)
    assert max(len(chunks) for chunks in runner.steps) == min(concurrency, 7)
    num_tokens = sum(chunk.num_tokens for chunks in runner.steps for chunk in chunks)
    assert num_tokens == sum(20 + request.output_tokens - 1 for request in requests)


def test_throughput_of_requests_counts_what_they_wrote() -> None:
    even = Spread(mean=1.0, p50=1.0, p99=1.0)
    figure = RequestsFigure(2, 6, prompt_tokens=20, output_tokens=10, seconds=4.0, ttft=even, tpot=even)
    assert figure.output_tokens_per_second == 15.0


def test_ceilings_are_rates() -> None:
    ceilings = Ceilings(small_config(), torch.float32, CPU)
    assert ceilings.read_rate() > 0
    assert ceilings.matmul_rate() > 0


def test_a_small_run_prints_writes_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Path] = []
    monkeypatch.setattr("pdengine.bench.engine_report.plot", lambda result, path: drawn.append(path))
    output, picture = tmp_path / "result.json", tmp_path / "result.png"
    arguments = ["bench", "engine", str(DEMO), *SMALL, "--threads", "1", "--dtype", "bfloat16"]
    run = CliRunner().invoke(main, [*arguments, "--output", str(output), "--plot", str(picture)])
    assert run.exit_code == 0, (run.output, run.exception)
    result = json.loads(output.read_text())
    assert result["machine"]["cores"] >= 1
    assert (result["model"], result["dtype"], result["threads"]) == (DEMO.name, "bfloat16", 1)
    assert result["prefill"]["num_tokens"] == 20
    shapes = [(figure["context"], figure["batch_size"]) for figure in result["decode"]]
    assert shapes == [(16, 1), (16, 2), (33, 1), (33, 2)]
    for figure in result["decode"]:
        assert 0 < figure["seconds"]["p50"] <= figure["seconds"]["p99"]
        assert figure["share_of_floor"] > 0
    concurrency = [(figure["concurrency"], figure["num_requests"]) for figure in result["requests"]]
    assert concurrency == [(1, 4), (2, 4)]
    for figure in result["requests"]:
        assert 0 < figure["ttft"]["p50"] < figure["seconds"]
        assert figure["output_tokens_per_second"] > 0
    assert drawn == [picture]
    for word in ("Prefill of one prompt", "Decode, 2 steps each", "20 tokens in, 3 out"):
        assert word in run.output


@pytest.mark.parametrize(
    ("options", "status", "problem"),
    [
        (["--batch-sizes", "1,0"], 1, "Error: batch size must be at least 1, got 0\n"),
        (["--steps", "0"], 1, "Error: steps must be at least 1, got 0\n"),
        (["--output-tokens", "1"], 1, "Error: output tokens must be 0 or at least 2, got 1\n"),
        (
            ["--output-tokens", "2040"],
            1,
            "prompt and output of 2060 is more than the model's context of 2048",
        ),
        (["--threads", "0"], 1, "Error: threads must be at least 1, got 0\n"),
        (
            ["--contexts", "16,4096"],
            1,
            "Error: context 4096 is more than the model's context of 2048 tokens\n",
        ),
        (["--dtype", "int8"], 1, "Error: dtype 'int8' is not supported; these are: "),
        (["--contexts", "16,much"], 2, "'16,much' is not a list of whole numbers such as 1,4,16"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_one_sentence(
    options: list[str], status: int, problem: str
) -> None:
    run = CliRunner().invoke(main, ["bench", "engine", str(DEMO), *SMALL, *options])
    assert run.exit_code == status
    assert problem in run.output
    assert "Traceback" not in run.output


def test_without_matplotlib_there_is_a_sentence_and_no_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    prefill = PrefillFigure(10, Spread(mean=9.0, p50=2.0, p99=3.0), flop=800, matmul_rate=1600.0)
    result = EngineResult(
        "LlamaForCausalLM", 2, 8, "bfloat16", "cpu", 2, "2.13.0", 2, prefill, [decode_figure()], []
    )
    with pytest.raises(PlotUnavailable, match=r"pip install 'pdengine\[bench\]'"):
        plot(result, tmp_path / "plot.png")
    assert as_json(result)["decode"][0]["share_of_floor"] == 0.5
