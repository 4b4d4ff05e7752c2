"""The fine-tuning methods. `METHODS` is the one list that everything else derives from.

Importing this package imports no torch: each method imports it inside its functions.
"""

from tuneline.finetune.methods.lora import METHOD as LORA
from tuneline.finetune.methods.method import Method

METHODS: tuple[Method, ...] = (LORA,)

__all__ = ["METHODS", "Method"]
