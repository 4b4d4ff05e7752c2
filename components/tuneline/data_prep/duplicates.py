"""Near duplicates: MinHash signatures of what was said, and who resembles whom.

A row is the set of its five-word sequences; in scripts that put no spaces between words, each
character is one. Its
signature has 128 minimal hashes; two rows' share of equal ones estimates the Jaccard similarity of
their sets (Broder 1997), with a standard error of at most 0.045. Pairs are looked for among rows
that agree in one of 16 bands of 8 hashes: at a similarity of 0.9 a pair is missed once in 10,000,
and one of 0.5 is looked at in 6 % of the cases. Every pair is checked by its signatures before it
counts.

The rows' bands are gone through one at a time, from disk: what has to be in memory is about 40
bytes a row.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np

PERMUTATIONS: Final = 128
BANDS: Final = 16
_WIDTH: Final = PERMUTATIONS // BANDS
_SEED: Final = 20
_WORDS: Final = 5
_LONG_WORD: Final = 24
"""Characters of a word on average from which they are no words."""
_PADDING: Final = ["\n"] * (_WORDS - 1)  # no word: words are split at white space
_FACTOR: Final = 0x9E3779B97F4A7C15  # an odd 64-bit constant that spreads bits (golden ratio)
_PAIRS_AT_ONCE: Final = 16384
# Thai, Lao, Myanmar, Khmer, kana and Han, with the planes that hold only more of Han
_ALONE: Final = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u19e0-\u19ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff"
)
_HAS_ALONE: Final = re.compile(f"[{_ALONE}]")
_WORD: Final = re.compile(rf"[{_ALONE}]|[^\s{_ALONE}]+")


def signatures(rows: Sequence[Sequence[str]]) -> np.ndarray:
    """MinHash signatures of rows of words, (N, 128) uint32."""
    import numpy as np
    from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]  it ships no types

    if not rows:
        return np.empty((0, PERMUTATIONS), np.uint32)
    words: list[str] = []
    for row in rows:  # padded, so that a row has a sequence for each of its words, also if few
        words += row
        words += _PADDING
    counts = np.fromiter(map(len, rows), np.int64, len(rows)) + len(_PADDING)
    (hashes,) = RMinHash.hash_token_sets([words])
    flat = np.fromiter(hashes, np.uint64, len(hashes))
    mixed = flat.copy()
    factor = np.uint64(_FACTOR)
    keep = np.ones(len(flat), bool)
    ends = np.cumsum(counts)
    for step in range(1, _WORDS):
        mixed[: len(mixed) - step] = mixed[: len(mixed) - step] * factor + flat[step:]
        keep[ends - step] = False
    counts -= len(_PADDING)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        mixed[keep], offsets, PERMUTATIONS, _SEED
    )
    values = array("I")  # takes Python's numbers three times as fast as numpy
    for row in matrix.to_rows():
        values.fromlist(row)
    return np.frombuffer(values, np.uint32).reshape(-1, PERMUTATIONS)


def units(text: str) -> list[str]:
    """The words of a text in lower case; of scripts without spaces between words, characters."""
    return units_of_all([text])[0]


def units_of_all(texts: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The words of texts that belong together, and those of each.

    One endless word, of a text without spaces, is its characters; of several texts only where they
    all together are such.
    """
    texts = [text.lower() for text in texts]
    alone = any(not text.isascii() and _HAS_ALONE.search(text) for text in texts)
    each = [_WORD.findall(text) if alone else text.split() for text in texts]
    words = each[0] if len(each) == 1 else list(chain.from_iterable(each))
    if not alone and len(words) * _LONG_WORD < sum(map(len, texts)) + len(texts) - 1:
        return list("\n".join(texts)), each
    return words, each


def band_keys(signature: np.ndarray) -> np.ndarray:
    """One 64-bit key per band: (N, 128) uint32 -> (BANDS, N) uint64."""
    import numpy as np

    bands = signature.reshape(len(signature), BANDS, _WIDTH).astype(np.uint64)
    keys = np.zeros((len(signature), BANDS), np.uint64)
    for column in range(_WIDTH):
        keys = (keys ^ bands[:, :, column]) * np.uint64(_FACTOR)
        keys ^= keys >> np.uint64(29)
    return np.ascontiguousarray(keys.T)


class Scratch:
    """The signatures and band keys of all rows, on disk, in row order."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._signatures = folder / "signatures"
        self._bands = [folder / f"band-{band:02}" for band in range(BANDS)]
        self._files = [path.open("wb") for path in (self._signatures, *self._bands)]

    def add(self, signature: np.ndarray) -> None:
        """Append rows, (N, 128) uint32."""
        import numpy as np

        self._files[0].write(np.ascontiguousarray(signature).data)
        for file, keys in zip(self._files[1:], band_keys(signature), strict=True):
            file.write(keys.data)

    def finish(self) -> None:
        """No more rows come."""
        for file in self._files:
            file.close()

    def band(self, number: int) -> np.ndarray:
        """The keys of one band, (N,) uint64."""
        import numpy as np

        return np.fromfile(self._bands[number], np.uint64)

    def similarity(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Estimated Jaccard similarity of the pairs of rows (left[i], right[i])."""
        import numpy as np

        if not len(left):
            return np.empty(0, np.float32)
        rows = np.memmap(self._signatures, np.uint32, "r").reshape(-1, PERMUTATIONS)
        result = np.empty(len(left), np.float32)
        for start in range(0, len(left), _PAIRS_AT_ONCE):
            part = slice(start, start + _PAIRS_AT_ONCE)
            result[part] = (rows[left[part]] == rows[right[part]]).mean(axis=1)
        return result


def find_similar(
    scratch: Scratch,
    group: np.ndarray,
    alive: np.ndarray,
    threshold: float,
    on_band: Callable[[int], None] = lambda band: None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Who resembles whom.

    Args:
        scratch: of the rows.
        group: (N,) int; 0 is the training split, 1 validation, higher ones are held out from both.
        alive: (N,) bool; the rows to look at.
        threshold: least similarity.
        on_band: called after each band.

    Returns:
        twin: (N,) int64; an earlier row of the same group that this one repeats, or -1.
        leak: (N,) int64; for a training row a held-out one that it resembles, for a held-out row a
            training row, or -1.
        echo: (N,) int64; for a validation row one of a higher group that it resembles, or -1.
    """
    import numpy as np

    twin = np.full(len(group), -1, np.int64)
    leak = np.full(len(group), -1, np.int64)
    echo = np.full(len(group), -1, np.int64)
    for number in range(BANDS):
        rows = np.flatnonzero(alive & (twin < 0))
        keys = scratch.band(number)[rows]
        # the training rows come first in a run of equal keys; each group is in its own order
        order = np.lexsort((rows, group[rows], keys))
        rows, keys = rows[order], keys[order]
        groups = group[rows]
        held = np.flatnonzero(groups > 0)
        for targets, pairs in (
            (twin, _same_group(keys, groups)),
            (leak, _across(keys, groups)),
            (echo, [(held[a], held[b]) for a, b in _across(keys[held], groups[held] - 1)[:1]]),
        ):
            for left, right in pairs:
                todo = targets[rows[left]] < 0
                left, right = rows[left[todo]], rows[right[todo]]
                similar = scratch.similarity(left, right) >= threshold
                targets[left[similar]] = right[similar]
        on_band(number + 1)
    return twin, leak, echo


def _opens(keys: np.ndarray) -> np.ndarray:
    import numpy as np

    opens = np.ones(len(keys), bool)
    opens[1:] = keys[1:] != keys[:-1]
    return opens


def _same_group(keys: np.ndarray, group: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Positions of rows with the one before them, and with the first, of their key and group."""
    import numpy as np

    opens = _opens(keys)
    opens[1:] |= group[1:] != group[:-1]
    follows = np.flatnonzero(~opens)
    first = np.maximum.accumulate(np.where(opens, np.arange(len(keys)), 0))
    return [(follows, follows - 1), (follows, first[follows])]


def _across(keys: np.ndarray, group: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Positions of training rows with the first held-out row of their key, and the other way."""
    import numpy as np

    opens = _opens(keys)
    run = np.cumsum(opens) - 1
    trains = np.flatnonzero(group == 0)
    leads = np.flatnonzero((group > 0) & (opens | (np.roll(group, 1) == 0)))
    held = np.full(run[-1] + 1 if len(run) else 0, -1, np.int64)
    held[run[leads]] = leads
    trains = trains[held[run[trains]] >= 0]
    first = np.flatnonzero(opens)
    helds = np.flatnonzero(group > 0)
    helds = helds[group[first[run[helds]]] == 0]
    return [(trains, held[run[trains]]), (helds, first[run[helds]])]
