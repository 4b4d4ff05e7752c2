"""bitsandbytes' 4 bits, undone with the right scales on CPUs with AVX-512 too.

A 4-bit weight is one run of values, and each 64 of them share a scale, across the ends of rows. The
AVX-512 code of bitsandbytes (seen in 0.50) counts the scales row by row: where 16 divides a row's
length and 64 does not, values are undone with the scales of others, without an error, 0.2 to 0.5
off where 0.09 is usual. Given as a single row, the same weight comes out right.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any, Final

_KERNELS: Final = "cdequantize_blockwise_cpu_"


def functional() -> Any:
    """The module `bitsandbytes.functional`, once its kernels for CPUs are handed single rows."""
    found = importlib.import_module("bitsandbytes.functional")
    try:
        kernels: Any = importlib.import_module("bitsandbytes.backends.cpu.ops")
    except ModuleNotFoundError:  # another release; loading tries each width all the same
        return found
    library = getattr(kernels, "lib", None)
    if library is not None and not isinstance(library, _SingleRows):
        kernels.lib = _SingleRows(library)
    return found


class _SingleRows:
    """bitsandbytes' native library, with rows that end within a block made one."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)
        # of a 4-bit type and a float's: nf4_fp32, fp4_bf16
        if not (name.startswith(_KERNELS) and "_" in name.removeprefix(_KERNELS)):
            return function

        def in_one_row(
            packed: Any, scales: Any, out: Any, block: Any, rows: Any, width: Any
        ) -> Any:
            if width.value % block.value:
                width = ctypes.c_longlong(rows.value * width.value)
                rows = ctypes.c_longlong(1)
            return function(packed, scales, out, block, rows, width)

        return in_one_row
