"""A decoder with its paged KV cache, driven step by step as an engine would."""

import random
from collections.abc import Mapping, Sequence
from itertools import accumulate, takewhile
from pathlib import Path

import torch
from torch import Tensor

from pdengine.models.config import load_config
from pdengine.models.weights import load_decoder
from pdengine.triton_kernels.attention import AttentionBatch


class PagedModel:
    """Sequences are known by name; their blocks are scattered, and the memory around them is NaN."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32, *, block_size: int = 16) -> None:
        self.config = load_config(directory)
        self.decoder = load_decoder(directory, self.config, dtype=dtype, device=torch.device("cpu"))
        self.decoder.pack()
        config, self.block_size = self.config, block_size
        self.pool = torch.full(
            (400, config.num_kv_heads, config.num_layers, 2, block_size, config.head_dim),
            torch.nan,
            dtype=dtype,
        )
        self.free_blocks = list(range(len(self.pool)))
        random.Random(0).shuffle(self.free_blocks)
        self.block_tables: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    def step(self, new_tokens: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Run one mixed batch; returns float32 logits `[its new tokens, vocab_size]` by sequence."""
        counts = [len(tokens) for tokens in new_tokens.values()]
        positions, block_ids, block_offsets = [], [], []
        for name, tokens in new_tokens.items():
            start = self.lengths.get(name, 0)
            table = self.block_tables.setdefault(name, [])
            for position in range(start, start + len(tokens)):
                if position == len(table) * self.block_size:
                    table.append(self.free_blocks.pop())
                positions.append(position)
                block_ids.append(table[position // self.block_size])
                block_offsets.append(position % self.block_size)
            self.lengths[name] = start + len(tokens)
        tables = [torch.tensor(self.block_tables[name]) for name in new_tokens]
        query_starts = [0, *accumulate(counts)]
        context_lengths = [self.lengths[name] for name in new_tokens]
        batch = AttentionBatch(
            block_ids=torch.tensor(block_ids),
            block_offsets=torch.tensor(block_offsets),
            block_tables=torch.nn.utils.rnn.pad_sequence(tables, batch_first=True),
            query_starts=torch.tensor(query_starts),
            context_lengths=torch.tensor(context_lengths),
            query_starts_on_host=query_starts,
            context_lengths_on_host=context_lengths,
            num_decodes=len(list(takewhile(lambda count: count == 1, counts))),
        )
        token_ids = torch.tensor([token for tokens in new_tokens.values() for token in tokens])
        with torch.inference_mode():
            hidden = self.decoder(token_ids, torch.tensor(positions), self.pool, batch)
            logits = self.decoder.logits(hidden)
        return dict(zip(new_tokens, logits.split(counts), strict=True))

    def grow(self, names: Sequence[str]) -> None:
        """Make room for a token of each, which the caller computes."""
        for name in names:
            table = self.block_tables[name]
            if self.lengths[name] == len(table) * self.block_size:
                table.append(self.free_blocks.pop())
            self.lengths[name] += 1

    def free(self, name: str) -> None:
        self.free_blocks.extend(self.block_tables.pop(name))
        del self.lengths[name]

    def prompt_logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits of one prompt, run alone and in one chunk."""
        logits = self.step({"prompt": tokens})["prompt"]
        self.free("prompt")
        return logits
