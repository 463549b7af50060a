"""The names of a prompt's blocks, given once, and how to tell from them what a worker's prefix cache has."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from pdengine.models.prefix_hashes import HASH_BYTES, PrefixHashes, prefix_root
from pdengine.transport.messages import PREFIX_TAG_BYTES, PrefixNames

assert array("Q").itemsize == PREFIX_TAG_BYTES
TAGS_PER_NAME = HASH_BYTES // PREFIX_TAG_BYTES


@dataclass(frozen=True)
class PromptPrefix:
    """names: for the workers. tags: the start of each name, as workers announce it. block_size: in tokens."""

    names: PrefixNames
    tags: Sequence[int]
    block_size: int


def name_prefix(model: str, salt: str, token_ids: Sequence[int], block_size: int) -> PromptPrefix:
    """Hash the full blocks of a prompt: about a microsecond each, so off the event loop.

    model: fingerprint. salt: prompts of different salts share no name.
    """
    hashes = PrefixHashes(prefix_root(model, salt), block_size)
    hashes.extend(token_ids)
    packed = hashes.packed()
    return PromptPrefix(PrefixNames(hashes.root, packed), unpack_tags(packed)[::TAGS_PER_NAME], block_size)


def unpack_tags(packed: bytes) -> "array[int]":
    """The tags that lie in `packed` one after the other, as numbers, which take the least memory in a set.

    Raises ValueError unless they are whole.
    """
    return array("Q", packed)
