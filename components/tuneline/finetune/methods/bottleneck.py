"""Bottleneck adapters: a small network with a skip connection after every feed-forward network.

h becomes h + W_up f(W_down h + b_down) + b_up, with h in R^d the output of the block's feed-forward
network, W_down in R^(m x d), W_up in R^(d x m) and m much smaller than d; W_up and the biases are
zero at step 0, so that the model is unchanged. Houlsby et al. 2019, "Parameter-Efficient Transfer
Learning for NLP", section 2.1, which counts 2 m d + d + m parameters for one adapter.

That paper puts a second adapter after the attention. Pfeiffer et al. 2021, "AdapterFusion:
Non-Destructive Task Composition for Transfer Learning", keep only the one after the feed-forward
network; in LLaMA, Hu et al. 2023, "LLM-Adapters", also find that the best place of the series
adapter. It sits in front of the block's residual addition, and of a norm that follows the network.

Size 64 is the fixed one of Houlsby et al. in table 1 and the learning rate the middle one of their
sweep (both section 3.2).

f keeps the change from being written into the base's weights: the adapter can't be merged, every
later token pays for its two small products.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from tuneline.finetune.methods.method import FourBitSettings, Method, MethodSettings, load_adapter

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class BottleneckSettings(FourBitSettings):
    """Hyperparameters of bottleneck adapters."""

    name: Literal["bottleneck"] = "bottleneck"
    bottleneck_dim: int = Field(default=64, ge=0, le=65536)
    """Width of the adapter; trainable parameters grow with it linearly. 0, which is also what it
    is when left out beside a reduction_factor: by reduction_factor."""
    reduction_factor: float = Field(default=0.0, ge=0)
    """The model's hidden size over the adapter's width, rounded down to at least 1; 0: not used."""
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """f, between the two projections."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of zeroing an element between the two projections while training."""

    @model_validator(mode="before")
    @classmethod
    def _width_by_factor(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("reduction_factor"):
            return {"bottleneck_dim": 0, **values}
        return values

    @field_validator("reduction_factor")
    @classmethod
    def _reduces(cls, value: float) -> float:
        if 0 < value < 1:
            raise ValueError("must be 0 (not used) or at least 1")
        return value

    @model_validator(mode="after")
    def _one_width(self) -> BottleneckSettings:
        if self.bottleneck_dim and self.reduction_factor:
            raise ValueError(
                f"bottleneck_dim {self.bottleneck_dim} and reduction_factor "
                f"{self.reduction_factor:g} both set the width: set one of them to 0"
            )
        if not self.bottleneck_dim and not self.reduction_factor:
            raise ValueError("bottleneck_dim or reduction_factor must be above 0")
        return self

    def width(self, hidden_size: int) -> int:
        """Width of the adapter on a model of this hidden size."""
        return self.bottleneck_dim or max(1, int(hidden_size / self.reduction_factor))


def attach(model: PreTrainedModel, config: MethodSettings) -> PeftModel:
    """Freeze the base and add an adapter after every feed-forward network.

    Raises:
        MethodError: the model's feed-forward networks can't be told.
    """
    from peft import PeftModel, get_peft_model

    from tuneline.finetune.methods.bottleneck_tuner import BottleneckConfig, hidden_size_of

    assert isinstance(config, BottleneckSettings)
    tuned = get_peft_model(
        model,
        BottleneckConfig(
            task_type="CAUSAL_LM",
            bottleneck_dim=config.width(hidden_size_of(model)),
            non_linearity=config.non_linearity,
            dropout=config.dropout,
        ),
    )
    assert isinstance(tuned, PeftModel)
    return tuned


def load(model: PreTrainedModel | PeftModel, folder: str, name: str = "default") -> PeftModel:
    """Put a saved adapter on its base.

    Raises:
        ArtifactError: the adapter lacks tensors that the model needs of it, or has others.
        MethodError: the adapter was trained on a base of another hidden size.
    """
    # registers the tuner, which peft then finds by the type in adapter_config.json
    importlib.import_module("tuneline.finetune.methods.bottleneck_tuner")
    return load_adapter(model, folder, name)


METHOD = Method(
    name="bottleneck",
    title="Bottleneck adapters: a small network after every feed-forward network",
    config_class=BottleneckSettings,
    learning_rate=3e-4,
    attach=attach,
    load=load,
    loader="peft with tuneline",
    form=("bottleneck_dim", "reduction_factor", "non_linearity", "dropout"),
)
