"""KFP components whose parameters are a method's hyperparameters.

KFP ships a component as the source text of one function and reads its inputs from the signature,
so a component per method would be the same text with other parameters, seven times, twice over.
The text is written here from the method's settings class instead: one place knows a method's
hyperparameters, and the run form shows all of them with their types and defaults.
"""

from __future__ import annotations

import inspect
import linecache
import types
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

from kfp import dsl

from tuneline.finetune.methods import Method
from tuneline.images import TUNELINE

_PLAIN: dict[type, type] = {bool: bool, int: int, float: float, str: str}


def parameters_of(method: Method) -> list[inspect.Parameter]:
    """The method's hyperparameters as KFP types them, with their defaults; `name` aside."""
    values = method.config_class().model_dump(mode="json")
    return [
        inspect.Parameter(
            key,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=values[key],
            annotation=_kfp_type(field.annotation, f"{method.name}.{key}"),
        )
        for key, field in method.config_class.model_fields.items()
        if key != "name"
    ]


def _kfp_type(annotation: Any, where: str) -> type:
    if annotation in _PLAIN:
        return annotation
    origin = get_origin(annotation)
    if origin is Literal and {type(value) for value in get_args(annotation)} == {str}:
        return str
    if origin in (tuple, list):
        return list
    raise TypeError(f"{where}: {annotation} has no KFP parameter type")


def signature_of(method: Method) -> str:
    """The hyperparameters as the text of a function's parameters."""
    return "".join(f"{p.name}: {p.annotation.__name__}, " for p in parameters_of(method))


def values_of(method: Method) -> str:
    """The text of a dict from the hyperparameters' names to the parameters of those names."""
    items = "".join(f'"{p.name}": {p.name}, ' for p in parameters_of(method))
    return f'{{"name": "{method.name}", {items}}}'


def component(name: str, source: str) -> Any:
    """A component from the text of the function `name`; `dsl` is known in it."""
    filename = f"<tuneline component {name}>"
    # inspect.getsource, which KFP calls, looks for text that is in no file here
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    module = types.ModuleType(f"tuneline_component_{name}")
    module.__dict__["dsl"] = dsl
    # the text is ours, from METHODS; KFP can't read annotations that this file's import would delay
    exec(compile(source, filename, "exec", dont_inherit=True), module.__dict__)
    function: Callable[..., Any] = module.__dict__[name]
    return dsl.component(function, base_image=TUNELINE, install_kfp_package=False)
