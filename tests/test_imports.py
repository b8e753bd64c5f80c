"""Who may import whom, read from the source; and what an import brings and costs."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import agentic_rag_env.registry
import algorithms

ROOT = Path(__file__).parents[1]
PACKAGES = ("agentic_rag_env", "algorithms", "conf", "benchmarks", "tests")
#: For each room of `algorithms`, the rooms that it may import.
ROOMS = {
    "assets": set(),
    "learner": set(),
    "rollout": {"learner"},
    "training": {"learner", "rollout", "assets"},
    "launch": {"learner", "rollout", "training", "assets"},
    "sb3": {"learner", "rollout", "training", "assets"},
    "analysis": {"assets"},
}
#: Plain reading of files, without any of the rooms: every room may import it.
LEAVES = {"algorithms.training.run_files", "algorithms.training.event_files"}
#: The only modules that know Hydra: settings, the launcher and what guards a run; and the commands.
KNOW_HYDRA = {
    "algorithms.training.settings",
    "algorithms.training.schemas",
    "algorithms.training.typed",
    "algorithms.training.compose",
    "algorithms.training.setting_errors",
    "algorithms.launch.clear_errors",
    "algorithms.launch.command_line",
    "algorithms.launch.hydra_launcher",
    "algorithms.launch.resolvers",
    "algorithms.launch.run_guard",
    "algorithms.training.protocol",
    *(f"algorithms.{name}" for name in algorithms.COMMANDS),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(*folders: str) -> dict[str, Path]:
    return {module_name(path): path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))}


def imports(path: Path, at_top: bool = False) -> set[str]:
    """Names of the modules that a file imports; with `at_top`, only those that importing the file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if at_top:
        for_types = [
            node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node)
        ]
        lazy = {id(node) for branch in for_types for node in ast.walk(branch)}
        lazy |= {
            id(node) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.Lambda)) for node in ast.walk(f)
        }
    found = set()
    for node in ast.walk(tree):
        if at_top and id(node) in lazy:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import; write the whole name"
            assert node.module
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def packages(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


MODULES = sources("agentic_rag_env", "algorithms", "conf")
ENVIRONMENT = {name: path for name, path in MODULES.items() if name.startswith("agentic_rag_env")}
ZOO = {
    name: path
    for name, path in MODULES.items()
    if re.fullmatch(r"algorithms\.\w+", name) and name.partition(".")[2] not in algorithms.COMMANDS | ROOMS.keys()
}


def room(name: str) -> str:
    """The room of a module of `algorithms`; empty for the files at its top."""
    parts = name.split(".")
    return parts[1] if parts[0] == "algorithms" and len(parts) > 1 and parts[1] in ROOMS else ""


def test_the_files_were_found():
    assert {"agentic_rag_env.env", "agentic_rag_env.retrievers.bm25"} <= ENVIRONMENT.keys()
    assert {"algorithms.dgpo", "algorithms.kd", "algorithms.ppo", "algorithms.sft"} <= ZOO.keys()
    assert {room(name) for name in MODULES} == {"", *ROOMS}
    assert MODULES.keys() >= KNOW_HYDRA
    assert imports(ENVIRONMENT["agentic_rag_env.registry"]) >= {"importlib.metadata", "agentic_rag_env.errors"}


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_the_environment_stands_alone(name):
    used = packages(imports(ENVIRONMENT[name]))
    assert not used & {"algorithms", "conf", "benchmarks", "tests", "hydra", "omegaconf"}
    allowed = {*sys.stdlib_module_names, "agentic_rag_env", "numpy", "gymnasium"}
    assert packages(imports(ENVIRONMENT[name], at_top=True)) <= allowed


#: What each room of the retrievers may import of the others; every other file there is a retriever.
RETRIEVERS = "agentic_rag_env.retrievers"
RETRIEVER_ROOMS = {
    "base": set(),
    "index_folder": {"base"},
    "vectors": {"base", "index_folder", "words"},
    "cache_file": set(),
    "words": set(),
    "indexing": {"base", "bm25", "index_folder", "vectors"},
    "serving": {"base"},
}


@pytest.mark.parametrize("name", [name for name in ENVIRONMENT if name.startswith(f"{RETRIEVERS}.")])
def test_the_rooms_of_the_retrievers_import_in_one_direction(name):
    room = name.split(".")[2]
    allowed = RETRIEVER_ROOMS.get(room, {"base", "index_folder", "vectors", "cache_file", "words"})
    used = {module.split(".")[2] for module in imports(ENVIRONMENT[name]) if module.startswith(f"{RETRIEVERS}.")}
    assert used - {room} <= allowed


def test_a_retriever_has_a_file_of_its_name_or_belongs_to_a_plug_in():
    for name in agentic_rag_env.registry.RETRIEVERS.names():
        module = agentic_rag_env.registry.RETRIEVERS.get(name).factory.__module__
        assert module == f"{RETRIEVERS}.{name}" or not module.startswith("agentic_rag_env.")
    files = {name.split(".")[2] for name in ENVIRONMENT if name.startswith(f"{RETRIEVERS}.")}
    assert files - RETRIEVER_ROOMS.keys() <= set(agentic_rag_env.registry.RETRIEVERS.names())


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("algorithms")])
def test_hydra_is_known_to_the_commands_only(name):
    used = packages(imports(MODULES[name]))
    assert not used & {"benchmarks", "tests"}
    assert name in KNOW_HYDRA or not used & {"hydra", "omegaconf", "conf"}


@pytest.mark.parametrize("name", ZOO)
def test_an_algorithm_imports_the_learner_and_at_most_one_parent(name):
    ours = {module for module in imports(ZOO[name]) if module.startswith("algorithms.")}
    rooms = {room(module) for module in ours} - {""}
    assert rooms <= ({"learner", "training", "sb3"} if name == "algorithms.maskable_ppo" else {"learner"})
    assert len({module for module in ours if module in ZOO}) <= 1
    if name != "algorithms.maskable_ppo":
        of_the_environment = {module for module in imports(ZOO[name]) if module.startswith("agentic_rag_env.")}
        assert all(module.split(".")[1] in ("errors", "settings") for module in of_the_environment)
    assert "transformers" not in packages(imports(ZOO[name]))


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) == "analysis"])
def test_finished_runs_are_read_without_a_network(name):
    assert not packages(imports(MODULES[name])) & {"torch", "transformers", "safetensors"}


@pytest.mark.parametrize("name", [name for name in MODULES if room(name)])
def test_a_room_imports_only_the_rooms_below_it(name):
    ours = {module for module in imports(MODULES[name]) if module.startswith("algorithms.")}
    of_others = {module for module in ours if not any(f"{module}.".startswith(f"{leaf}.") for leaf in LEAVES)}
    assert {room(module) for module in of_others} - {""} <= {room(name), *ROOMS[room(name)]}
    if name in LEAVES:
        assert {room(module) for module in ours} <= {"assets"}
    assert not ours & {*ZOO, *(f"algorithms.{command}" for command in algorithms.COMMANDS)}


def test_no_modules_import_each_other_in_a_circle():
    edges = {
        name: {module for module in imports(path, at_top=True) if module in MODULES} for name, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for module in edges[name] - {name}:
                visit(module, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


@pytest.mark.parametrize("name", MODULES)
def test_every_module_can_be_imported_and_says_what_it_is_for(name):
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):
        assert hasattr(module, public), public
    source = MODULES[name].read_text(encoding="utf-8")
    if source.strip():
        assert ast.get_docstring(ast.parse(source))


def test_the_environment_imports_light():
    """Without torch, Hydra and the libraries behind retrievers, in a fresh process."""
    code = (
        "import sys, json, agentic_rag_env; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert {"agentic_rag_env", "gymnasium", "numpy"} <= loaded
    heavy = {"torch", "transformers", "tokenizers", "hydra", "omegaconf", "bm25s", "faiss", "scipy", "httpx", "rich"}
    assert not loaded & {*heavy, "algorithms"}


@pytest.mark.parametrize(
    "command",
    [
        "import algorithms.training.schemas as schemas; schemas.register_schemas()",
        "import algorithms.run",
        "import algorithms.evaluate",
        "import algorithms.ask",
        "import algorithms.compare",
        "import algorithms.show",
    ],
)
def test_settings_and_finished_runs_need_no_torch(command):
    """What a person waits for at `--help`, `--cfg job`, a typo, `compare` and `show`."""
    code = f"import sys; {command}; print({{'torch', 'transformers', 'scipy', 'sklearn'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = done.stdout.strip()
    assert "torch" not in loaded
    assert "transformers" not in loaded


# --- the tree --------------------------------------------------------------------------------------------------------


def test_the_tree_holds_what_it_should_and_nothing_else():
    tracked = _tracked()
    if tracked is None:
        pytest.skip("not a git checkout")
    furniture = {
        "CITATION.cff",
        "pyproject.toml",
        "SECURITY.md",
        "constraints.txt",
        "Makefile",
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "CONTRIBUTING.md",
    }
    tops = {path.partition("/")[0] for path in tracked}
    assert {top for top in tops if not top.startswith(".")} <= furniture | set(PACKAGES)


def test_no_path_of_a_machine_stands_in_the_tree():
    tracked = _tracked()
    if tracked is None:
        pytest.skip("not a git checkout")
    # A home, a workplace or a temporary folder: the names are put together here so that this file is clean itself.
    places = re.compile(
        rb"(?<![\w.~$}/*-])/(?:" + b"|".join([b"home", b"Users", b"root", b"work", b"tmp"]) + rb")/[\w.-]+"
    )
    found = []
    for path in tracked:
        file = ROOT / path
        if file.is_file() and file.suffix not in (".safetensors", ".gz", ".zst"):
            found += [f"{path}: {match.decode()}" for match in places.findall(file.read_bytes())]
    assert found == []


def _tracked() -> list[str] | None:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else None
