"""The zoo: one file is one algorithm. The commands stand beside them; the rooms below hold what they share."""

import sys
from importlib.util import find_spec
from pathlib import Path

#: The files here that are commands. Every other file is an algorithm.
COMMANDS = frozenset({"run", "evaluate", "compare", "show", "ask", "export", "merge"})
#: The packages of the extra `train`. Without a check, a missing one would show as an unexplained import error.
_NEEDED = ("hydra", "jinja2", "safetensors", "tensorboard", "tokenizers", "torch", "transformers")

if _missing := [name for name in _NEEDED if find_spec(name) is None]:
    _message = f"Training needs {', '.join(_missing)}: pip install 'agentic-rag-env[train]'."
    if sys.argv[0] == "-m" or Path(sys.argv[0]).name.startswith("agentic-rag-"):  # a command gets a line, no traceback
        raise SystemExit(_message)
    raise ModuleNotFoundError(_message)
