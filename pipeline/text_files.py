"""Read the text files that users write: settings, rules and secrets.

They are UTF-8, whatever the locale of this machine says. Editors and shells of Windows put a byte order mark in front
of UTF-8, end lines with CRLF, or save as UTF-16. The first two are read; the last is an error that names it.
"""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Final

# UTF-32 begins as UTF-16 does, and is as rare as it is unreadable here.
_UTF_16_MARKS: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: Path) -> str:
    """Return the text of a file, without a byte order mark, and with LF at the ends of lines.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not UTF-8. The message is one sentence for the user.
    """
    content = path.read_bytes()
    # Text has no zero bytes. UTF-16 without a mark has one beside every ASCII character.
    if content.startswith(_UTF_16_MARKS) or b"\0" in content:
        raise ValueError("looks like UTF-16 or a binary file: save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        wrong = content[error.start]
        reason = f"is not UTF-8: byte 0x{wrong:02x} in line {line}; save it as UTF-8"
        raise ValueError(reason) from error
    return text.replace("\r\n", "\n")


def read_secret_line(path: Path) -> str:
    """Return the first line of a file that holds a secret. See `read_text` for the errors.

    Raises:
        ValueError: The first line is empty.
    """
    # Not `splitlines`: it ends a line at more characters, and a password may contain any of them.
    line = read_text(path).partition("\n")[0].rstrip("\r")
    if not line:
        raise ValueError("its first line is empty")
    return line
