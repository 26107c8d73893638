"""The operator's token: a request that carries it may requeue and drop dead letters."""

from __future__ import annotations

import hmac
from typing import Final

from millpond.pipeline.settings import read_secret
from millpond.schemas.errors import ConfigError

LENGTH_MIN: Final = 16  # too long to guess
SCHEME: Final = "Bearer "


class OperatorToken:
    """Checks the header Authorization. The file is read for each check, so a new token needs no restart."""

    def __init__(self, token_file: str | None) -> None:
        """Without a file no request may give orders.

        Raises:
            ConfigError: the token cannot be read, or is too short.
        """
        self._token_file = token_file
        if token_file is not None:
            self._token(token_file)

    @property
    def configured(self) -> bool:
        """True if there is a token file."""
        return self._token_file is not None

    def is_valid(self, authorization: str) -> bool:
        """True if the header has the token. The comparison takes the same time for every wrong token.

        Raises:
            ConfigError: the token file cannot be read any more.
        """
        if self._token_file is None or not authorization.startswith(SCHEME):
            return False
        sent = authorization.removeprefix(SCHEME).encode("utf-8", "surrogateescape")
        return hmac.compare_digest(sent, self._token(self._token_file).encode())

    def _token(self, token_file: str) -> str:
        token = read_secret(token_file, "[web] token_file").strip()
        if len(token) < LENGTH_MIN or not token.isascii():
            raise ConfigError(
                f"[web] token_file: the first line of {token_file} must have at least {LENGTH_MIN} ASCII characters"
            )
        return token
