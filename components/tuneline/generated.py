"""KFP components whose parameters are a method's hyperparameters.

KFP ships a component as the source text of one function and reads its inputs from the signature,
so a component per method would be the same text with other parameters, seven times, twice over.
The text is written here from the method's settings class instead: one place knows a method's
hyperparameters, and the run form shows them with their types and defaults.
"""

from __future__ import annotations

import inspect
import linecache
import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from kfp import dsl

from tuneline.finetune.methods import Method
from tuneline.form import hyperparameters_of


def signature_of(parameters: Iterable[inspect.Parameter]) -> str:
    """The text of a function's parameters."""
    return "".join(f"{p.name}: {p.annotation.__name__}, " for p in parameters)


def values_of(parameters: Iterable[inspect.Parameter]) -> str:
    """The text of a dict from the parameters' names to their values."""
    items = "".join(f'"{p.name}": {p.name}, ' for p in parameters)
    return f"{{{items}}}"


def outputs_of(method: Method) -> str:
    """The text of a NamedTuple's fields: all hyperparameters of the method."""
    return "".join(f'("{p.name}", {p.annotation.__name__}), ' for p in hyperparameters_of(method))


def component(name: str, source: str, image: str) -> Any:
    """A component from the text of the function `name`; `dsl` and `NamedTuple` are known in it."""
    filename = f"<tuneline component {name}>"
    # inspect.getsource, which KFP calls, looks for text that is in no file here
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    module = types.ModuleType(f"tuneline_component_{name}")
    module.__dict__.update(dsl=dsl, NamedTuple=NamedTuple)
    # the text is ours, from METHODS; KFP can't read annotations that this file's import would delay
    exec(compile(source, filename, "exec", dont_inherit=True), module.__dict__)
    function: Callable[..., Any] = module.__dict__[name]
    return dsl.component(function, base_image=image, install_kfp_package=False)
