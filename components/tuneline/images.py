"""The container images that components run in: the one place that names them.

`TUNELINE_IMAGE` overrides at compile time. A release pins a digest, since KFP's cache key holds
the reference and a tag that moves would give stale hits. The folder `images/` has one folder per
image, named as here.
"""

from __future__ import annotations

import os
from typing import Final

from tuneline import __version__

TUNELINE: Final[str] = os.environ.get("TUNELINE_IMAGE", f"tuneline:{__version__}-python3.11")
