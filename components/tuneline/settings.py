"""The strict, frozen pydantic model that recipe sections and method configurations derive from."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Unknown keys are faults; values can't change after construction.

    Attribute docstrings become the descriptions in the exported JSON schema.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
