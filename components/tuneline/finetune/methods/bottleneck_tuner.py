"""Bottleneck adapters as a tuner of PEFT, which has none of its own.

Importing this module registers it. That is all that code with plain `peft` needs:

    import tuneline.finetune.methods.bottleneck_tuner
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, "adapter")

PEFT's own functions then work as for its tuners: `get_peft_model`, `add_adapter`, `load_adapter`,
`set_adapter`, `disable_adapter`, `delete_adapter`, `unload`, `save_pretrained`. Several active
adapters of one model follow each other in the order of their names in `set_adapter`. What each
adapter computes, and its sources: see `bottleneck.py`.

The registered type is TUNELINE_BOTTLENECK: plain BOTTLENECK stands in `adapter_config.json` files
of a fork of PEFT that means other fields by it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, register_peft_method
from torch import Tensor, nn

from tuneline.errors import MergeError, MethodError, did_you_mean
from tuneline.finetune.methods.structure import decoder_blocks, is_linear, short_targets

_NON_LINEARITIES: Final[dict[str, type[nn.Module]]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
_NAME: Final = "tuneline_bottleneck"
_PREFIX: Final = "bottleneck_"


def _extend_peft_types(name: str) -> PeftType:
    # an enumeration can't be subclassed once it has members, and PEFT looks types up in this one
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


_TYPE: Final = _extend_peft_types(_NAME.upper())


@dataclass
class BottleneckConfig(PeftConfig):
    """What `adapter_config.json` holds of bottleneck adapters.

    Raises:
        MethodError: a value is out of range, or the non-linearity unknown.
    """

    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={"help": "Modules whose output is adapted; None: every feed-forward network."},
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules of target_modules to leave alone."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save whole."}
    )
    bottleneck_dim: int = field(default=64, metadata={"help": "Width of the adapter."})
    non_linearity: str = field(
        default="relu", metadata={"help": f"One of {', '.join(_NON_LINEARITIES)}."}
    )
    dropout: float = field(
        default=0.0, metadata={"help": "Between the projections, while training."}
    )
    hidden_size: int | None = field(
        default=None,
        metadata={"help": "Of the base that it is for; None: of the model at hand."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _TYPE
        if self.non_linearity not in _NON_LINEARITIES:
            raise MethodError(
                f"bottleneck: non_linearity {self.non_linearity!r} is unknown; it is one of "
                f"{', '.join(_NON_LINEARITIES)}."
                f"{did_you_mean(str(self.non_linearity), _NON_LINEARITIES)}"
            )
        for name in ("bottleneck_dim", "hidden_size"):
            value = getattr(self, name)
            if name == "hidden_size" and value is None:
                continue
            if not isinstance(value, int) or value < 1:
                raise MethodError(f"bottleneck: {name} {value!r} must be a whole number above 0")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise MethodError(f"bottleneck: dropout {self.dropout!r} must be in [0, 1)")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A module of the base, and the adapters on its output.

    W_down starts as linear layers of torch do, W_up and the biases at zero.
    """

    # PEFT takes an adapter's name out of saved keys where it stands just before `weight` or `bias`,
    # so that an adapter's two layers can't be kept in a module of their own
    adapter_layer_names = (f"{_PREFIX}down", f"{_PREFIX}up")
    other_param_names = (f"{_PREFIX}inner",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_inner = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Put one more adapter beside those that are there."""
        assert config.hidden_size is not None
        down = nn.Linear(config.hidden_size, config.bottleneck_dim)
        up = nn.Linear(config.bottleneck_dim, config.hidden_size)
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)
        self.bottleneck_down[adapter_name] = down
        inner = nn.Sequential(_NON_LINEARITIES[config.non_linearity](), nn.Dropout(config.dropout))
        # on a model that computes, an adapter that comes later must not drop anything either
        self.bottleneck_inner[adapter_name] = inner.train(self.base_layer.training)
        self.bottleneck_up[adapter_name] = up
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        # a feed-forward network has no weight of its own; its last layer's is where its output is,
        # and in 4 bits the type that it computes in
        device = dtype = None
        for module in base_layer.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.device.type != "meta":
                    device = parameter.device
                    dtype = getattr(module, "compute_dtype", None) or parameter.dtype
        return device, dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base module's output, adapted; of a tuple (experts give their routing too) the first.

        Raises:
            MethodError: the output is neither a tensor nor a tuple that starts with one.
        """
        output = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, Tensor):
            raise MethodError(
                f"bottleneck: the output of {type(self.base_layer).__name__} is a "
                f"{type(output).__name__}: a tensor, or a tuple that starts with one, is needed; "
                "name other target_modules"
            )
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                hidden = self.adapt(name, hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def adapt(self, adapter_name: str, hidden: Tensor) -> Tensor:
        """h + W_up f(W_down h + b_down) + b_up.

        Args:
            adapter_name: one of this layer's.
            hidden: (..., hidden_size), of any floating type.

        Returns:
            Adapted hidden states of the same shape and type.
        """
        down = self.bottleneck_down[adapter_name]
        # autocast casts by itself, from the type that is there
        mixed = torch.is_autocast_enabled(hidden.device.type)
        states = hidden if mixed else hidden.to(down.get_parameter("weight").dtype)
        change = self.bottleneck_up[adapter_name](self.bottleneck_inner[adapter_name](down(states)))
        # the sum is taken in the wider of both types and rounded once
        return (hidden + change).to(hidden.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused.

        Raises:
            MergeError: always.
        """
        del safe_merge, adapter_names
        raise _not_mergeable()


class BottleneckModel(BaseTuner):
    """A model with bottleneck adapters on the outputs of its target modules."""

    prefix = _PREFIX
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  as declared in the base class

    def _prepare_adapter_config(
        self, peft_config: PeftConfig, model_config: dict[str, Any]
    ) -> BottleneckConfig:
        del model_config
        assert isinstance(peft_config, BottleneckConfig)
        model: Any = self.model
        if peft_config.target_modules is None:
            networks = [block.ffn for block in decoder_blocks(model)]
            peft_config.target_modules = set(short_targets(model, networks))
        hidden_size = hidden_size_of(model)
        if peft_config.hidden_size is None:
            peft_config.hidden_size = hidden_size
        elif peft_config.hidden_size != hidden_size:
            raise MethodError(
                f"bottleneck: the adapter is for hidden size {peft_config.hidden_size}, "
                f"{type(model).__name__} has {hidden_size}: it belongs to another base"
            )
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        del parameter_name
        assert isinstance(peft_config, BottleneckConfig)
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        width = getattr(target, "out_features", None) or getattr(target, "nf", None)
        if is_linear(target) and width != peft_config.hidden_size:
            raise MethodError(
                f"bottleneck: {current_key} has {width} outputs, the model's hidden size is "
                f"{peft_config.hidden_size}: name modules whose output goes to the residual stream"
            )
        layer = BottleneckLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # the base class also hands over `weight`, which a whole network does not have; the wrapped
        # module is kept as it is, and the adapter is on its device already
        del child
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise _not_mergeable()


def hidden_size_of(model: Any) -> int:
    """Width of the residual stream of a model of transformers."""
    return model.config.get_text_config().hidden_size


def _not_mergeable() -> MergeError:
    return MergeError(
        "bottleneck adapters can't be merged: h + W_up f(W_down h) is not linear in h, so no "
        "weights of the base compute it; keep the adapter beside its base, or train a method that "
        "merges, as lora does"
    )


register_peft_method(
    name=_NAME, config_cls=BottleneckConfig, model_cls=BottleneckModel, prefix=_PREFIX
)
