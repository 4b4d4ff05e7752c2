"""The rows that every model is evaluated on."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tuneline.artifacts import Artifact, digest_of
from tuneline.data_prep.prepare import TEST_ROWS, load_split
from tuneline.errors import ArtifactError, DataError

_MOST_SLICES: Final = 100


@dataclass(frozen=True)
class EvalRow:
    """One row of the test split."""

    number: int
    """In the split, from 0."""
    fields: Mapping[str, Any]
    """As prepared: `prompt`, `question`, `reference`, `columns`; more keys are kept."""
    input_ids: Sequence[int]
    supervised: Sequence[int]
    """1 where a token is to be predicted, as long as `input_ids`."""
    final: str | None = None
    """The reference without what the template adds to it, where that was found out."""

    @property
    def prompt(self) -> str | None:
        """Rendered by the chat template; None for a row of plain text, which has no answer."""
        return self.fields.get("prompt")

    @property
    def rendered_reference(self) -> str:
        """The answer that is wanted, with all that the template has the model write."""
        return self.fields.get("reference") or ""

    @property
    def reference(self) -> str:
        """The answer that is wanted, as generated ones are compared with it."""
        return self.rendered_reference if self.final is None else self.final

    @property
    def question(self) -> str:
        """What a person reads as the question."""
        return self.fields.get("question") or ""

    def column(self, name: str) -> str | None:
        """The value of a column of the raw row, as text; None where the row has none."""
        columns = self.fields.get("columns")
        value = (columns if isinstance(columns, Mapping) else {}).get(name, self.fields.get(name))
        if value is None or isinstance(value, str):
            return value
        return json.dumps(value, ensure_ascii=False, sort_keys=True)


def read_test_rows(dataset: Artifact, max_rows: int) -> list[EvalRow]:
    """At most `max_rows` rows of the test split, in its order.

    Of a larger split those with the lowest hash are taken: as good as a random draw, the same for
    every model and run, and mostly the same when the split grows.

    Raises:
        ArtifactError: texts and tokens of the split are not of the same rows.
        DataError: there is no row.
    """
    with (dataset.path / TEST_ROWS).open("rb") as file:
        chosen = heapq.nsmallest(
            max_rows, ((hashlib.sha256(line).digest(), n, line) for n, line in enumerate(file))
        )
    with (dataset.path / TEST_ROWS).open("rb") as file:
        texts = sum(1 for _ in file)
    tokens = load_split(dataset, "test")
    if texts == 0 and len(tokens):  # plain text: nothing to answer
        chosen = [(b"", number, b"{}") for number in range(min(max_rows, len(tokens)))]
    elif texts != len(tokens):
        raise ArtifactError(
            f"{dataset.path}: the test split has {texts} rows of text and {len(tokens)} of tokens, "
            "so they can't be told to be the same: prepare the data again"
        )
    if not chosen:
        raise DataError(f"{dataset.path}: the test split has no rows: give test rows")
    chosen.sort(key=lambda item: item[1])
    picked = tokens.select([number for _, number, _ in chosen])
    return [
        EvalRow(number, json.loads(line), row["input_ids"], row["supervised"])
        for (_, number, line), row in zip(chosen, picked, strict=True)
    ]


def digest_of_rows(rows: Sequence[EvalRow]) -> str:
    """The identity of the evaluation set: what is asked and what is wanted, whatever the base."""
    return digest_of(
        [
            list(row.input_ids) if row.prompt is None else [row.prompt, row.rendered_reference]
            for row in rows
        ]
    )


def slices_of(
    rows: Sequence[EvalRow], columns: Sequence[str]
) -> dict[str, dict[str | None, list[int]]]:
    """For each column its values, each with the positions of its rows in `rows`.

    Rows without the column are the last slice, with None for a value.

    Raises:
        DataError: no row has the column, or it has too many values to be a slice.
    """
    found: dict[str, dict[str | None, list[int]]] = {}
    for column in columns:
        groups: dict[str, list[int]] = {}
        outside: list[int] = []
        for position, row in enumerate(rows):
            value = row.column(column)
            (outside if value is None else groups.setdefault(value, [])).append(position)
        if not groups:
            known = sorted({name for row in rows for name in row.fields.get("columns") or {}})
            raise DataError(
                f"evaluation.slices: no test row has a column '{column}'; columns are "
                f"{', '.join(known) if known else 'none'}"
            )
        if len(groups) > _MOST_SLICES:
            raise DataError(
                f"evaluation.slices: column '{column}' has {len(groups)} values in {len(rows)} "
                f"test rows; at most {_MOST_SLICES} can be told apart: name a column with fewer"
            )
        found[column] = {**dict(sorted(groups.items())), **({None: outside} if outside else {})}
    return found
