"""The bundled tiny models and the commands that made them."""

from pathlib import Path

#: Folder of the checkpoints `tiny-student` and `tiny-teacher`.
ASSETS = Path(__file__).parent
BUNDLED = tuple(sorted(file.parent.name for file in ASSETS.glob("*/config.json")))
