"""What of a model's text is its answer, the same way for references and for generated texts.

Templates put more into an answer than the row's own content: gpt-oss names a channel in control
tokens (`<|channel|>final<|message|>`), Qwen3 writes a thinking block first. A model has to write
that too, so training and the likelihoods keep it; metrics of texts judge what comes after it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from tuneline.data_prep.chat import Renderer
from tuneline.data_prep.records import BadRow
from tuneline.evaluate.rows import EvalRow

_CONTENT: Final = "answerprobe"
_REASONING: Final = "reasoningprobe"


@dataclass(frozen=True)
class FinalAnswer:
    """Reads the answer out of token ids."""

    tokenizer: Any
    opening: re.Pattern[str] | None
    """What the template puts before an answer's content; None where that is nothing."""

    def of_ids(self, ids: Sequence[int]) -> str:
        """The answer of generated ids, the end token left out."""
        if self.opening is not None:
            whole: str = self.tokenizer.decode(ids, skip_special_tokens=False)
            if found := self.opening.match(whole):
                return self._without_controls(whole[found.end() :])
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def of_text(self, text: str) -> str:
        """The answer of a rendered text, by way of its tokens, as a generated one comes."""
        return self.of_ids(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def of_rows(self, rows: Sequence[EvalRow]) -> list[EvalRow]:
        """The rows with references that generated answers can be compared with."""
        return [
            row if row.prompt is None else replace(row, final=self.of_text(row.rendered_reference))
            for row in rows
        ]

    def _without_controls(self, text: str) -> str:
        controls = [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        return re.sub("|".join(map(re.escape, controls)) or r"(?!)", "", text)


def final_answer(tokenizer: Any, renderer: Renderer | None) -> FinalAnswer:
    """Find out what a template opens answers with, by rendering two.

    Args:
        tokenizer: of the base.
        renderer: of the template that rendered the rows; None for rows of plain text only.
    """
    return FinalAnswer(tokenizer, None if renderer is None else _opening(renderer))


def _opening(renderer: Renderer) -> re.Pattern[str] | None:
    plain = _before_content(renderer, {}).strip()
    if "reasoning_content" in renderer.format.template:
        reasoned = _before_content(renderer, {"reasoning_content": _REASONING})
        head, _, tail = (part.strip() for part in reasoned.partition(_REASONING))
        if head and tail:  # with or without thoughts inside
            return re.compile(rf"\s*{re.escape(head)}.*?{re.escape(tail)}\s*", re.DOTALL)
    if not plain:
        return None
    # control tokens are in no content, so thoughts in other channels may come before them
    sure = any(token in plain for token in renderer.format.controls)
    return re.compile(rf"{'.*' if sure else ''}\s*{re.escape(plain)}\s*", re.DOTALL)


def _before_content(renderer: Renderer, more: dict[str, str]) -> str:
    """What the template puts between the prompt and an answer's content."""
    asked = [{"role": "user", "content": "question"}]
    answered = {"role": "assistant", "content": _CONTENT, **more}
    try:
        prompt = renderer.template_text(asked, prompt=True)
        whole = renderer.template_text([*asked, answered])
    except BadRow:  # it wants another kind of chat than this one
        return ""
    if not whole.startswith(prompt) or _CONTENT not in whole:
        return ""
    return whole[len(prompt) :].partition(_CONTENT)[0]
