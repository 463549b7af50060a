"""Runs one step on the device: chunks in, next tokens out."""

from collections.abc import Callable
from collections.abc import Sequence as Sequence_

import torch

from pdengine.engine.batch import build_batch
from pdengine.engine.kv_cache import KVCache
from pdengine.engine.scheduler import Chunk
from pdengine.engine.step_upload import upload_for
from pdengine.models.decoder import Decoder


class Runner:
    """Owns the model and writes the KV cache. Belongs to the engine thread."""

    def __init__(self, model: Decoder, kv_cache: KVCache, device: torch.device) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._device = device
        self._upload = upload_for(device)

    @torch.inference_mode()
    def run(self, chunks: Sequence_[Chunk], after_layer: Callable[[int], None] | None = None) -> list[int]:
        """Compute `chunks`; the next token of each chunk that samples, in order. after_layer: see Decoder."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # every thread has one of its own; kernels are launched on it
        batch = build_batch(chunks, self._kv_cache.block_size, self._upload)
        hidden = self._model(
            batch.token_ids, batch.positions, self._kv_cache.pool, batch.attention, after_layer
        )
        if not batch.sampled:
            return []
        logits = self._model.logits(hidden[batch.sampled_rows])
        # The one place that waits for the device: after it, all that the step has stored is in memory.
        token_ids: list[int] = self._model.kernels.sample(logits, batch.sampling).tolist()
        return token_ids
