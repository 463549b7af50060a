"""Names for the KV cache of a prefix: each full block by a hash of all tokens up to its end.

Two blocks have the same name only if the model, the salt and every token before the block's end are the
same, so a block that is found by its name can be used as it is (the idea is vLLM's automatic prefix caching).
The hash is cryptographic and keyed by a salt: a tenant can neither make a prompt whose name is another one's,
nor learn by the time of an answer what another tenant with another salt has asked.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

HASH_BYTES = 16


def prefix_root(model: str, salt: str = "") -> bytes:
    """The name of the empty prefix, `HASH_BYTES` long. model: fingerprint of what computes the KV cache."""
    root = blake2b(b"pdengine prefix", digest_size=HASH_BYTES)
    for text in (model, salt):
        data = text.encode()
        root.update(len(data).to_bytes(8, "little") + data)
    return root.digest()


class PrefixHashes:
    """The names of the full blocks of one growing sequence of tokens; each is computed once."""

    def __init__(self, root: bytes, block_size: int, blocks: Sequence[bytes] = ()) -> None:
        self.root = root
        self.block_size = block_size
        self.blocks = list(blocks)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Name the full blocks of `token_ids` that have none yet. The tokens named before are not read."""
        name = self.blocks[-1] if self.blocks else self.root
        size = self.block_size
        for start in range(len(self.blocks) * size, len(token_ids) - size + 1, size):
            tokens = array("q", token_ids[start : start + size]).tobytes()
            name = blake2b(name + tokens, digest_size=HASH_BYTES).digest()
            self.blocks.append(name)

    def packed(self) -> bytes:
        """All names, one after the other, as they cross the wire."""
        return b"".join(self.blocks)


def unpack_hashes(packed: bytes) -> list[bytes]:
    """The names that `PrefixHashes.packed` made."""
    return [packed[start : start + HASH_BYTES] for start in range(0, len(packed), HASH_BYTES)]
