"""The history decides one winner, whatever the order of entries, repeats and deaths."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tuneline.register.history import Entry, History


def of(*entries: Entry) -> History:
    return History("m", tuple(replace(e, number=n) for n, e in enumerate(entries, 1)))


def promote(version: int, builds_on: int = 0, replaces: int | None = None) -> Entry:
    return Entry("promote", version, "me", builds_on=builds_on, replaces=replaces)


def rollback(version: int, builds_on: int, replaces: int) -> Entry:
    return Entry("rollback", version, "me", builds_on=builds_on, replaces=replaces)


def test_the_first_that_builds_on_the_champion_wins_and_the_others_are_void() -> None:
    now = of(promote(1), promote(2, 1, 1), promote(3, 1, 1), promote(4, 2, 2))
    assert [e.number for e in now.moves] == [1, 2, 4]
    assert (now.champion, now.previous) == (4, 2)
    assert not now.took_effect(now.entries[2])


def test_a_request_that_was_sent_twice_is_one_entry() -> None:
    first = promote(1)
    now = of(first, first, promote(2, 1, 1))
    assert [e.number for e in now.moves] == [1, 3]
    assert now.written(first.token) == now.entries[0]
    assert [e.number for e in now.visible()] == [1, 3]


def test_rolling_back_twice_goes_further_back_and_not_forth() -> None:
    three = (promote(1), promote(2, 1, 1), promote(3, 2, 2))
    once = of(*three, rollback(2, 3, 3))
    assert (once.champion, once.previous) == (2, 1)
    twice = of(*three, rollback(2, 3, 3), rollback(1, 4, 2))
    assert (twice.champion, twice.previous) == (1, None)
    assert twice.ever_champions == (1, 2, 3)
    forth = of(*three, rollback(1, 3, 3), rollback(3, 4, 1))
    assert (forth.champion, forth.previous) == (3, 1)


def test_a_champion_from_outside_of_the_history_becomes_previous() -> None:
    assert of(promote(5, 0, replaces=2)).champions == (2, 5)
    assert of(promote(1), promote(5, 1, replaces=2)).champions == (1, 2, 5)


def test_an_approval_is_void_for_other_files() -> None:
    approval = Entry("approve", 3, "ann", "fine", model_digest="a", report_digest="b")
    now = of(approval)
    assert now.approval(3, "a", "b") is not None
    assert now.approval(3, "a", "c") is None and now.approval(4, "a", "b") is None


writers = st.lists(
    st.tuples(st.integers(1, 9), st.integers(0, 12), st.booleans()), min_size=1, max_size=25
)


@settings(max_examples=300, deadline=None)
@given(writers)
def test_every_state_has_one_successor(drawn: list[tuple[int, int, bool]]) -> None:
    """Whoever writes what in which order: each champion is replaced by at most one entry, and a
    reader that saw less agrees with a reader that saw more."""
    entries = [
        promote(version, builds_on) if up else rollback(version, builds_on, version)
        for version, builds_on, up in drawn
    ]
    now = of(*entries)
    bases = [move.builds_on for move in now.moves]
    assert len(bases) == len(set(bases))
    assert bases == [0, *(move.number for move in now.moves)][: len(bases)]
    for length in range(len(entries)):
        earlier = of(*entries[:length]).moves
        assert now.moves[: len(earlier)] == earlier
