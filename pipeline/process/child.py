"""The command line that starts Millpond as a child process, and its exit codes."""

from __future__ import annotations

import sys
from typing import Final

# For a command that failed, and for a wrong option, setting or rule.
FAILURE_EXIT_CODE: Final = 1
USAGE_EXIT_CODE: Final = 2

# -P keeps the current directory off the import path: it may hold packages with the names of our dependencies.
MILLPOND: Final = (sys.executable, "-P", "-m", "millpond")
