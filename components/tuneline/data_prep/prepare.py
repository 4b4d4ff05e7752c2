"""Raw rows -> PreparedDataset: checked, rendered, tokenized, masked, split, and judged.

1. Sources are read as a stream of blocks, and each block is turned into tokens by one of several
   processes, or found in the cache (`encode.py`).
2. The ledger decides by a few numbers a row which ones stay: duplicates, near duplicates and rows
   that resemble held-out ones go (`ledger.py`).
3. The data contract is drawn up and held against its limits (`contract.py`). Only if it holds are
   the rows that stay written, block by block.

No step needs memory for more than a few blocks and about 100 bytes a row. The split of a row is
decided by a hash of its opening (what comes before the first answer), so that a growing data set
never moves a row from one split to another, and a conversation and its continuation, which share
answers to learn, are never in different ones.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

from tuneline import artifacts, base_model
from tuneline.artifacts import Artifact
from tuneline.data_prep import chat
from tuneline.data_prep.encode import (
    SPLITS,
    Plan,
    cpu_count,
    encode_blocks,
    prune_cache,
    row_schema,
)
from tuneline.data_prep.sources import Block, read_blocks
from tuneline.errors import DataError, RegistryError
from tuneline.progress import report, tick
from tuneline.recipe import DataSection, Source
from tuneline.tracking import Step, Untracked

Split = Literal["train", "validation", "test"]
TEST_ROWS: Final = "test_rows.jsonl"
CONTRACT: Final = "contract.json"
PAGE: Final = "contract.html"
TEMPLATE: Final = "chat_template.jinja"
_SHARD_TOKENS: Final = 64 * 10**6
_TICK_SECONDS: Final = 10.0


def prepare(
    model_reference: str,
    data: DataSection,
    output: Path,
    step: Step | None = None,
    only: Collection[str] | None = None,
) -> Artifact:
    """Prepare a data set for one base model.

    Args:
        model_reference: the base model whose tokenizer and chat template render the rows.
        data: sources, split, length limit and the contract's limits.
        output: folder of the PreparedDataset.
        step: where the contract is recorded, also when it does not hold.
        only: names of the files to read, where others may have come since; None for all.

    Raises:
        DataError: a file that can't be read, a broken contract, or a split without rows. The
            contract's report stays beside `output` and with the step.
        ModelError: the base model can't be used.
    """
    from tuneline.data_prep.ledger import Ledger

    step = step or Untracked()
    base = base_model.resolve(model_reference)
    tokenizer = chat.load_tokenizer(str(base.path), trust_code=base.trusts_code)
    chats = chat.chat_format(tokenizer, base.path, data.fallback_template)
    plans = _plans(data, chats)
    with artifacts.writing(output) as aside:
        shutil.rmtree(_refused(output), ignore_errors=True)  # of a try before
        digests: dict[str, str] = {}
        ledger = Ledger(plans)
        _fill(ledger, data, digests, aside / "scratch", only)
        shutil.rmtree(aside / "scratch", ignore_errors=True)
        contract = _judge(ledger, data, tokenizer, chats.template, output, step)
        _write_rows(ledger, aside)
        (aside / TEMPLATE).write_text(chats.template, encoding="utf-8")
        _write_contract(contract, aside)
        artifacts.seal(
            aside,
            kind="prepared_dataset",
            config=data.model_dump(mode="json"),
            base_model=base.identity(),
            inputs=digests,
        )
    prune_cache()
    _tell(contract)
    return artifacts.load(output, "prepared_dataset")


def _plans(data: DataSection, chats: chat.ChatFormat) -> list[Plan]:
    # what is held out comes first, so that of two equal rows it is the one that counts as known
    sources = [(source, "evaluation") for source in data.evaluation_sets]
    sources += [(source, "test") for source in data.test]
    sources += [(source, "train") for source in data.train]
    return [
        Plan(
            format=chats,
            source=source,
            role=role,
            loss=data.loss,
            # a long row of an evaluation set is compared with all the same
            overflow="truncate_right" if role == "evaluation" else data.overflow,
            max_seq_len=data.max_seq_len,
            test_fraction=data.heldout_test_fraction,
            validation_fraction=data.validation_fraction,
            group_by=data.group_by,
        )
        for source, role in sources
    ]


def _fill(
    ledger: Any,
    data: DataSection,
    digests: dict[str, str],
    scratch_folder: Path,
    only: Collection[str] | None,
) -> None:
    from tuneline.data_prep.duplicates import Scratch, find_similar

    near = data.near_duplicate_similarity < 1
    scratch = Scratch(scratch_folder) if near else None
    blocks = _blocks([plan.source for plan in ledger.plans], digests, only)
    told, rows, started = time.monotonic(), 0, time.monotonic()
    try:
        for encoded in encode_blocks(ledger.plans, blocks, cpu_count()):
            ledger.add(encoded, scratch.add if scratch else None)
            rows = sum(counts["raw_rows"] for counts in ledger.counts)
            if time.monotonic() - told > _TICK_SECONDS:
                told = time.monotonic()
                tick(f"{rows:,} rows, {rows / (told - started):,.0f} rows/s")
    finally:
        if scratch is not None:
            scratch.finish()
    if scratch is None:
        ledger.settle(data, None)
        return
    ledger.settle(data, partial(find_similar, scratch, threshold=data.near_duplicate_similarity))


def _blocks(
    sources: list[Source], digests: dict[str, str], only: Collection[str] | None
) -> Iterator[tuple[int, Block]]:
    for position, source in enumerate(sources):
        for block in read_blocks(source, digests, only):
            yield position, block


def _judge(
    ledger: Any, data: DataSection, tokenizer: Any, template: str, output: Path, step: Step
) -> dict[str, Any]:
    from tuneline.data_prep.contract import contract_of, unusable_sources, violations

    contract = contract_of(ledger, data, tokenizer, template)
    faults = violations(contract) or _empty_split(contract, data) or unusable_sources(contract)
    if not faults:
        return contract
    contract["passed"] = False
    contract["faults"] = faults
    place = _refused(output)
    place.mkdir(parents=True)
    _write_contract(contract, place)
    places = str(place / PAGE)
    # a failed step's outputs are not uploaded on a cluster, so the report goes with its run
    try:
        for name in (PAGE, CONTRACT):
            step.log_file(place / name)
        if not isinstance(step, Untracked):
            places += f", and {PAGE} of this step's MLflow run"
    except RegistryError as error:
        report(f"warning: the report is not in MLflow: {error}")
    examples = "".join(
        f"\n  - {example['where']}: {example['sentence']}"
        for example in contract["bad_row_examples"][:5]
    )
    raise DataError(f"the data contract is broken: {'; '.join(faults)}. See {places}{examples}")


def _refused(output: Path) -> Path:
    return output.with_name(f"{output.name}.refused")


def _empty_split(contract: dict[str, Any], data: DataSection) -> list[str]:
    for split in SPLITS:
        needed = split == "train" or (split == "test" or data.validation_fraction > 0)
        if needed and not contract["splits"][split]["rows"]:
            came, ways = contract["rows_in"], contract["distinct_openings"]
            alike = (
                f"; its rows open alike, in {ways} ways, and those that do stay in one split: name "
                "another column with data.group_by and set data.leakage to report"
                if 2 * ways < came
                else ""
            )
            return [
                f"the {split} split has no rows ({came} came in, "
                f"{came - contract['rows_out']} were dropped: "
                f"{contract['bad_rows_dropped']} can't be used, "
                f"{contract['too_long_dropped']} longer than max_seq_len {data.max_seq_len}, "
                f"{contract['unsupervised_dropped']} without a token to learn, "
                f"{contract['duplicates_dropped']} duplicates, "
                f"{contract['near_duplicates_dropped']} near duplicates, "
                f"{contract['in_test_dropped']} known from held-out rows, "
                f"{contract['leaking_dropped']} like a held-out row): give more rows, a larger "
                f"fraction or a larger max_seq_len{alike}"
            ]
    return []


def _write_contract(contract: dict[str, Any], folder: Path) -> None:
    from tuneline.data_prep.report import render_contract

    text = json.dumps(contract, indent=2, ensure_ascii=False)
    (folder / CONTRACT).write_text(text + "\n", encoding="utf-8")
    (folder / PAGE).write_text(render_contract(contract), encoding="utf-8")


def _write_rows(ledger: Any, folder: Path) -> None:
    import numpy as np

    sinks = [_Shards(folder, split) for split in SPLITS]
    with (folder / TEST_ROWS).open("w", encoding="utf-8") as test_rows:
        for number, block in enumerate(ledger.blocks):
            part = ledger.rows_of(number)
            times, group = ledger.times[part], ledger.group[part]
            if not times.any():
                continue
            pieces = ledger.number("pieces")[part]
            table = block.rows().drop_columns("row")
            for position, sink in enumerate(sinks):
                wanted = np.where(group == position, times, 0)
                if wanted.any():
                    sink.write(_repeated(table, np.repeat(wanted, pieces)))
            if (group[times > 0] == SPLITS.index("test")).any():
                keep = (group == SPLITS.index("test")) & (times > 0)
                texts = block.index().column("test_row").filter(keep).to_pylist()
                test_rows.writelines(f"{text}\n" for text in texts)
    for sink in sinks:
        sink.close()


def _repeated(table: Any, times: Any) -> Any:
    import numpy as np
    import pyarrow as pa

    if times.max() <= 1:
        return table.filter(pa.array(times > 0))
    return table.take(pa.array(np.repeat(np.arange(len(times)), times)))


class _Shards:
    """Writes one split as Arrow streams of a bounded size, which `datasets` maps into memory."""

    def __init__(self, folder: Path, split: str) -> None:
        self._folder, self._split, self._count = folder, split, 0
        self._open()

    def _open(self) -> None:
        import pyarrow as pa

        path = self._folder / f"{self._split}-{self._count:05}.arrow"
        self._writer = pa.ipc.new_stream(str(path), row_schema())
        self._count += 1
        self._tokens = 0

    def write(self, table: Any) -> None:
        """Append rows."""
        if self._tokens > _SHARD_TOKENS:
            self._writer.close()
            self._open()
        self._writer.write_table(table.combine_chunks())
        self._tokens += sum(len(c.flatten()) for c in table.column("input_ids").chunks)

    def close(self) -> None:
        """No more rows come."""
        self._writer.close()


def _tell(contract: dict[str, Any]) -> None:
    lost = {
        "can't be used": contract["bad_rows_dropped"],
        "too long": contract["too_long_dropped"],
        "without a token to learn": contract["unsupervised_dropped"],
        "duplicates": contract["duplicates_dropped"],
        "near duplicates": contract["near_duplicates_dropped"],
        "known from held-out rows": contract["in_test_dropped"],
        "like a held-out row": contract["leaking_dropped"],
        "not in the sample": contract["not_sampled"],
    }
    dropped = ", ".join(f"{count} {reason}" for reason, count in lost.items() if count)
    report(f"{contract['rows_in']} rows came in" + (f"; dropped: {dropped}" if dropped else ""))
    for split, counts in contract["splits"].items():
        share = counts["supervised_tokens"] / max(counts["tokens"], 1)
        report(f"{split}: {counts['rows']} rows, {counts['tokens']} tokens, {share:.0%} supervised")


def load_split(dataset: Artifact, split: Split) -> Any:
    """A `datasets.Dataset` over one split, mapped from disk, nothing copied."""
    from datasets import Dataset, concatenate_datasets

    shards = sorted(dataset.path.glob(f"{split}-*.arrow"))
    return concatenate_datasets([Dataset.from_file(str(shard)) for shard in shards])
