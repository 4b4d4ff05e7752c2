"""When schedules fire: KFP's own dialect, without what it takes and nobody means."""

import pytest

from tuneline_pipelines import cron


@pytest.mark.parametrize(
    "text",
    [
        "0 0 3 * * 1",
        "30 */15 8-18 ? * MON-FRI",
        "0 5/10 0 1,15 jan,jul *",
        "59 59 23 31 12 6",
        "0 0 0 29 2 ?",
        "0 0 0 31 2 1",  # a day of the week too: either of them
        "0  0 3  * * */2",
    ],
)
def test_what_kfp_takes_is_taken(text: str) -> None:
    assert cron.check(text) == " ".join(text.split())


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("0 3 * * 1", "has five fields, and KFP would read the first as seconds: write '0 0 3"),
        ("", "must have six fields"),
        ("@daily", "must have six fields"),
        ("0 0 3 * * 1 2026", "must have six fields"),
        ("* 0 3 * * 1", "'*' starts 60 runs within a minute"),
        ("0,30 0 3 * * 1", "starts 2 runs within a minute"),
        ("60 0 3 * * 1", "the second '60' is not from 0 to 59"),
        ("0 0 24 * * 1", "the hour '24' is not from 0 to 23"),
        ("0 0 3 0 * *", "the day of month '0' is not from 1 to 31"),
        ("0 0 3 * 13 *", "the month '13' is not from 1 to 12 or jan to dec"),
        ("0 0 3 * * 7", "the day of week '7' is not from 0 to 6 or sun to sat"),
        ("0 0 3 * * monday", "the day of week 'monday' is not from 0 to 6"),
        ("0 0 5-3 * * *", "the hour '5-3' begins after its end"),
        ("0 */0 3 * * *", "the minute '*/0' has a step of 0"),
        ("0 0 3 L * *", "the day of month 'L' is not"),
        ("0 0 3 1, * *", "'' is no day of month"),
        ("0 0 -1 * * *", "'-1' is no hour"),
        ("0 0 3 30 2 *", "never fires: no month of '2' has a day '30'"),
        ("0 0 3 31 4,6,9,11 ?", "never fires"),
    ],
)
def test_what_kfp_refuses_or_nobody_means_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(ValueError) as refused:
        cron.check(text)
    assert sentence in str(refused.value)
