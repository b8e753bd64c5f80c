"""Prints the lowest versions that pyproject.toml allows, as constraints of pip.

`make lowest` installs them into an environment of their own and runs the tests of the environment there.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path


def lowest(extras: list[str]) -> list[str]:
    """The lower bounds of the dependencies and of some extras, such as `numpy==1.26`."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(each for extra in extras for each in project["optional-dependencies"][extra])]
    found = [re.fullmatch(r"([\w.-]+)>=([\w.]+)", each) for each in wanted]
    assert all(found), f"each needs a lower bound and nothing else: {wanted}"
    return [f"{match[1]}=={match[2]}" for match in found if match]


if __name__ == "__main__":
    print("\n".join(lowest(sys.argv[1:])))
