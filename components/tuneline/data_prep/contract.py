"""The data contract: what came in, what became of it, and whether that is within the limits."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from tuneline.data_prep.encode import SPLITS
from tuneline.data_prep.ledger import EVALUATION, Ledger
from tuneline.recipe import DataSection

_CHECKED_ROWS: Final = 100
_SAMPLES: Final = 10
_SAMPLE_CHARACTERS: Final = 3000
_BINS: Final = 24
_PLACES: Final = {
    "train": "data.train", "test": "data.test", "evaluation": "data.evaluation_sets"
}  # fmt: skip


def contract_of(ledger: Ledger, data: DataSection, tokenizer: Any, template: str) -> dict[str, Any]:
    """The contract of a settled ledger, as a JSON value.

    Args:
        ledger: the rows and what became of them.
        data: the limits.
        tokenizer: of transformers, as serving uses it.
        template: the chat template in use.
    """
    import numpy as np

    ours = [i for i, plan in enumerate(ledger.plans) if plan.role != "evaluation"]
    counts: Counter[str] = sum((ledger.counts[i] for i in ours), Counter())
    bad: Counter[str] = sum((ledger.bad[i] for i in ours), Counter())
    splits = {name: _split(ledger, position) for position, name in enumerate(SPLITS)}
    train = ledger.alive & (ledger.group == 0)
    heldout = int((ledger.alive & (ledger.group > 0)).sum())
    kept = ledger.alive & (ledger.group != EVALUATION)
    turns, ends = (int(ledger.number(name)[train].sum()) for name in ("turns", "ends"))
    resembled = ledger.resembled()
    round_trip = _round_trip(ledger, tokenizer, template, data, has_chats=counts["chats"] > 0)
    contract = {
        "rows_in": counts["raw_rows"],
        "rows_out": int(kept.sum()),
        "bad_rows_dropped": bad.total(),
        "too_long_dropped": counts["too_long"],
        "unsupervised_dropped": counts["unsupervised"],
        "duplicates_dropped": ledger.dropped["duplicates"],
        "near_duplicates_dropped": ledger.dropped["near_duplicates"],
        "in_test_dropped": ledger.dropped["in_test"],
        "leaking_dropped": ledger.dropped["leaking"],
        "not_sampled": ledger.dropped["not_sampled"],
        "bad_rows": dict(bad.most_common()),
        "bad_row_examples": ledger.examples,
        "values_left_out": counts["values_left_out"],
        "repeated_ids": ledger.repeated_ids,
        "distinct_openings": len(np.unique(ledger.number("opening")[ledger.group != EVALUATION])),
        "splits": splits,
        "sources": _sources(ledger),
        "lengths": _histogram(ledger),
        "supervised_token_fraction": splits["train"]["supervised_tokens"]
        / max(splits["train"]["tokens"], 1),
        "eos_fraction": ends / max(turns, 1),
        "round_trip": round_trip,
        "leakage": {
            "heldout_rows": heldout,
            "resembled_heldout_rows": sum(resembled.values()),
            "resembled_by_set": resembled,
            "still_resembled_heldout_rows": ledger.left_leaking,
            "examples": ledger.leaks,
        },
        "overflow": {
            "rule": data.overflow,
            "max_seq_len": data.max_seq_len,
            "longer_rows": counts["overflowed"],
            "split_rows": counts["rows_split"],
            "pieces_without_supervision": counts["pieces_unsupervised"],
        },
        "rows_taken_apart_by_turn": counts["turns_apart"],
        "template": {
            "name": ledger.plans[0].format.template_name,
            "sha256": hashlib.sha256(template.encode()).hexdigest(),
        },
        "loss": data.loss,
    }
    contract["checks"] = _checks(contract, data)
    contract["passed"] = all(check["holds"] for check in contract["checks"])
    contract["samples"] = _samples(ledger)
    return contract


def violations(contract: dict[str, Any]) -> list[str]:
    """A sentence for each limit that was crossed."""
    return [
        f"{check['what']} {_share(check['value'])}, {check['bound']} {_share(check['limit'])} "
        f"allowed by data.contract.{check['name']}"
        for check in contract["checks"]
        if not check["holds"]
    ]


def unusable_sources(contract: dict[str, Any]) -> list[str]:
    """A sentence for each source that rows came from, and none that can be used."""
    return [
        f"no row of {source['name']} can be used: of {source['rows_in']} that came in, "
        f"{source['bad_rows']} are malformed, and the others too long or without a token to learn: "
        f"correct it, or take it out of the recipe (it is a source of {_PLACES[source['role']]})"
        for source in contract["sources"]
        if source["rows_in"] and not source["usable_rows"]
    ]


def _share(value: float) -> str:
    percent = 100 * value
    return f"{percent:.0f} %" if percent == round(percent) else f"{percent:.3g} %"


def _checks(contract: dict[str, Any], data: DataSection) -> list[dict[str, Any]]:
    came = max(contract["rows_in"], 1)
    limits = data.contract
    # by source: among many others, the rows of a small test or evaluation set would not be missed
    sources = contract["sources"]
    worst = max(sources, key=lambda source: source["bad_rows"] / max(source["rows_in"], 1))
    bad = worst["bad_rows"] / max(worst["rows_in"], 1)
    of_worst = f" of {worst['name']}" if bad and len(sources) > 1 else ""
    duplicates = contract["duplicates_dropped"] + contract["near_duplicates_dropped"]
    leakage = contract["leakage"]
    leaked = leakage["still_resembled_heldout_rows"] / max(leakage["heldout_rows"], 1)
    most = [
        ("max_bad_fraction", f"rows{of_worst} that can't be used", bad),
        ("max_too_long_fraction", "rows that are too long", contract["too_long_dropped"] / came),
        ("max_duplicate_fraction", "duplicates", duplicates / came),
        ("max_repeated_id_fraction", "rows with a repeated id", contract["repeated_ids"] / came),
        ("max_leaked_fraction", "held-out rows that a training row resembles", leaked),
        (
            "max_unsupervised_fraction",
            "rows without a token to learn",
            contract["unsupervised_dropped"] / came,
        ),
    ]
    least = [
        (
            "min_supervised_token_fraction",
            "supervised share of the training tokens",
            contract["supervised_token_fraction"],
        ),
        (
            "min_eos_fraction",
            "supervised turns that end with a token that generation stops at",
            contract["eos_fraction"],
        ),
        (
            "min_round_trip_fraction",
            "checked rows whose tokens are what serving renders",
            contract["round_trip"]["fraction"],
        ),
    ]
    checks = []
    for rows, bound in ((most, "at most"), (least, "at least")):
        for name, what, value in rows:
            limit = getattr(limits, name)
            holds = value <= limit if bound == "at most" else value >= limit
            checks.append(
                {
                    "name": name,
                    "what": what,
                    "value": value,
                    "bound": bound,
                    "limit": limit,
                    "holds": holds,
                }
            )
    return checks


def _split(ledger: Ledger, position: int) -> dict[str, int]:
    rows = ledger.alive & (ledger.group == position)
    times = ledger.times[rows]
    longest = ledger.number("longest")[rows]
    return {
        "rows": int((ledger.number("pieces")[rows] * times).sum()),
        "tokens": int((ledger.number("tokens")[rows] * times).sum()),
        "supervised_tokens": int((ledger.number("supervised")[rows] * times).sum()),
        "longest_tokens": int(longest.max()) if len(longest) else 0,
    }


def _sources(ledger: Ledger) -> list[dict[str, Any]]:
    sources = []
    for position, plan in enumerate(ledger.plans):
        counts = ledger.counts[position]
        kept = ledger.alive & (ledger.plan_of == position)
        sources.append(
            {
                "name": plan.source.label,
                "role": plan.role,
                "rows_in": counts["raw_rows"],
                "rows_out": int(kept.sum()),
                "bad_rows": ledger.bad[position].total(),
                "usable_rows": int((ledger.plan_of == position).sum()),
                "weight": plan.source.weight,
                "formats": {
                    key.removeprefix("format:"): value
                    for key, value in sorted(counts.items())
                    if key.startswith("format:")
                },
            }
        )
    return sources


def _histogram(ledger: Ledger) -> dict[str, Any]:
    import numpy as np

    kept = ledger.alive & (ledger.group != EVALUATION)
    lengths = ledger.number("longest")
    top = int(lengths[kept].max()) if kept.any() else 1
    edges = np.unique(np.linspace(0, top, _BINS + 1).round().astype(np.int64))
    return {
        "edges": edges.tolist(),
        "counts": {
            name: np.histogram(lengths[kept & (ledger.group == position)], edges)[0].tolist()
            for position, name in enumerate(SPLITS)
        },
    }


def _round_trip(
    ledger: Ledger, tokenizer: Any, template: str, data: DataSection, *, has_chats: bool
) -> dict[str, Any]:
    """Sampled rows against what transformers' own `apply_chat_template` gives a server."""
    checked, faults = 0, []
    for sample in _spread([s for s in ledger.samples if s["messages"]], _CHECKED_ROWS):
        checked += 1
        if not _as_served(sample, tokenizer, template, data):
            faults.append(sample["where"])
    return {
        "rows_checked": checked,
        "rows_that_differ": len(faults),
        # raw text is rendered by nobody; where chats came in and none was checked, nothing is known
        "fraction": 1 - len(faults) / checked if checked else float(not has_chats),
        "examples": faults[:10],
    }


def _as_served(sample: dict[str, Any], tokenizer: Any, template: str, data: DataSection) -> bool:
    messages, tools = sample["messages"], sample["tools"]

    def apply(turns: list[dict[str, Any]], **options: Any) -> Any:
        return tokenizer.apply_chat_template(turns, tools=tools, chat_template=template, **options)

    text = sample["text"]
    served = apply(messages, tokenize=False).rstrip()
    if not (served + tokenizer.eos_token).startswith(text):
        return False
    if data.loss == "all":
        return True
    prompt = apply(messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=False)
    length = min(len(prompt), len(sample["input_ids"]))
    return sample["input_ids"][:length] == list(prompt)[:length]


def _samples(ledger: Ledger) -> list[dict[str, Any]]:
    samples = []
    for sample in _spread(ledger.samples, _SAMPLES):
        pieces, position = [], 0
        for start, end in sample["spans"]:
            pieces += [(False, position, start), (True, start, end)]
            position = end
        pieces.append((False, position, len(sample["text"])))
        samples.append(
            {
                "where": sample["where"],
                "source": sample["source"],
                "split": sample["split"],
                "tokens": len(sample["input_ids"]),
                "pieces": _cut(sample["text"], pieces),
            }
        )
    return samples


def _cut(text: str, pieces: Sequence[tuple[bool, int, int]]) -> list[dict[str, Any]]:
    """The pieces of a text, long ones cut in their middle, so that a page stays small."""
    longest = _SAMPLE_CHARACTERS // max(len(pieces), 1)
    shown = []
    for supervised, start, end in pieces[:40]:
        piece = text[start:end]
        if len(piece) > longest:
            half = longest // 2
            piece = f"{piece[:half]} [... {len(piece) - 2 * half} characters ...] {piece[-half:]}"
        if piece:
            shown.append({"supervised": supervised, "text": piece})
    return shown


def _spread(values: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the values, evenly spread."""
    if len(values) <= count:
        return list(values)
    return [values[i * len(values) // count] for i in range(count)]
