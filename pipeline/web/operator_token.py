"""Who may act: whoever has the token."""

from __future__ import annotations

import hmac
from typing import Final

from millpond.pipeline.settings import read_secret
from millpond.schemas.errors import ConfigError

LENGTH_MIN: Final = 16  # nobody guesses it
SCHEME: Final = "Bearer "


class OperatorToken:
    """Whoever sends the token in the header Authorization. The file is read each time: a new token needs no restart."""

    def __init__(self, token_file: str | None) -> None:
        """Without a file there is no operator.

        Raises:
            ConfigError: the token cannot be read, or is too short.
        """
        self._token_file = token_file
        if token_file is not None:
            self._token(token_file)

    @property
    def possible(self) -> bool:
        """Whether there is a token at all."""
        return self._token_file is not None

    def is_meant(self, authorization: str) -> bool:
        """Whether this header has the token; how long that takes tells nothing of it.

        Raises:
            ConfigError: the token cannot be read now.
        """
        if self._token_file is None or not authorization.startswith(SCHEME):
            return False
        sent = authorization.removeprefix(SCHEME).encode("utf-8", "surrogateescape")
        return hmac.compare_digest(sent, self._token(self._token_file).encode())

    def _token(self, token_file: str) -> str:
        token = read_secret(token_file, "[web] token_file").strip()
        if len(token) < LENGTH_MIN or not token.isascii():
            raise ConfigError(
                f"[web] token_file: the first line of {token_file} is to be at least {LENGTH_MIN} ASCII characters"
            )
        return token
