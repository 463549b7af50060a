"""Runs one step on the device: chunks in, next tokens out."""

from collections.abc import Callable
from collections.abc import Sequence as Sequence_
from functools import partial

import torch
from torch import Tensor

from pdengine.engine.batch import Batch, build_batch
from pdengine.engine.kv_cache import KVCache
from pdengine.engine.sampler import sampling_arrays
from pdengine.engine.step import BlockCopy, Chunk
from pdengine.engine.step_extras import ScoredPrompts, StepResult
from pdengine.engine.step_upload import upload_for
from pdengine.models.decoder import Decoder
from pdengine.triton_kernels.copy_blocks import copy_blocks
from pdengine.triton_kernels.cpu_layers import MAX_TOKENS
from pdengine.triton_kernels.kernels import SamplingBatch
from pdengine.triton_kernels.logits import Scores, join, score, slice_rows

ReadStep = Callable[[], StepResult]
"""Waits for a step. When it returns, all that the step has stored is in memory: peers may read it, and blocks
may be given to others. Belongs to the thread that started the step."""


class Runner:
    """Owns the model and writes the KV cache. Belongs to the engine thread.

    is_asynchronous: whether a step still runs when `start` returns.
    """

    def __init__(self, model: Decoder, kv_cache: KVCache, device: torch.device) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._device = device
        self.is_asynchronous = device.type == "cuda"
        self._upload = upload_for(device)

    def run(
        self,
        chunks: Sequence_[Chunk],
        after_layer: Callable[[int], None] | None = None,
        copies: Sequence_[BlockCopy] = (),
    ) -> list[int]:
        """`start` a step and wait for its tokens."""
        return self.start(chunks, after_layer, copies)().token_ids

    @torch.inference_mode()
    def start(
        self,
        chunks: Sequence_[Chunk],
        after_layer: Callable[[int], None] | None = None,
        copies: Sequence_[BlockCopy] = (),
    ) -> ReadStep:
        """Do `copies`, all at once, then compute `chunks`. What it returns must be called before the next
        step is started.

        Chunks and sequences are not read any more when it returns. after_layer: see Decoder; what is called
        finds that layer in memory.
        """
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # every thread has one of its own; kernels are launched on it
            after_layer = after_layer and self._waiting(after_layer)
        if copies:
            sources, destinations = zip(*copies, strict=True)
            copy_blocks(self._kv_cache.pool, sources, destinations)
        token_ids = None if after_layer is not None else self._decode(chunks)
        if token_ids is not None:
            return partial(StepResult, token_ids)
        return self._start(chunks, after_layer)

    def _start(self, chunks: Sequence_[Chunk], after_layer: Callable[[int], None] | None) -> ReadStep:
        config = self._model.config
        batch = build_batch(
            chunks,
            self._kv_cache.block_size,
            self._upload,
            eos_token_ids=config.eos_token_ids,
            vocab_size=config.vocab_size,
        )
        hidden = self._model(
            batch.token_ids, batch.positions, self._kv_cache.pool, batch.attention, after_layer
        )
        prompts = batch.extras.prompts
        prompt_scores = None if prompts is None else self._score_prompts(hidden, prompts)
        if not batch.sampled and prompts is None:
            return self._read_nothing
        token_ids, scores = self._sample(hidden, batch)

        def read_step() -> StepResult:
            # Waits for the device, once per step.
            sampled: list[int] = token_ids.tolist()
            answers = batch.extras.answers
            return StepResult(
                sampled,
                None if answers is None or scores is None else answers.read(scores, len(sampled)),
                {} if prompts is None or prompt_scores is None else prompts.read(prompt_scores),
            )

        return read_step

    def _decode(self, chunks: Sequence_[Chunk]) -> list[int] | None:
        """A step that only writes the next token of each sequence, in one native call; None, and nothing
        done, where there is no such call, or it is another step."""
        layers = self._model.fused_layers
        if layers is None or not 0 < len(chunks) <= MAX_TOKENS:
            return None
        sequences = [chunk.sequence for chunk in chunks if chunk.num_tokens == 1 and chunk.samples]
        if len(sequences) < len(chunks) or not all(s.is_plain and not s.siblings for s in sequences):
            return None
        likeliest = layers.decode(
            self._kv_cache.pool,
            [sequence.token_ids[-1] for sequence in sequences],
            [len(sequence.token_ids) for sequence in sequences],
            [sequence.block_ids for sequence in sequences],
        )
        if likeliest is None or all(sequence.sampling.temperature == 0 for sequence in sequences):
            return likeliest
        sampling = SamplingBatch(*map(torch.from_numpy, sampling_arrays(sequences)))
        logits = layers.logits(len(sequences)).to(torch.float32)
        drawn: list[int] = self._model.kernels.sample(logits, sampling).tolist()
        return drawn

    def _sample(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Scores | None]:
        """Draw the next tokens, and score those that are asked about by the model's own logits."""
        if not batch.sampled:
            return torch.empty(0, dtype=torch.int64), None
        logits = self._model.logits(hidden[batch.sampled_rows])
        adjustment, answers = batch.extras.adjustment, batch.extras.answers
        before = None if adjustment is None else adjustment.apply(logits)
        token_ids = self._model.kernels.sample(logits, batch.sampling)
        if answers is None:
            return token_ids, None
        if adjustment is not None and before is not None:
            adjustment.restore(logits, before)
        num_top = max(answers.num_top)
        scores = [
            score(logits[rows], token_ids[rows], num_top)
            for rows in torch.split(answers.rows, slice_rows(logits.shape[1]))
        ]
        return token_ids, join(scores)

    def _score_prompts(self, hidden: Tensor, prompts: ScoredPrompts) -> Scores:
        """In slices: the logits of a whole chunk would take gigabytes."""
        num_rows, num_top = slice_rows(self._model.config.vocab_size), max(prompts.num_top)
        hidden_rows, token_ids = (
            torch.split(column, num_rows) for column in (prompts.hidden_rows, prompts.token_ids)
        )
        return join(
            [
                score(self._model.logits(hidden[rows]), ids, num_top)
                for rows, ids in zip(hidden_rows, token_ids, strict=True)
            ]
        )

    def _read_nothing(self) -> StepResult:
        self._wait()
        return StepResult([])

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _waiting(self, after_layer: Callable[[int], None]) -> Callable[[int], None]:
        def wait_and_call(layer: int) -> None:
            self._wait()
            after_layer(layer)

        return wait_and_call
