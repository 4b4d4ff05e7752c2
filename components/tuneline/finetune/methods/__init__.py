"""The fine-tuning methods. `METHODS` is the one list that everything else derives from.

Importing this package imports no torch: each method imports it inside its functions.
"""

from tuneline.finetune.methods.bitfit import METHOD as BITFIT
from tuneline.finetune.methods.bottleneck import METHOD as BOTTLENECK
from tuneline.finetune.methods.full import METHOD as FULL
from tuneline.finetune.methods.ia3 import METHOD as IA3
from tuneline.finetune.methods.lora import METHOD as LORA
from tuneline.finetune.methods.method import Method
from tuneline.finetune.methods.prompt_tuning import METHOD as PROMPT_TUNING
from tuneline.finetune.methods.qlora import METHOD as QLORA

METHODS: tuple[Method, ...] = (FULL, LORA, QLORA, BOTTLENECK, PROMPT_TUNING, IA3, BITFIT)

__all__ = ["METHODS", "Method"]
