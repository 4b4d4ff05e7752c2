"""Prompt tuning: trained vectors in front of the input.

The embeddings [p_1 ... p_n; e(x)] go into the frozen model, and only p trains. Lester et al. 2021,
"The Power of Scale for Parameter-Efficient Prompt Tuning", section 2; starting from embeddings of
the vocabulary beats random vectors, the more the smaller the model (section 3.2). The paper's
learning rate, 0.3, is Adafactor's; with AdamW, whose steps don't shrink with the gradient, a
tenth of it is used.

Gradients go through the whole model, so a model behind an API can't be tuned this way, and a step
costs about what LoRA's does. It takes n positions of the context, and the tuned model is another
function than the base from the first step on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tuneline.errors import MethodError
from tuneline.finetune.methods.method import FourBitSettings, Method, MethodSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class PromptTuningSettings(FourBitSettings):
    """Hyperparameters of prompt tuning."""

    name: Literal["prompt_tuning"] = "prompt_tuning"
    num_virtual_tokens: int = Field(default=20, ge=1, le=4096)
    """Trained vectors in front of the input; each takes a position of the context."""
    init_text: str = ""
    """Start from this text's embeddings, repeated or cut to length; empty: from embeddings of
    tokens drawn from the vocabulary."""


def attach(model: PreTrainedModel, config: MethodSettings) -> PeftModel:
    """Freeze the base and put trained vectors in front.

    Raises:
        MethodError: no room is left in the model's context, or there is no tokenizer for init_text.
    """
    from peft import PeftModel, PromptTuningConfig, get_peft_model
    from peft.tuners.prompt_tuning import PromptTuningInit

    assert isinstance(config, PromptTuningSettings)
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and config.num_virtual_tokens >= context:
        raise MethodError(
            f"prompt_tuning: num_virtual_tokens {config.num_virtual_tokens} leaves no room in the "
            f"model's context of {context} positions"
        )
    text = {}
    if config.init_text:
        text = {
            "prompt_tuning_init": PromptTuningInit.TEXT,
            "prompt_tuning_init_text": config.init_text,
            "tokenizer_name_or_path": model.name_or_path,
        }
    tuned = get_peft_model(
        model,
        PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=config.num_virtual_tokens,
            **(text or {"prompt_tuning_init": PromptTuningInit.SAMPLE_VOCAB}),
        ),
    )
    assert isinstance(tuned, PeftModel)
    if config.init_text:
        # where the tokenizer lay says nothing on another machine, and loading does not need it
        tuned.peft_config["default"].tokenizer_name_or_path = None  # pyright: ignore[reportAttributeAccessIssue]
        tuned.peft_config["default"].prompt_tuning_init = PromptTuningInit.RANDOM  # pyright: ignore[reportAttributeAccessIssue]
    return tuned


METHOD = Method(
    name="prompt_tuning",
    title="Prompt tuning: trained vectors in front of the input",
    config_class=PromptTuningSettings,
    learning_rate=3e-2,
    attach=attach,
    identity_at_start=False,
)
