"""docs/methods.md says of the methods what METHODS says."""

import re
from pathlib import Path

import pytest

from tuneline.finetune.methods import METHODS
from tuneline.finetune.methods.overview import overview, short, table

DOC = Path(__file__).parents[2] / "docs" / "methods.md"
BLOCK = r"(<!-- generated: {} -->\n).*?(<!-- end -->\n)"


def markdown(rows: list[list[str]]) -> str:
    head, *others = [f"| {' | '.join(row)} |\n" for row in rows]
    return "".join([head, "| --- " * len(rows[0]) + "|\n", *others])


def blocks() -> dict[str, str]:
    found = {"capabilities": markdown(table())}
    for row in overview():
        rows = [["setting", "default", "meaning"]]
        rows.append(["`training.learning_rate`", short(row["learning_rate"]), "Peak, of AdamW."])
        for name, entry in row["hyperparameters"].items():
            meaning = entry["meaning"].replace("|", "\\|")
            rows.append([f"`{name}`", f"`{entry['default']}`", meaning])
        found[row["name"]] = markdown(rows)
    return found


def test_the_tables_are_those_of_the_code(pytestconfig: pytest.Config) -> None:
    text = written = DOC.read_text()
    for name, content in blocks().items():
        pattern = re.compile(BLOCK.format(name), re.DOTALL)
        assert pattern.search(written), f"docs/methods.md has no place for {name}"
        written = pattern.sub(lambda m, content=content: f"{m[1]}{content}{m[2]}", written)
    if pytestconfig.getoption("--update-golden"):
        DOC.write_text(written)
    assert written == DOC.read_text(), "run `make golden` and review the diff"
    assert text.count("<!-- generated: ") == len(METHODS) + 1


def test_every_method_is_explained() -> None:
    text = DOC.read_text()
    for method in METHODS:
        section = text.partition(f"\n## {method.name}\n")[2].partition("\n## ")[0]
        for part in ("**Principle.**", "**Cost.**", "**Use it**", "**Not**", "**Defaults.**"):
            assert part in section, f"{method.name}: {part}"
        for key in re.findall(r"`([a-z_]+_[a-z_]+)[:`]", section):
            assert key in method.config_class.model_fields, f"{method.name} has no {key}"
    assert set(re.findall(r"`tuneline (\w+)", text)) <= {"methods", "evaluate", "compare"}


def test_only_prompt_tuning_changes_the_model_before_its_first_step() -> None:
    changing = [method.name for method in METHODS if not method.identity_at_start]
    assert f"Every method but {', '.join(changing)} computes what the base" in DOC.read_text()


def test_shares_of_memory_in_the_text_are_what_the_formats_take() -> None:
    bits = 4 + 8 / 64 + 32 / (64 * 256)
    text = DOC.read_text()
    assert f"{bits / 8:.2f} P + 4 n" in text and f"{bits / 8:.2f}" == "0.52"
    assert f"65e9 x 0.52 bytes = {65 * bits / 8:.0f} GB" in text
    assert f"{7 * bits / 8:.1f} GB + 16 n" in text and f"{7 * 16} GB" in text
