"""The command line that starts Millpond as a child process."""

from __future__ import annotations

import sys
from typing import Final

# -P keeps the current directory off the import path: it may hold packages with the names of our dependencies.
MILLPOND: Final = (sys.executable, "-P", "-m", "millpond")
