"""The page: self-contained, escaped, small, honest about overfitting, and shown by a browser."""

import html as markup
import json
import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tuneline.evaluate.compare import compare, compare_texts
from tuneline.evaluate.gate import decide
from tuneline.evaluate.metrics import METRICS, metric_named
from tuneline.evaluate.report import loss_curves, overfitting, render_report
from tuneline.recipe import GateSection

EVIL = "<script>alert(1)</script><img src=//x.example/y>"
HISTORY = [
    {"step": 1, "loss": 2.0},
    {"step": 2, "loss": 1.0},
    {"step": 2, "eval_loss": 1.5},
    {"step": 4, "loss": 0.01},
    {"step": 4, "eval_loss": 0.4},
    {"step": 4, "train_loss": 0.9},
]


def result(rows: int = 120, text: str = EVIL, values: int = 3, champion: bool = True) -> Any:
    metrics = [metric_named(name) for name in METRICS]
    models = {"base": 0.1, "tuned": 0.8} | ({"champion": 0.6} if champion else {})
    scores = {
        model: {
            metric.name: [
                (metric.highest or 4.0) * (float(i / rows < share) if metric.highest else 1 - share)
                for i in range(rows)
            ]
            for metric in metrics
        }
        for model, share in models.items()
    }
    tokens = [7] * rows
    parts = [
        {
            "value": f"{text} {n}" if n else None,
            "rows": len(range(n, rows, values)),
            "metrics": compare(scores, tokens, metrics, range(n, rows, values)),
        }
        for n in range(values)
    ]
    nlls = {model: [200.0 + share * i for i in range(50)] for model, share in models.items()}
    block = compare(scores, tokens, metrics[:1], range(rows))["exact_match"]
    task = {
        "digest": "sha256:4",
        "lm_eval": "0.4.13",
        "documents": rows,
        "of_documents": rows + 1,
        "cut": dict.fromkeys(models, 1),
        "metrics": {text: block | {m: block[m] | {"stderr": 0.01} for m in models}},
    }
    found: dict[str, Any] = {
        "metric": "exact_match",
        "test_rows": rows,
        "metrics": compare(scores, tokens, metrics, range(rows)),
        "slices": {text: parts},
        "forgetting": {text: {"digest": "sha256:2", **compare_texts(nlls, [90] * 50)}},
        "tasks": {f"{text} {n}": task for n in range(values)},
        "answers": {
            model: {"count": rows, "cut": 2, "empty": 1, "prompts_cut": 3} for model in models
        },
        "champion": {"version": 4, "compared": True, "reason": "", "digest": "sha256:3"}
        if champion
        else None,
        "eval_set_digest": "sha256:0",
        "engine": "transformers 5",
        "samples_by": "exact match",
        "samples": [
            {
                "question": text,
                "reference": text,
                **dict.fromkeys(models, text),
                **{f"{model}_exact_match": float(model == "tuned") for model in models},
            }
        ]
        * 3,
    }
    gate = GateSection(slice_floors={text: 0.5}, max_forgetting=0.4)
    return found | {"verdict": decide(found, gate)}


def page(found: Any) -> str:
    split = {"rows": 1, "tokens": 2, "supervised_tokens": 1, "longest_tokens": 2}
    return render_report(
        found,
        history=HISTORY,
        contract={"rows_in": 1, "dropped": {"too_long": 3}, "splits": {"train": split}},
        config={"method": {"name": "lora", "layers": [1, 2]}},
        base_model={"reference": EVIL, "digest": "sha256:1"},
    )


class Page(HTMLParser):
    """Collects what a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]


def test_the_page_is_self_contained_and_escapes_what_data_says() -> None:
    text = page(result())
    parsed = Page()
    parsed.feed(text)
    assert not {"script", "img", "link", "iframe"} & set(parsed.tags) and parsed.links == []
    assert "url(" not in text and "@import" not in text
    assert parsed.tags.count("polyline") == 2 and "Gate passed" in text
    assert "NaN" not in text and "None" not in text and "Undefined" not in text


def test_the_page_stays_small_whatever_the_data() -> None:
    found = result(rows=3000, text="long " * 20_000, values=100)
    assert 20_000 < len(page(found).encode()) < 1_000_000
    assert "more slices are in report.json" in page(found)
    assert "20 more rows are in report.json" in page(found)


def test_the_page_shows_a_refusal_with_every_condition() -> None:
    found = result(rows=50)
    text = page(found)
    assert "Gate refused" in text
    assert text.count('<li class="failed">') == len(found["verdict"]["reasons"]) > 0
    assert text.count('<li class="held">') + text.count('<li class="failed">') == len(
        found["verdict"]["checks"]
    )


@pytest.mark.parametrize(
    ("validation", "level", "words"),
    [
        ([], "unknown", "not measured"),
        ([(2, 1.0)], "unknown", "measured once"),
        ([(2, 1.0), (4, 0.3)], "ok", "at its lowest at the end, 3 times the training loss"),
        ([(2, 0.3), (4, 0.303)], "ok", "within 2% of its lowest"),
        ([(2, 1.0), (4, 0.9)], "warn", "lowest at the end, but 9 times the training loss"),
        ([(2, 1.0), (4, 0.5), (6, 0.8)], "warn", "lowest, 0.5, at step 4 and has risen to 0.8"),
    ],
)
def test_overfitting_is_told_from_the_course_of_validation(
    validation: list[tuple[float, float]], level: str, words: str
) -> None:
    sign = overfitting([(1.0, 2.0), (6.0, 0.1)], validation)
    assert sign["level"] == level and words in sign["text"]


@pytest.mark.parametrize(
    "history",
    [
        [],
        [{"step": 1, "loss": 0.0}],
        [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 3.0}],
        [{"step": n, "loss": 1 / n} for n in range(1, 100_000)],
    ],
)
def test_curves_of_odd_histories_stay_in_the_picture(history: list[dict[str, float]]) -> None:
    curves = loss_curves(history)
    points = [p.split(",") for p in curves["train"].split()]
    assert len(points) < 500
    for x, y in points:
        assert curves["left"] <= float(x) <= curves["right"]
        assert 0 <= float(y) <= curves["bottom"]
    assert len(curves["y_ticks"]) >= 2
    assert json.dumps(curves, allow_nan=False)


def pixels(path: Path) -> tuple[int, int, bytes]:
    """Width, height and filtered RGB(A) rows of a PNG without interlacing."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, body = 8, b""
    width = height = 0
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, chunk = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, height = struct.unpack(">II", chunk[:8])
        elif kind == b"IDAT":
            body += chunk
        at += 12 + length
    return width, height, zlib.decompress(body)


@pytest.mark.slow
def test_a_browser_shows_the_page_in_a_sandboxed_frame(tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), "")
    if not browser:
        pytest.skip("no Chromium on this machine")
    frame = markup.escape(page(result(text="plain words")), quote=True)
    (tmp_path / "frame.html").write_text(
        f'<body style="margin:0"><iframe srcdoc="{frame}" sandbox="allow-scripts" '
        'style="width:1200px;height:2800px;border:0"></iframe>'
    )
    shot = tmp_path / "shot.png"
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,2800",
            # the frame is drawn before the picture is taken; its sandbox holds as ever
            "--disable-features=IsolateSandboxedIframes", "--virtual-time-budget=10000",
            f"--screenshot={shot}", (tmp_path / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    width, height, rows = pixels(shot)
    assert (width, height) == (1200, 2800)
    # a blank page is a few bytes when compressed; one with text and charts is not
    assert len(zlib.compress(rows)) > 50_000
