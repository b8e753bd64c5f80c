"""The exceptions a user may want to catch; each also inherits the standard exception it specializes."""


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
