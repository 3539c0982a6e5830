# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can mend: one line each, naming what, its value and the limit."""

from collections.abc import Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """A configuration, a path or a file that the user has to change; its text is one clear line."""

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).splitlines()))


def require(condition: bool, message: str) -> None:
    """Raises ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)


@contextmanager
def within(prefix: str) -> Iterator[None]:
    """What a ConfigError inside says of a part, said of the whole: its message gets the prefix, such as "shared."."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from None


class RunError(RuntimeError):
    """A run that cannot go on (disk full, folder in use, loss not finite); its text is one clear line."""
