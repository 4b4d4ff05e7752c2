"""References and generated answers are read alike, whatever the template puts around an answer."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from tuneline import artifacts, steps
from tuneline.base_model import resolve
from tuneline.data_prep.chat import Renderer, chat_format
from tuneline.evaluate.evaluate import read_rows
from tuneline.evaluate.final_answer import FinalAnswer, final_answer
from tuneline.evaluate.generate import fitted, generate_answers, until_end
from tuneline.evaluate.measure import longest_answer, score_answers
from tuneline.evaluate.metrics import metric_named

TURN = "{% for m in messages %}{{ '<|im_start|>' + m['role'] }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
CHANNELS = (  # gpt-oss: control tokens around the answer, thoughts in a channel of their own
    TURN + "{% if m['role'] == 'assistant' %}{{ '<|channel|>final' }}{% endif %}"
    "{{ '<|message|>' + m['content'] + '<|im_end|>' }}{% endfor %}" + ASK
)
THINKING = (  # Qwen3: its block is of added tokens that are not special
    TURN + "{{ '\n' }}{% if m['role'] == 'assistant' %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}" + ASK + "{{ '\n' }}"
)
EMPTY_THINKING = THINKING.replace(" + (m.reasoning_content or '') + ", " + ")
TEMPLATES = {"channels": CHANNELS, "thinking": THINKING, "empty thinking": EMPTY_THINKING}


def model_with(template: str, tiny_model: Path, folder: Path) -> str:
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|channel|>", "<|message|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


class Perfect(torch.nn.Module):
    """Says what was prepared for it, and ends; a stand-in for a model that learned it all."""

    def __init__(self, says: dict[tuple[int, ...], list[int]], eos: int) -> None:
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(1))
        self.config = GenerationConfig()
        self.generation_config = GenerationConfig(eos_token_id=eos)
        self.says, self.eos = says, eos

    def generate(self, input_ids: Any, attention_mask: Any, **_: Any) -> torch.Tensor:
        prompts = [
            tuple(ids[mask.bool()].tolist())
            for ids, mask in zip(input_ids, attention_mask, strict=True)
        ]
        answers = [[*self.says[prompt], self.eos] for prompt in prompts]
        longest = max(map(len, answers))
        padded = [answer + [0] * (longest - len(answer)) for answer in answers]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)


def final_of(folder: str) -> FinalAnswer:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return final_answer(tokenizer, Renderer(chat_format(tokenizer, Path(folder))))


@pytest.mark.parametrize("shape", TEMPLATES)
def test_a_perfect_model_scores_perfectly_whatever_the_template(
    shape: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = model_with(TEMPLATES[shape], tiny_model, tmp_path / "model")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{fruit} {number}"},
                {"role": "assistant", "content": json.dumps({"fruit": fruit, "n": number})},
            ]
        }
        for fruit in ("plum", "lime")
        for number in range(30)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": [str(tmp_path / "rows.jsonl")], "test_fraction": 0.4}
    steps.prepare_data(folder, data | {"near_duplicate_similarity": 1}, str(tmp_path / "data"))
    dataset = artifacts.load(tmp_path / "data", "prepared_dataset")
    tests, final = read_rows(resolve(folder), dataset, 100)
    says = {
        tuple(final.tokenizer(row.prompt, add_special_tokens=False)["input_ids"]): final.tokenizer(
            row.rendered_reference, add_special_tokens=False
        )["input_ids"]
        for row in tests
    }
    limit = longest_answer(final.tokenizer, tests)
    assert limit > max(map(len, says.values()))  # the opening has to be written too
    answers = generate_answers(
        Perfect(says, final.tokenizer.eos_token_id),
        final.tokenizer,
        [row.prompt or "" for row in tests],
        batch_size=4,
        batch_tokens=1000,
        max_new_tokens=limit,
        on_batch=lambda done, total: None,
        read=final.of_ids,
    )
    assert all(answer.ended for answer in answers) and len(tests) > 5
    assert {row.reference for row in tests} <= {row["messages"][1]["content"] for row in rows}
    names = ("exact_match", "valid_json", "json_fields", "token_f1", "rouge_l", "chrf")
    metrics = [metric_named(name) for name in names]
    scores = score_answers(metrics, tests, [answer.text for answer in answers])
    for metric in metrics:
        assert scores[metric.name] == [metric.highest] * len(tests), metric.name


@pytest.mark.parametrize(
    ("shape", "text", "answer"),
    [
        ("channels", "<|channel|>final<|message|>red<|im_end|>", "red"),
        ("channels", "<|channel|>x<|message|>hm<|im_start|><|channel|>final<|message|>red", "red"),
        ("channels", "red", "red"),  # a base that knows nothing of channels
        ("thinking", "<think>\n\n</think>\n\nred", "red"),
        ("thinking", "<think>\nlet me see\n</think>\n\nred", "red"),
        ("thinking", "red", "red"),
        ("thinking", "<think>\nlet me", "<think>\nlet me"),  # cut before it came to an answer
        ("empty thinking", "<think>\n\n</think>\n\nred", "red"),
    ],
)
def test_what_the_template_opens_an_answer_with_is_not_the_answer(
    shape: str, text: str, answer: str, tiny_model: Path, tmp_path: Path
) -> None:
    final = final_of(model_with(TEMPLATES[shape], tiny_model, tmp_path / "model"))
    assert final.of_text(text) == answer


def test_a_template_that_adds_nothing_leaves_answers_alone(tiny_model: Path) -> None:
    final = final_of(str(tiny_model))
    assert final.opening is None and final.of_text("red <think>") == "red <think>"


def test_what_follows_the_end_is_no_answer() -> None:
    assert until_end([5, 6, 2, 7, 2], [2, 3]) == [5, 6]
    assert until_end([5, 6], [2]) == [5, 6]


def test_a_prompt_without_room_loses_its_start_but_not_its_first_token() -> None:
    ids = list(range(1, 41))
    assert fitted(ids, None, 10, 1) == fitted(ids, 50, 10, 1) == ids
    assert fitted(ids, 40, 10, 1) == [1, *range(12, 41)]
    assert fitted(ids, 40, 10, None) == list(range(11, 41))
    assert len(fitted(ids, 40, 1000, 1)) == 20  # an answer has half of the context at most
