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


class Runner:
    """Owns the model and writes the KV cache. Belongs to the engine thread."""

    def __init__(self, model: Decoder, kv_cache: KVCache, device: torch.device) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._device = device
        self._upload = upload_for(device)

    @torch.inference_mode()
    def run(
        self,
        chunks: Sequence_[Chunk],
        after_layer: Callable[[int], None] | None = None,
        copies: Sequence_[BlockCopy] = (),
    ) -> list[int]:
        """Do `copies`, all at once, then compute `chunks`; the next token of each chunk that samples, in
        order, and behind it those of the siblings of its sequence.

        When it returns, all that the step has stored is in memory: peers may read it, and blocks may be given
        to others. after_layer: see Decoder; what is called finds that layer in memory, too.
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
            self._wait()
            return []
        logits = self._model.logits(hidden[batch.sampled_rows])
        # Reading the tokens waits for the device, once per step.
        token_ids: list[int] = self._model.kernels.sample(logits, batch.sampling).tolist()
        return token_ids

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _waiting(self, after_layer: Callable[[int], None]) -> Callable[[int], None]:
        def wait_and_call(layer: int) -> None:
            self._wait()
            after_layer(layer)

        return wait_and_call
