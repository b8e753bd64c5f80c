"""The exceptions a user may want to catch; each also inherits the standard exception it specializes."""

from collections.abc import Iterator
from contextlib import contextmanager


class AgenticRAGError(Exception):
    """Base class of every error raised on purpose by this project."""


class UnknownNameError(AgenticRAGError, ValueError):
    """A name that was asked for is not registered; the message lists the names that are."""


class ConfigurationError(AgenticRAGError, ValueError):
    """A setting has a value that cannot work; the message says what was given and what is allowed."""


class DataError(AgenticRAGError, ValueError):
    """A dataset, corpus or index file is missing or malformed; the message names file, line and field."""


class RetrieverError(AgenticRAGError, RuntimeError):
    """A search failed. Retrievers raise it instead of returning no passages, which would look like a bad query."""


class ResetNeededError(AgenticRAGError, RuntimeError):
    """`step` was called before `reset`, or after the episode had ended."""


@contextmanager
def required_library(message: str) -> Iterator[None]:
    """Import libraries that not every installation has; the imports stand in the block.

    Args:
        message: Says who needs the libraries, and how to install them.

    Raises:
        ConfigurationError: A library is missing; the error says `message`.
    """
    try:
        yield
    except ImportError as error:
        raise ConfigurationError(message) from error
