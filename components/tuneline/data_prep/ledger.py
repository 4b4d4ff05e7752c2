"""Which of the prepared rows stay, and where the others went: duplicates, leakage, weights.

The ledger holds a few numbers a row (about 60 bytes), never the rows themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from tuneline.data_prep.encode import SPLITS, EncodedBlock, Plan, metadata_of
from tuneline.recipe import DataSection

if TYPE_CHECKING:
    import numpy as np

_EXAMPLES: Final = 20
_SAMPLES: Final = 300
_SAMPLE_CHARACTERS: Final = 10**7
_NUMBERS: Final = (
    "row", "content", "opening", "question", "group", "id", "split", "pieces", "tokens",
    "supervised", "longest", "turns", "ends",
)  # fmt: skip
EVALUATION: Final = len(SPLITS)
"""Group of the evaluation sets' rows; the splits' groups are their positions in `SPLITS`."""


@dataclass
class Ledger:
    """The rows of all blocks, in order: evaluation sets, test sources, training sources."""

    plans: list[Plan]
    blocks: list[EncodedBlock] = field(default_factory=list)
    counts: list[Counter[str]] = field(default_factory=list)
    """By plan: `raw_rows`, `too_long`, `unsupervised`, `format:NAME` and so on."""
    bad: list[Counter[str]] = field(default_factory=list)
    """By plan: reason -> rows."""
    examples: list[dict[str, str]] = field(default_factory=list)
    """The first bad rows: where, reason, sentence."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    leaks: list[dict[str, str]] = field(default_factory=list)
    """Examples: a training row and the held-out row that it resembles."""
    left_leaking: int = 0
    """Held-out rows that a row which stays in training resembles."""
    repeated_ids: int = 0

    def __post_init__(self) -> None:
        self.counts = [Counter() for _ in self.plans]
        self.bad = [Counter() for _ in self.plans]
        self._columns: dict[str, list[np.ndarray]] = {name: [] for name in _NUMBERS}
        self._all: dict[str, np.ndarray] = {}
        self._sizes: list[int] = []
        self._sampled = 0
        self._has_chat = False

    def add(self, block: EncodedBlock, signatures: Callable[[Any], None] | None) -> None:
        """Take a block's index."""
        index = block.index()
        metadata = metadata_of(index)
        for name in _NUMBERS:
            # a copy: a view would keep the whole index in memory, ten times as much
            self._columns[name].append(index.column(name).to_numpy().copy())
        if signatures is not None:
            import numpy as np

            flat = index.column("signature").combine_chunks()
            values = flat.flatten().to_numpy() if len(flat) else np.empty(0, np.uint32)
            signatures(values.reshape(len(flat), -1) if len(flat) else values.reshape(0, 128))
        self._sizes.append(index.num_rows)
        self.blocks.append(block)
        self.counts[block.plan].update(metadata["counts"])
        self.bad[block.plan].update(metadata["bad"])
        for row, reason, sentence in metadata["examples"]:
            if len(self.examples) < _EXAMPLES:
                self.examples.append(
                    {"where": block.block.where(row), "reason": reason, "sentence": sentence}
                )
        if samples := metadata["samples"]:
            if len(self.samples) > _SAMPLES // 3:  # one of each of the later blocks
                # a chat if there is one: what serving renders is compared with those
                some = [sample for sample in samples if sample["messages"]] or samples
                samples = [some[len(self.blocks) % len(some)]]
            label = self.plans[block.plan].source.label
            for sample in samples:
                self._sampled += len(sample["text"])
                first_chat = bool(sample["messages"]) and not self._has_chat
                self._has_chat |= first_chat
                if first_chat or (
                    len(self.samples) < _SAMPLES and self._sampled < _SAMPLE_CHARACTERS
                ):
                    where = block.block.where(sample["row"])
                    self.samples.append(sample | {"where": where, "source": label})

    def settle(self, data: DataSection, similar: Any) -> None:
        """Decide which rows stay.

        Args:
            data: the limits of similarity and what to do with leakage.
            similar: `group, alive -> twin, leak, echo` of `duplicates.find_similar`, or None for
                exact duplicates only.
        """
        import numpy as np

        for name in _NUMBERS:
            parts = self._columns.pop(name)
            self._all[name] = np.concatenate(parts) if parts else np.empty(0, np.uint32)
        block_of = np.repeat(np.arange(len(self.blocks)), self._sizes)
        plan_of = np.asarray([b.plan for b in self.blocks], np.int64)[block_of]
        roles = np.asarray([_ROLES[plan.role] for plan in self.plans], np.int64)[plan_of]
        group = np.where(roles == _ROLES["evaluation"], EVALUATION, self._all["split"]).astype(
            np.int64
        )
        self.group, self._block_of, self.plan_of = group, block_of, plan_of
        self.alive = np.ones(len(group), bool)
        self._resembled = np.zeros(len(group), bool)
        self._left = np.zeros(len(group), bool)
        # by role and split: of equal rows in several splits it is not the order that decides
        self._drop(_repeats(self._all["content"], roles * 8 + group), "duplicates")
        self._settle_equal(data, heldout_of_its_own=roles == _ROLES["train"])
        ids = self._all["id"]
        self.repeated_ids = int((_repeats(ids, plan_of) & (ids != 0) & self.alive).sum())
        if similar is not None:
            self._settle_similar(data, *similar(group, self.alive))
        self.left_leaking = int((self._left & self.alive).sum())
        self._weigh()

    def _settle_equal(self, data: DataSection, heldout_of_its_own: np.ndarray) -> None:
        """Rows that say the same as one of a split that is held out from theirs.

        Questions are compared with given test and evaluation rows only: within a source, one
        question under several system messages is several tasks.
        """
        import numpy as np

        train = (self.group == 0) & self.alive
        heldout = (self.group > 0) & self.alive
        known, asked = np.zeros(len(train), bool), np.zeros(len(train), bool)
        self._all["question"] = np.where(
            heldout & heldout_of_its_own, 0, self._all["question"]
        ).astype(np.uint64)
        for name in ("content", "group", "opening", "question"):
            values = self._all[name]
            found = train & (values != 0) & np.isin(values, np.unique(values[heldout]))
            # the answer is another one, which is for `leakage` to decide
            (asked if name in ("opening", "question") else known)[found] = True
            self._resembled |= heldout & (values != 0) & np.isin(values, np.unique(values[found]))
        if data.leakage == "drop":
            known |= asked
        else:
            asked &= ~known
            for name in ("opening", "question"):
                values = self._all[name]
                self._left |= (
                    heldout & (values != 0) & np.isin(values, np.unique(values[train & asked]))
                )
        # what picks the best checkpoint may not have seen the test either
        later = (self.group > 1) & self.alive
        for name in ("content", "group"):
            values = self._all[name]
            repeats = np.isin(values, np.unique(values[later])) & (values != 0)
            known |= (self.group == 1) & self.alive & repeats
        self._drop(known, "in_test")

    def _settle_similar(
        self, data: DataSection, twin: np.ndarray, leak: np.ndarray, echo: np.ndarray
    ) -> None:
        import numpy as np

        self._drop(twin >= 0, "near_duplicates")
        self._drop(echo >= 0, "leaking")
        train = (self.group == 0) & self.alive & (leak >= 0)
        heldout = np.flatnonzero((self.group > 0) & self.alive & (leak >= 0))
        train[leak[heldout]] |= self.alive[leak[heldout]]
        hit = np.union1d(heldout, leak[np.flatnonzero(train & (leak >= 0))])
        self._resembled[hit] = True
        for row in np.flatnonzero(train & (leak >= 0))[:_EXAMPLES]:
            self.leaks.append(
                {
                    "train": self.where(int(row)),
                    "heldout": self.where(int(leak[row])),
                    "split": (*SPLITS, "evaluation set")[self.group[leak[row]]],
                }
            )
        if data.leakage == "drop":
            self._drop(train, "leaking")
        else:
            self._left[hit] = True

    def _weigh(self) -> None:
        """How often each row is written: once, or by its source's weight where it is trained on."""
        import numpy as np

        weights = np.asarray([plan.source.weight for plan in self.plans])[self.plan_of]
        whole = np.floor(weights)
        # the same rows stay in a sample when the data grows
        mixed = self._all["content"].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        extra = mixed.astype(np.float64) / 2**64 < weights - whole
        times = (whole + extra).astype(np.int64)
        self.times = np.where(self.group == 0, times, 1) * self.alive
        unsampled = self.alive & (self.times == 0)
        self.dropped["not_sampled"] += int(unsampled.sum())
        self.alive &= ~unsampled
        self.times[self.group == EVALUATION] = 0

    def _drop(self, rows: np.ndarray, reason: str) -> None:
        rows = rows & self.alive
        self.dropped[reason] += int((rows & (self.group != EVALUATION)).sum())
        self.alive &= ~rows

    def where(self, row: int) -> str:
        """The place of a row, for a person."""
        return self.blocks[self._block_of[row]].block.where(int(self._all["row"][row]))

    def resembled(self) -> dict[str, int]:
        """Held-out rows that a training row resembled, dropped or not, by source or split."""
        names = [
            self.plans[self.plan_of[row]].source.label
            if self.group[row] == EVALUATION
            else SPLITS[self.group[row]]
            for row in self._resembled.nonzero()[0]
        ]
        return dict(Counter(names).most_common())

    def rows_of(self, block: int) -> slice:
        """Positions of a block's rows."""
        import numpy as np

        if not hasattr(self, "_ends_of"):
            self._ends_of = np.cumsum(self._sizes)
        end = int(self._ends_of[block])
        return slice(end - self._sizes[block], end)

    def number(self, name: str) -> np.ndarray:
        """One column of all rows."""
        return self._all[name]


_ROLES: Final = {"evaluation": 0, "test": 1, "train": 2}


def _repeats(values: np.ndarray, within: np.ndarray) -> np.ndarray:
    """True where an earlier row of the same class has the same value."""
    import numpy as np

    order = np.lexsort((values, within))  # stable: of equal ones the earliest comes first
    same = np.zeros(len(values), bool)
    ordered, classes = values[order], within[order]
    same[order[1:]] = (ordered[1:] == ordered[:-1]) & (classes[1:] == classes[:-1])
    return same
