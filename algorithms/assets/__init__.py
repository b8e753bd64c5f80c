"""The bundled tiny models and the commands that made them."""

from pathlib import Path

#: Folder of the checkpoints `student` and `teacher`.
ASSETS = Path(__file__).parent
