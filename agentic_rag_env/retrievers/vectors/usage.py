"""How an encoder turns tokens into one vector: as its folder says, as a preset of its family says, or as settings say.

A folder of sentence-transformers says it in `modules.json`, `<n>_Pooling/config.json`, `sentence_bert_config.json` and
`config_sentence_transformers.json`. The files are read as data: what they ask for and we do not compute is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.terminal import printable

#: Ways to make one vector of the last hidden states: the mean or the largest over all tokens; the first; the last.
POOLINGS = ("mean", "cls", "last", "max")
#: Most tokens of a text where nobody says it, if the model has so many positions.
_MAX_LENGTH = 512
#: The names of the poolings in the files; a newer version of the library writes the second form.
_FLAGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
}
_MODES = {"mean": "mean", "cls": "cls", "lasttoken": "last", "max": "max"}
#: Prompts for passages, by the order in which sentence-transformers looks for them.
_PASSAGE_PROMPTS = ("document", "passage", "corpus")
_LENGTH_FILES = [
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]


class Usage(NamedTuple):
    """How texts become vectors. None stands for what is not said.

    Attributes:
        pooling: One of `POOLINGS`.
        normalize: Whether passages are scaled to length 1, so that relevance is the cosine.
        query_prefix, passage_prefix: Text put before each query and each passage.
        max_length: Most tokens kept of each text, prefix included.
        lower_case: Whether texts are lower-cased first.
    """

    pooling: str | None = None
    normalize: bool | None = None
    query_prefix: str | None = None
    passage_prefix: str | None = None
    max_length: int | None = None
    lower_case: bool = False


#: Families of encoders by the name of their preset, with the hub ids that belong to them. Sources: their model cards.
PRESETS: dict[str, Usage] = {
    "e5": Usage("mean", True, "query: ", "passage: ", 512),
    "bge": Usage("cls", True, "Represent this sentence for searching relevant passages: ", "", 512),
    "minilm": Usage("mean", True, "", "", 256),
    "gte": Usage("mean", True, "", "", 512),
}
_HUB_IDS = {
    "e5": r"intfloat/(multilingual-)?e5-(small|base|large)(-v2)?",
    "bge": r"BAAI/bge-(small|base|large)-en(-v1\.5)?",
    "minilm": r"sentence-transformers/all-MiniLM-L(6|12)-v\d",
    "gte": r"thenlper/gte-(small|base|large)",
}


def resolve(model: str, preset: str | None, given: Usage, positions: int | None) -> Usage:
    """Find out how an encoder is to be used, from all that is said about it.

    Pooling and scaling must be said once at least, and by nobody otherwise. A prefix or a length that is given comes
    first, then the folder's, then the preset's. The preset of a well-known hub id is taken without being named, for
    what the folder leaves unsaid. So is that of a folder with the name of one, if nobody names a prefix; then a line
    says so.

    Args:
        model: Folder or hub id.
        preset: Name of a preset, or None.
        given: The settings; None for those that are not given.
        positions: Number of positions of the model; None if it has no bound.

    Raises:
        ConfigurationError: Two of settings, preset and folder contradict each other, nobody names the pooling, or the
            folder needs what is not computed here.
    """
    folder = read_folder(model)
    family = PRESETS[preset] if preset else Usage()
    fallback = Usage() if preset else _well_known(model, given, folder)
    sources = {"the settings": given, f"preset={preset}": family, f"the folder of {model!r}": folder}
    pooling = _agreed("pooling", sources) or fallback.pooling
    if pooling is None:
        raise ConfigurationError(
            f"encoder {model!r} does not say how its tokens become one vector: it has no modules.json of "
            f"sentence-transformers. Give preset={'|'.join(PRESETS)} or pooling={'|'.join(POOLINGS)}."
        )
    if preset:
        for name in ("query_prefix", "passage_prefix"):
            if getattr(given, name) is None:
                _agreed(name, sources)
    normalize = _agreed("normalize", sources)
    lengths = (given.max_length, folder.max_length, family.max_length or fallback.max_length, _MAX_LENGTH)
    length = next(length for length in lengths if length)
    if positions is not None and length > positions:
        if given.max_length:
            raise ConfigurationError(f"encoder max_length={length}, but {model!r} has {positions} positions; lower it.")
        length = positions
    query, passage = (
        next((text for source in (given, folder, family, fallback) if (text := getattr(source, name)) is not None), "")
        for name in ("query_prefix", "passage_prefix")
    )
    return Usage(pooling, normalize is not False, query, passage, length, folder.lower_case)


def _well_known(model: str, given: Usage, folder: Usage) -> Usage:
    """The preset of a well-known hub id, or of a local copy of it; a blank `Usage` for another model."""
    known = next((preset for preset, ids in _HUB_IDS.items() if re.fullmatch(ids, model)), None)
    path = Path(model).expanduser()
    if known or not path.is_dir():
        return PRESETS[known] if known else Usage()
    # Copies keep the name, or lie in the hub's cache in models--<organization>--<name>/snapshots/<revision>.
    names = [path.resolve().name, path.name, *(part.rpartition("--")[2] for part in path.parts if "--" in part)]
    patterns = {preset: ids.partition("/")[2] for preset, ids in _HUB_IDS.items()}
    found = next((preset for preset, ids in patterns.items() if any(re.fullmatch(ids, name) for name in names)), None)
    prefixes = (given.query_prefix, given.passage_prefix, folder.query_prefix, folder.passage_prefix)
    if found is None or any(prefix is not None for prefix in prefixes):
        return Usage()
    taken = PRESETS[found]
    print(
        f"The encoder {printable(model)} has the name of a well-known one, so preset={found} is taken: "
        f"query_prefix={taken.query_prefix!r}, passage_prefix={taken.passage_prefix!r}. Give both to choose others.",
        flush=True,
    )
    return taken


def _agreed(name: str, sources: Mapping[str, Usage]) -> Any:
    """The one value that the sources name, None if none does."""
    said = {who: value for who, usage in sources.items() if (value := getattr(usage, name)) is not None}
    if len(set(said.values())) > 1:
        what = ", ".join(f"{value!r} by {who}" for who, value in said.items())
        raise ConfigurationError(
            f"encoder {name} is named differently: {what}. Vectors made in another way than the model was trained for "
            f"find little; leave {name} to the folder, or choose another preset."
        )
    return next(iter(said.values()), None)


def read_folder(model: str) -> Usage:
    """What a folder or hub id of sentence-transformers says; a blank `Usage` for another model.

    Raises:
        ConfigurationError: A file is damaged, cannot be looked up, or asks for what is not computed here.
    """
    modules = _read(model, "modules.json")
    if modules is None:
        return Usage()
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise _unusable(model, "modules.json is no list of modules")
    kinds = [str(module.get("type")).rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or modules[0].get("path"):
        raise _unusable(
            model,
            f"its modules are {', '.join(kinds)[:200]}; what can be computed is a Transformer in the folder itself, "
            "Pooling and Normalize",
        )
    facts = _mapping(model, "config_sentence_transformers.json")
    bert: Mapping[str, Any] = next(filter(None, (_mapping(model, name) for name in _LENGTH_FILES)), {})
    length = bert.get("max_seq_length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise _unusable(model, f"its max_seq_length is {length!r:.80}")
    query, passage = _prompts(model, facts)
    return Usage(
        pooling=_pooling(model, modules[1].get("path"), prompts=bool(query or passage)),
        normalize=_normalize(model, facts.get("similarity_fn_name"), scaled=kinds[-1] == "Normalize"),
        query_prefix=query,
        passage_prefix=passage,
        max_length=length,
        lower_case=bert.get("do_lower_case") is True,
    )


def _pooling(model: str, path: Any, *, prompts: bool) -> str:
    # The name is the library's own form, so it cannot lead out of the folder.
    if not isinstance(path, str) or not re.fullmatch(r"\d+_Pooling", path, re.ASCII):
        raise _unusable(model, f"its pooling lies in {path!r:.80}, not in a folder such as 1_Pooling")
    settings = _mapping(model, f"{path}/config.json")
    if prompts and settings.get("include_prompt") is False:
        raise _unusable(model, "it pools without the tokens of its prompts (include_prompt)")
    modes = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value is True]
    named = settings.get("pooling_mode", modes)
    named = named if isinstance(named, list) else [named]
    found = [_FLAGS.get(mode) or _MODES.get(mode) for mode in named if isinstance(mode, str)]
    if len(named) != 1 or len(found) != 1 or found[0] is None:
        raise _unusable(model, f"its pooling is {named!r:.200}; one of {', '.join(POOLINGS)} can be computed")
    return found[0]


def _normalize(model: str, similarity: Any, *, scaled: bool) -> bool | None:
    """Whether relevance is the cosine; None where the folder says nothing and the library takes the cosine."""
    if similarity not in (None, "cosine", "dot", "dot_product"):
        raise _unusable(model, f"its similarity is {similarity!r:.80}; cosine and dot can be computed")
    if scaled or similarity == "cosine":
        return True
    return None if similarity is None else False


def _prompts(model: str, facts: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The prompts of queries and passages as `encode_query` and `encode_document` of the library choose them."""
    prompts = facts.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise _unusable(model, "its prompts are no mapping of texts")
    default = prompts.get(name) if isinstance(name := facts.get("default_prompt_name"), str) else None
    passage = next((prompts[name] for name in _PASSAGE_PROMPTS if name in prompts), default)
    # The library writes empty prompts for models that have none.
    return prompts.get("query", default) or None, passage or None


def _mapping(model: str, name: str) -> Mapping[str, Any]:
    content = _read(model, name)
    if content is not None and not isinstance(content, dict):
        raise _unusable(model, f"{name} is no mapping")
    return content or {}


def _read(model: str, name: str) -> Any:
    """The content of a JSON file of a model, None if there is no such file."""
    folder = Path(model).expanduser()
    try:
        if folder.is_dir():
            file = folder / name if (folder / name).is_file() else None
        else:
            from transformers.utils import cached_file

            found = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
            file = None if found is None else Path(found)
        return None if file is None else json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unusable(model, f"{name} cannot be read: {error}") from error


def _unusable(model: str, reason: str) -> ConfigurationError:
    return ConfigurationError(f"encoder {model!r} cannot be used as it says: {reason}.")
