"""Runs one step on the device: chunks in, next tokens out."""

from collections.abc import Callable
from collections.abc import Sequence as Sequence_

import torch

from pdengine.engine.batch import build_batch
from pdengine.engine.kv_cache import KVCache
from pdengine.engine.scheduler import BlockCopy, Chunk
from pdengine.engine.step_upload import upload_for
from pdengine.models.decoder import Decoder
from pdengine.triton_kernels.copy_blocks import copy_blocks

ReadTokens = Callable[[], list[int]]
"""Waits for a step: the next token of each chunk that samples, in order, and behind it those of the siblings
of its sequence. When it returns, all that the step has stored is in memory: peers may read it, and blocks
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
        return self.start(chunks, after_layer, copies)()

    @torch.inference_mode()
    def start(
        self,
        chunks: Sequence_[Chunk],
        after_layer: Callable[[int], None] | None = None,
        copies: Sequence_[BlockCopy] = (),
    ) -> ReadTokens:
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
        batch = build_batch(chunks, self._kv_cache.block_size, self._upload)
        hidden = self._model(
            batch.token_ids, batch.positions, self._kv_cache.pool, batch.attention, after_layer
        )
        if not batch.sampled:
            return self._read_nothing
        logits = self._model.logits(hidden[batch.sampled_rows])
        # Reading the tokens waits for the device, once per step.
        read_tokens: ReadTokens = self._model.kernels.sample(logits, batch.sampling).tolist
        return read_tokens

    def _read_nothing(self) -> list[int]:
        self._wait()
        return []

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _waiting(self, after_layer: Callable[[int], None]) -> Callable[[int], None]:
        def wait_and_call(layer: int) -> None:
            self._wait()
            after_layer(layer)

        return wait_and_call
