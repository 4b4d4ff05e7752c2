"""The demo's data: order messages and the JSON that they ask for, generated from a seed.

A row is one chat: a short instruction, a message such as "Could you book Belrin in for
12 copper kettles?", and the answer `{"name":"Belrin","quantity":12,"item":"copper kettles"}`.

The score on the test split measures generalization, not memory: no sentence clause, no name and
no item word of the test split occurs in training (`tests/components/demo` proves it on the
generated rows). What both splits share is the task: the instruction, the three keys and the
numbers. Training messages are composed at random from clauses, with names built from
syllables, since variety of the data is what moves the score on unseen text: 16 fixed templates
with 24 names gave 0.39 where composed clauses gave 0.66, at the same budget.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Final

INSTRUCTION: Final = "Order as JSON: name, quantity, item"


@dataclass(frozen=True)
class Vocabulary:
    """The words and clauses that one side of the split may use.

    `orders` hold {name}, {quantity} and {item} once each; `openers` and `asides` hold no field.
    """

    onsets: tuple[str, ...]
    middles: tuple[str, ...]
    endings: tuple[str, ...]
    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    openers: tuple[str, ...]
    orders: tuple[str, ...]
    asides: tuple[str, ...]


TRAIN: Final = Vocabulary(
    onsets=tuple(
        "Ba Ce Do Fi Ga Jo Ka Lu Mi No Pe Ra Sa Ti Ul Ya Bre Cla Dri Fen Gor Hus Ist Kor Lep Mar "
        "Nep Osk Pri Rud Sten Tor Urs Vik Wal Yel Zan".split()
    ),
    middles=tuple("ra li no ve mi ta so ne du ka lo ri che bu zo wi".split()),
    endings=tuple("n s l ra no ka tes ren lio da mir nna sk ft dor gus phy bet ckle wood".split()),
    nouns=tuple(
        "lamps chairs candles pillows baskets mirrors blankets ropes buckets ladders pens "
        "notebooks folders staplers envelopes carpets curtains towels plates bowls spoons knives "
        "cups jars bottles boxes crates barrels pallets hammers nails screws bolts wrenches "
        "drills saws brushes rollers tiles bricks planks pipes hoses valves pumps filters "
        "batteries cables plugs switches bulbs fans heaters radios cameras tripods phones "
        "tablets keyboards printers monitors speakers headphones tents backpacks boots gloves "
        "scarves jackets shirts socks belts hats umbrellas bicycles helmets tyres bells seeds "
        "shovels rakes pots vases planters benches tables shelves desks stools cushions apples "
        "lemons onions carrots loaves cheeses sausages teabags biscuits".split()
    ),
    adjectives=tuple(
        "red blue green black white small large wooden plastic steel heavy light round square "
        "cheap spare folding striped thick thin paper cotton garden kitchen office".split()
    ),
    openers=(
        "Hi team,",
        "Note:",
        "Update:",
        "FYI,",
        "Hello,",
        "Just in:",
        "From the phone:",
        "As agreed,",
        "Hey,",
        "Reminder:",
        "New request:",
        "Morning all,",
        "For the record,",
        "Good news,",
        "Dear sales,",
        "Message from the shop:",
    ),
    orders=(
        "{name} wants {quantity} {item}",
        "{name} has ordered {quantity} {item}",
        "{name} needs {quantity} {item}",
        "{name} is asking for {quantity} {item}",
        "{name} would like to buy {quantity} {item}",
        "{name} called about {quantity} {item}",
        "{name} just paid for {quantity} {item}",
        "{name} takes {quantity} more {item}",
        "{name}'s order is {quantity} {item}",
        "{name} (regular customer) requests {quantity} {item}",
        "please send {quantity} {item} to {name}",
        "please set aside {quantity} {item} for {name}",
        "ship {quantity} {item} to {name}",
        "pack {quantity} {item} for {name}",
        "{quantity} {item} go to {name}",
        "{quantity} {item} were promised to {name}",
        "{quantity} {item}, customer {name}",
        "customer {name}, {quantity} {item}",
        "we owe {name} {quantity} {item}",
        "can we get {name} {quantity} {item}",
        "I told {name} that {quantity} {item} are fine",
        "the {quantity} {item} are for {name}",
        "order for {name}: {quantity} {item}",
        "{item} x {quantity} for {name}",
        "the {item} that {name} wants, {quantity} of them",
        "add {item} for {name}, count {quantity}",
        "put {name} down for {quantity} {item}",
        "it is {name} who needs the {item}, {quantity} in total",
    ),
    asides=(
        "The invoice is paid.",
        "Call first.",
        "Same address as always.",
        "Thanks!",
        "It is a gift.",
        "No rush.",
        "Deliver on Friday.",
        "Needed by Monday.",
        "Use the big van.",
        "They were very friendly.",
        "Keep the receipt.",
    ),
)

TEST: Final = Vocabulary(
    onsets=tuple("Bel Han Wen Tam Pol Car Mon Dal Ros Gil Hel Vin".split()),
    middles=tuple("mo da pe ba fe ma".split()),
    endings=tuple("th rt ton bel rin vic man ley".split()),
    nouns=tuple(
        "kettles lanterns violins saddles anchors magnets quilts goggles thermometers marbles "
        "puzzles canoes wallets bracelets sweaters sofas mattresses freezers toasters scissors "
        "microscopes balloons pumpkins mushrooms waffles trumpets whistles telescopes "
        "calculators padlocks".split()
    ),
    adjectives=tuple(
        "copper golden leather glass antique purple tiny vintage ceramic silk".split()
    ),
    openers=(
        "Good afternoon,",
        "Heads up:",
        "Quick question,",
        "To whom it may concern,",
        "Voicemail:",
        "Greetings,",
        "Okay,",
    ),
    orders=(
        "could you book {name} in for {quantity} {item}",
        "{name} asked us to reserve {quantity} {item}",
        "{name} will collect {quantity} {item}",
        "we should deliver {quantity} {item} to {name}",
        "{quantity} {item} have been sold to {name}",
        "{name} is looking to purchase {quantity} {item}",
        "a purchase of {quantity} {item} was made by {name}",
        "let's prepare {quantity} {item} because {name} is coming over",
        "our friend {name} confirmed {quantity} {item}",
        "someone named {name} is picking up {quantity} {item}",
        "hold {quantity} {item} under the name {name}",
        "make sure {name} receives {quantity} {item}",
    ),
    asides=(
        "Much appreciated.",
        "Mind the fragile parts.",
        "Payment was received.",
        "Ring the doorbell.",
        "Please double check.",
        "Thursday works best.",
    ),
)


def _compose(vocabulary: Vocabulary, rng: random.Random) -> tuple[str, dict[str, str | int]]:
    name = rng.choice(vocabulary.onsets)
    if rng.random() < 0.4:
        name += rng.choice(vocabulary.middles)
    name += rng.choice(vocabulary.endings)
    item = rng.choice(vocabulary.nouns)
    if rng.random() < 0.5:
        item = f"{rng.choice(vocabulary.adjectives)} {item}"
    fields: dict[str, str | int] = {
        "name": name,
        "quantity": rng.randint(2, 99),
        "item": item,
    }
    sentence = rng.choice(vocabulary.orders).format(**fields)
    if rng.random() < 0.3:
        sentence = f"{rng.choice(vocabulary.openers)} {sentence}"
    sentence = sentence[0].upper() + sentence[1:] + rng.choice((".", ""))
    if rng.random() < 0.3:
        sentence = f"{sentence.rstrip('.')}. {rng.choice(vocabulary.asides)}"
    return sentence, fields


def generate(vocabulary: Vocabulary, rows: int, seed: int) -> list[dict[str, object]]:
    """Distinct chats in the `messages` format, the same for the same arguments.

    Args:
        vocabulary: `TRAIN` or `TEST`.
        rows: how many distinct messages.
        seed: of the generator; Python's `random.Random` is stable across versions and machines.
    """
    rng = random.Random(seed)
    seen: set[str] = set()
    chats: list[dict[str, object]] = []
    while len(chats) < rows:
        message, fields = _compose(vocabulary, rng)
        if message in seen:
            continue
        seen.add(message)
        chats.append(
            {
                "messages": [
                    {"role": "system", "content": INSTRUCTION},
                    {"role": "user", "content": message},
                    {"role": "assistant", "content": json.dumps(fields, separators=(",", ":"))},
                ]
            }
        )
    return chats


def write_jsonl(chats: list[dict[str, object]], path: Path) -> None:
    """One JSON object a line, UTF-8."""
    with path.open("w", encoding="utf-8") as file:
        for chat in chats:
            file.write(json.dumps(chat, ensure_ascii=False) + "\n")
