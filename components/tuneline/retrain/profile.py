"""What the rows of a recipe are now: which files, how many rows, which words.

One pass over the raw rows, as a stream; nothing is tokenized. The words come from a sample of rows
that depends on their content alone, so that the same rows give the same profile in any order.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tuneline.data_prep.sources import Block, read_blocks
from tuneline.recipe import DataSection
from tuneline.retrain.fingerprints import Collector, Fingerprints

_SAMPLE_ROWS: Final = 2000
_WORD_BUCKETS: Final = 1024
_LENGTH_BUCKETS: Final = 32
_KEY: Final = re.compile(rb'"[^"\\]*"\s*:')
"""Of JSON: every row has the same."""
_WORD: Final = re.compile(rb"[^\W\d_]+|\d+|[\x80-\xff]+")


@dataclass(frozen=True)
class Profile:
    """A state of a recipe's data."""

    digests: dict[str, str]
    """File or data set -> digest of its content; a hub's data set is at a pinned commit."""
    rows: int
    """To train on, before any is refused or dropped."""
    words: list[int]
    """How often words of the sampled rows fall into each of 1,024 buckets by their hash."""
    lengths: list[int]
    """How many sampled rows have a size in bytes of each power of two."""

    fingerprints: Fingerprints | None = None
    """Of the rows to train on; None for a profile of a tuneline that took none."""

    def as_json(self) -> dict[str, Any]:
        """A JSON value."""
        taken = self.fingerprints
        return {**vars(self), "fingerprints": taken.as_json() if taken else None}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Profile:
        """What `as_json` gave."""
        taken = value.get("fingerprints")
        return Profile(
            **{**value, "fingerprints": Fingerprints.from_json(taken) if taken else None}
        )


def profile_of(data: DataSection) -> Profile:
    """Read all sources of a recipe once.

    Raises:
        DataError: a file can't be read.
    """
    digests: dict[str, str] = {}
    rows = 0
    sample: list[tuple[int, bytes]] = []
    fingerprints = Collector()
    for source in data.train:
        for block in read_blocks(source, digests):
            for text in _texts(block):
                rows += 1
                # a heap of the lowest hashes: a sample of all rows, whichever come first
                hashed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
                fingerprints.add(hashed >> 32)
                rank = -hashed
                if len(sample) < _SAMPLE_ROWS:
                    heapq.heappush(sample, (rank, text))
                elif rank > sample[0][0]:
                    heapq.heapreplace(sample, (rank, text))
    for source in (*data.test, *data.evaluation_sets):
        for _ in read_blocks(source, digests):
            pass
    words, lengths = [0] * _WORD_BUCKETS, [0] * _LENGTH_BUCKETS
    for _, text in sample:
        lengths[min(len(text).bit_length(), _LENGTH_BUCKETS - 1)] += 1
        for word in _WORD.findall(_KEY.sub(b" ", text).lower()):
            words[zlib.crc32(word) % _WORD_BUCKETS] += 1
    return Profile(digests, rows, words, lengths, fingerprints.result())


def _texts(block: Block) -> Iterator[bytes]:
    if block.kind == "arrow":
        import pyarrow as pa

        for row in pa.ipc.open_stream(block.payload).read_all().to_pylist():
            yield json.dumps(row, sort_keys=True, default=str, ensure_ascii=False).encode()
        return
    for line in block.payload.split(b"\n"):
        if text := line.strip():
            yield text


def drift_between(before: Profile, now: Profile) -> float:
    """How far two states of data are apart: 0, as alike as can be, to 1, with nothing in common.

    The Jensen-Shannon distance (base 2; Endres and Schindelin 2003) between the frequencies of
    words, or between those of row lengths, whichever is larger. Two samples of the demo's orders
    are 0.13 apart, orders with another vocabulary 0.49, other texts 0.88.
    """
    from scipy.spatial.distance import jensenshannon

    return max(
        float(jensenshannon(old, new, base=2))
        for old, new in ((before.words, now.words), (before.lengths, now.lengths))
    )
