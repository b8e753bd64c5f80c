"""Gives names to the interchangeable parts, and loads the plug-ins that add parts: other packages and single files."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple

from agentic_rag_env.errors import ConfigurationError, UnknownNameError
from agentic_rag_env.settings import likely_name

#: Environment variable that lists any number of Python files which register parts, separated as in PATH.
PLUGINS_VARIABLE = "AGENTIC_RAG_PLUGINS"
#: The module of each file that was loaded, by the name in that variable, which may be relative to a former folder.
_MODULES: dict[str, str] = {}


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """The end of an error message: the likely spelling, if there is one, and everything that is allowed."""
    names = sorted(allowed)
    return f"{likely_name(given, names)} Known: {', '.join(names) or 'none'}."


def name_or_mapping(text: str) -> Any:
    """Read an argument of a command line as a name or a JSON object, for `Registry.build`; a type for argparse.

    Raises:
        ArgumentTypeError: The text begins like a JSON object but is none.
    """
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON ({error}): {text}") from None


class Entry(NamedTuple):
    """The part that a name stands for: a factory and the dataclass of its settings.

    The settings are None where the factory is itself the part.
    """

    factory: Callable[..., Any]
    config: type | None

    @property
    def settings(self) -> dict[str, dataclasses.Field[Any]]:
        """The settings by name; empty if there are none."""
        return {field.name: field for field in dataclasses.fields(self.config)} if self.config else {}


class Registry:
    """Maps names to parts of one kind.

    Register with the decorator::

        @RETRIEVERS.register("bm25", BM25Config)
        class BM25Retriever: ...

    Plug-ins use the same decorator. An installed package declares an entry point in the group
    `agentic_rag_env.<group>` that names the module to import. A single file is named in `AGENTIC_RAG_PLUGINS`. Both are
    imported when a name is first looked up.

    Args:
        group: Name of the Hydra group and of the entry-point group.
    """

    def __init__(self, group: str) -> None:
        self.group = group
        self._entries: dict[str, Entry] = {}
        self._replaced: dict[str, str] = {}
        self._plugins_loaded: str | None = None  # the value of PLUGINS_VARIABLE whose files have been loaded

    def register(self, name: str, config: type | None = None) -> Callable[[Any], Any]:
        """Return a decorator that gives a part its name.

        Args:
            name: The name used in configurations.
            config: Dataclass of settings, passed to the factory as its first argument. None for a function that is
                itself the part.

        Raises:
            ConfigurationError: The name is taken by another part, the settings are no dataclass, or a class comes
                without any.
        """

        def add(factory: Any) -> Any:
            if not dataclasses.is_dataclass(config) and (config is not None or isinstance(factory, type)):
                raise ConfigurationError(
                    f"{self.group} {name!r} must be registered with a dataclass of its settings (an empty one if it "
                    f"has none), got {config!r}."
                )
            taken = self._entries.get(name)
            if taken and (taken.factory.__module__, taken.factory.__qualname__) != (
                factory.__module__,
                factory.__qualname__,
            ):
                raise ConfigurationError(
                    f"{self.group} {name!r} is already registered by {taken.factory.__module__}; choose another name."
                )
            self._entries[name] = Entry(factory, config)
            return factory

        return add

    def replace(self, name: str, now: str) -> None:
        """Note what has replaced a part, so that the error for its former name tells the new one.

        Args:
            name: The former name.
            now: The text to write instead, such as `'dense' with backend=torch`.
        """
        self._replaced[name] = now

    def names(self) -> list[str]:
        """All known names, plug-ins included, sorted."""
        self._load_plugins()
        return sorted(self._entries)

    def get(self, name: str) -> Entry:
        """Look a name up.

        Raises:
            UnknownNameError: Nobody registered that name.
        """
        self._load_plugins()
        if name in self._replaced and name not in self._entries:
            raise UnknownNameError(f"{self.group} {name!r} is now {self._replaced[name]}; change the settings to that.")
        if name not in self._entries:
            raise UnknownNameError(f"Unknown {self.group} {name!r}.{did_you_mean(name, self._entries)}")
        return self._entries[name]

    def build(self, spec: Any, **context: Any) -> Any:
        """Make a part from a name, or from a mapping with `name` and settings; any other object is returned as it is.

        Args:
            spec: `"bm25"`, `{"name": "bm25", "k1": 1.2}`, or the part itself.
            **context: Further keyword arguments for the factory, such as the corpus of a retriever.

        Raises:
            UnknownNameError: The name is unknown.
            ConfigurationError: The mapping has no name, or a setting is unknown, is missing or can't work.
        """
        if isinstance(spec, str):
            spec = {"name": spec}
        if not isinstance(spec, Mapping):
            return spec
        settings = dict(spec)
        if "name" not in settings:
            raise ConfigurationError(f"A {self.group} mapping needs 'name', got keys {sorted(settings)}.")
        name = settings.pop("name")
        entry = self.get(name)
        if entry.config is None:
            if settings:
                raise ConfigurationError(f"{self.group} {name!r} has no settings, got {sorted(settings)}.")
            return entry.factory
        return entry.factory(self._make_config(name, entry.config, settings), **context)

    def _make_config(self, name: str, config: type, settings: Mapping[str, Any]) -> Any:
        known = self.get(name).settings
        for given in settings:
            if given not in known:
                raise ConfigurationError(f"{self.group} {name!r} has no setting {given!r}.{did_you_mean(given, known)}")
        required = {
            field.name
            for field in known.values()
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        }
        if missing := sorted(required - set(settings)):
            raise ConfigurationError(f"{self.group} {name!r} needs {', '.join(missing)}, got {sorted(settings)}.")
        try:
            return config(**settings)
        except ConfigurationError as error:
            raise ConfigurationError(f"{self.group} {name!r}: {error}") from error

    def _load_plugins(self) -> None:
        loaded, named = self._plugins_loaded, os.environ.get(PLUGINS_VARIABLE, "")
        if loaded == named:
            return
        self._plugins_loaded = named  # set before loading, because a plug-in may look a name up
        try:
            for point in entry_points(group=f"agentic_rag_env.{self.group}"):
                _load_entry_point(point)
            for path in _named_files():
                _load_file(path)
        except BaseException:
            self._plugins_loaded = loaded
            raise


def _named_files() -> list[str]:
    return [path for path in os.environ.get(PLUGINS_VARIABLE, "").split(os.pathsep) if path]


def modules_of_files() -> set[str]:
    """Names of the modules of the files that `AGENTIC_RAG_PLUGINS` names now; others may have been loaded before."""
    return {_MODULES.get(path, path) for path in _named_files()}


def _load_entry_point(point: EntryPoint) -> None:
    try:
        point.load()
    except Exception as error:
        package = f" of the package {point.dist.name!r}" if point.dist else ""
        raise ConfigurationError(
            f"The plug-in {point.name!r}{package} (entry point {point.group}: {point.value}) can't be loaded: "
            f"{type(error).__name__}: {error}. Mend the package, or uninstall it."
        ) from error


def _load_file(path: str) -> None:
    file = Path(path).expanduser().resolve()
    _MODULES[path] = name = str(file)  # which no other module can have
    if name in sys.modules:
        return
    if not file.is_file() or file.suffix != ".py":
        raise ConfigurationError(
            f"{PLUGINS_VARIABLE} names {path!r}, which is no Python file; give the paths of one or more, separated by "
            f"{os.pathsep!r}."
        )
    spec = spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigurationError(
            f"The plug-in {path!r}, named in {PLUGINS_VARIABLE}, can't be loaded: {type(error).__name__}: {error}"
        ) from error


ENVS = Registry("env")
DATASETS = Registry("dataset")
RETRIEVERS = Registry("retriever")
REWARDS = Registry("reward")
PROBES = Registry("probe")
