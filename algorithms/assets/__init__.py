"""The bundled tiny models and the commands that made them."""

import difflib
from pathlib import Path

from agentic_rag_env.errors import UnknownNameError
from agentic_rag_env.registry import did_you_mean

#: Folder of the checkpoints `tiny-student` and `tiny-teacher`.
ASSETS = Path(__file__).parent


def resolve_model(name: str) -> str:
    """The folder of a bundled model; any other name as it is.

    Raises:
        UnknownNameError: The name is almost that of a bundled model.
    """
    bundled = sorted(file.parent.name for file in ASSETS.glob("*/config.json"))
    if name in bundled:
        return str(ASSETS / name)
    if difflib.get_close_matches(name, bundled, cutoff=0.8) and not Path(name).exists():
        raise UnknownNameError(f"There is no bundled model {name!r}.{did_you_mean(name, bundled)}")
    return name
