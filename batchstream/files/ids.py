"""Are there ids that come twice? Asked by `check`; results go by the ordinal, so that a repeated id breaks nothing
here, but the OpenAI Batch API and joins by id want them unique.

A Bloom filter answers in constant memory. It never misses a repeated id; with the default size it takes a
new id for a repeated one about once in 20 million at 1 million rows, once in 2,700 at 10 million.
"""

from __future__ import annotations

import hashlib

_HASHES = 4
_EXAMPLES = 5


class RepeatedIds:
    """`count`: ids that had (almost certainly) come before; `examples`: the first of them. `bits`: a power of two."""

    def __init__(self, bits: int = 1 << 28) -> None:
        self.count = 0
        self.examples: list[str] = []
        self._bits = bytearray(bits // 8)
        self._mask = bits - 1

    def seen(self, name: str) -> bool:
        """Add an id; True when it was there already."""
        digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8 * _HASHES).digest()
        before = True
        for start in range(0, 8 * _HASHES, 8):
            place = int.from_bytes(digest[start : start + 8], "little") & self._mask
            byte, bit = place >> 3, 1 << (place & 7)
            if not self._bits[byte] & bit:
                before = False
                self._bits[byte] |= bit
        if before:
            self.count += 1
            if len(self.examples) < _EXAMPLES:
                self.examples.append(name)
        return before
