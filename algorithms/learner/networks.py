"""Loading networks and tokenizers, reading hidden states and logits, the critic, and checks that catch bad pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging as hf_logging

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.weight_files import require_own_weights
from algorithms.learner import adapters, decoder, folded_decoder, ops
from algorithms.learner.adapter_folders import Adapter, find_adapter, whole_model
from algorithms.learner.config import working_dtype
from algorithms.learner.model_folders import (
    as_folder,
    has_tokenizer,
    hint_for,
    refuse_pickles,
    require_config,
    require_model,
    require_tokenizer,
)

Network = TypeVar("Network", bound=nn.Module)


def load_tokenizer(path: str | Path, *, base: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder or of a model on the Hugging Face hub.

    Args:
        path: A folder, or a hub id such as `Qwen/Qwen2.5-0.5B`. An adapter without a tokenizer takes its base model's.
        base: Folder or hub id of the model that an adapter belongs to; None: the one that it names.

    Raises:
        ConfigurationError: The folder holds no tokenizer, or the hub id cannot be loaded.
    """
    require_model(path)
    if not has_tokenizer(path):
        path = whole_model(path, base)
    require_tokenizer(path)
    # For some model types AutoTokenizer replaces the splitting rules of tokenizer.json by the family's own,
    # even where the folder declares that the file is complete.
    declared = _load(lambda place: dict(get_tokenizer_config(place)), path).get("tokenizer_class")
    generic = declared in ("PreTrainedTokenizerFast", "TokenizersBackend")
    loader: Any = PreTrainedTokenizerFast if generic else AutoTokenizer
    return _load(loader.from_pretrained, path, trust_remote_code=False)


def load_model(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "float32",
    base: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode. An adapter comes merged into its base model.

    Args:
        path: A folder written by `save_pretrained`, or a hub id such as `Qwen/Qwen2.5-0.5B`.
        device: Where the weights go.
        dtype: Type of the weights, such as `torch.bfloat16` or its name; "auto" keeps that of the files, and is float32
            for an adapter.
        base: Folder or hub id of the model that an adapter belongs to; None: the one that it names.

    Raises:
        ConfigurationError: The folder is no model, the hub id cannot be loaded, or the model's family cannot be
            trained here (see `check_lm_head`).
    """
    require_model(path)
    if (adapter := find_adapter(path, base)) is not None:
        return _load_merged(adapter, device, dtype)
    require_config(path)
    refuse_pickles(path)
    _load(require_own_weights, path)
    # Weights of another shape are let through here, so that the error below can name them.
    model, report = _load(
        AutoModelForCausalLM.from_pretrained,
        path,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    wrong = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
    if wrong := sorted([*wrong, *_without_place(model, report["unexpected_keys"])]):
        raise ConfigurationError(
            f"The weights in {str(path)!r} do not fit its config.json: {len(wrong)} of them are missing, have another "
            f"shape or have no place, among them {wrong[0]}. Copy config.json and weights from the same model."
        )
    model = model.to(device).eval()
    if model.dtype == torch.float64:
        _keep_norms_in_float64(model)
    check_lm_head(model)
    return model


def _without_place(model: PreTrainedModel, unexpected: Iterable[str]) -> list[str]:
    """Those of the weights that the model did not take which belong to its own parts.

    A head of its own beside the model, such as `v_head` of a critic, is no part of a language model, and the number
    `masked_bias` in older files of GPT-2 is no weight.
    """
    parts = {name for module in (model, model.base_model) for name, _ in module.named_children()}
    return [name for name in unexpected if name.partition(".")[0] in parts and not name.endswith(".masked_bias")]


def _load_merged(adapter: Adapter, device: torch.device | str, dtype: torch.dtype | str) -> PreTrainedModel:
    """Merge in full precision, and round the sum once."""
    wide = "float64" if dtype in ("float64", torch.float64) else "float32"
    merged: Any = adapters.merge(load_model(adapter.base, device=device, dtype=wide), adapter)
    return merged if dtype == "auto" else merged.to(getattr(torch, str(dtype).rpartition(".")[2]))


def declared_config(path: str | Path) -> PreTrainedConfig:
    """Read a language model's configuration, without loading weights.

    Args:
        path: A folder or a hub id.

    Raises:
        ConfigurationError: The path is no model, or can't be loaded.
    """
    require_model(path)
    path = whole_model(path)
    require_config(path)
    return _load(AutoConfig.from_pretrained, path, trust_remote_code=False).get_text_config()


def declared_vocab_size(path: str | Path) -> int:
    """The width of a model's logits; see `declared_config`."""
    return declared_config(path).vocab_size


def freeze(model: Network) -> Network:
    """Take a network out of training: evaluation mode, no gradients. Returns the same network."""
    return model.eval().requires_grad_(False)


def soften(model: PreTrainedModel, temperature: float) -> PreTrainedModel:
    """Divide a model's logits by a temperature for all who read them. Returns the same network.

    Args:
        model: A causal language model.
        temperature: Above 1, the model is less sure and errs more often when it is sampled from.
    """
    head = model.get_output_embeddings()
    # A parameter of its own: a head tied to the input embedding must not change that embedding.
    head.weight = nn.Parameter(head.weight.detach() / temperature)
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias.detach() / temperature)
    return model


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return an id that may fill padding. It may be a real token, so no mask can be read off it."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    return 0


def shared_vocab_size(
    policy_tokenizer: PreTrainedTokenizerBase, other_tokenizer: PreTrainedTokenizerBase, *widths: int
) -> int:
    """Count the leading ids that two models have in common, so that their distributions can be compared.

    Models of one family may differ in the width of their logits by padding alone (Qwen2.5: 151936 and 152064).

    Args:
        policy_tokenizer: Tokenizer of the policy.
        other_tokenizer: Tokenizer of the teacher or reference.
        *widths: Width of each model's logits.

    Returns:
        The smallest width, or less if one tokenizer has further tokens that the other does not have.

    Raises:
        ConfigurationError: An id that both tokenizers know stands for different strings.
    """
    policy_tokens, other_tokens = (
        {token_id: token for token, token_id in tokenizer.get_vocab().items()}
        for tokenizer in (policy_tokenizer, other_tokenizer)
    )
    sizes = [max(tokens) + 1 for tokens in (policy_tokens, other_tokens)]
    shared = min(*sizes, *widths)
    for token_id in range(shared):
        mine, theirs = policy_tokens.get(token_id), other_tokens.get(token_id)
        if mine != theirs:
            raise ConfigurationError(
                f"The two tokenizers ({sizes[0]} and {sizes[1]} ids, logits of {' and '.join(map(str, widths))}) "
                f"differ from id {token_id} on: {mine!r} for the policy, {theirs!r} for the other model. Their "
                "probabilities cannot be compared token by token. Choose two models of one family, or train "
                "without a teacher: model.teacher=null."
            )
    return min(widths) if sizes[0] == sizes[1] else shared


def require_rows(tokenizer: PreTrainedTokenizerBase, width: int, path: str | Path) -> None:
    """Make sure that every token has a row in the embedding.

    Args:
        tokenizer: The model's tokenizer.
        width: Rows of the model's embedding.
        path: The model, for the error.

    Raises:
        ConfigurationError: A token has no row, for example because it was added without resizing the model.
    """
    token, last = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if last >= width:
        raise ConfigurationError(
            f"The tokenizer of {str(path)!r} has ids up to {last} ({token!r}), but its embedding has only {width} "
            "rows. Call model.resize_token_embeddings(len(tokenizer)) and save both, or take that token out."
        )


def logit_width(model: PreTrainedModel) -> int:
    """Return the width of the model's logits, which may exceed the number of tokens."""
    return model.get_output_embeddings().weight.shape[0]


def backbone_hidden(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    at: tuple[Tensor, Tensor] | None = None,
    num_shared: int = 0,
) -> Tensor:
    """Compute the last hidden states, final norm included, of a model or of its backbone.

    Args:
        model: A causal language model, or its `base_model`.
        input_ids: [B, T] int64.
        attention_mask: [B, T] bool; each row counts its real tokens from position 0. None: padding is on the right.
        at: Rows and columns, each [n] int64, of the states that are wanted; None: all.
        num_shared: Leading columns that are the same in all rows, and are not in `at`.

    Returns:
        [B, T, d] in the model's dtype, meaningless on padding; or [n, d] at the positions.
    """
    if attention_mask is None or bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all()):
        # Causality already hides the padding, so attention needs no mask and takes its fast causal path. Positions
        # go on through the padding: transformers takes equal ones for the start of a packed sequence.
        length = input_ids.shape[1]
        mask, position_ids = None, torch.arange(length, device=input_ids.device)[None]
        if decoder.is_readable(model.base_model):
            if at is not None and decoder.pays_to_share(len(input_ids), num_shared, input_ids.device):
                return decoder.read_shared(model.base_model, input_ids, num_shared, at)
            if folded_decoder.can_fold(model.base_model):
                folded = folded_decoder.FoldedDecoder(model.base_model)
                return folded.read(input_ids, position_ids, length=length, at=at)
            return decoder.read(model.base_model, input_ids, position_ids, at=at)
    else:
        mask, position_ids = attention_mask.long(), (attention_mask.long().cumsum(dim=1) - 1).clamp_(min=0)
    hidden = model.base_model(
        input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False
    ).last_hidden_state
    return hidden if at is None else hidden[at]


def lm_logits(model: PreTrainedModel, hidden: Tensor, vocab_size: int) -> Tensor:
    """Compute logits over the first `vocab_size` ids, so that softmax renormalizes over them alone.

    Args:
        model: A causal language model.
        hidden: [n, d] from `backbone_hidden`.
        vocab_size: V, at most the width of the model's logits.

    Returns:
        [n, V] float32, or float64 from a float64 model.
    """
    logits = model.get_output_embeddings()(hidden)
    # A slice of all would still cost a copy of all logits in the backward pass.
    return ops.at_least_float32(logits if logits.shape[-1] == vocab_size else logits[..., :vocab_size])


@torch.no_grad()
def check_lm_head(model: PreTrainedModel) -> None:
    """Make sure that backbone plus output embedding is all that the model's own forward does.

    Raises:
        ConfigurationError: The family caps or scales its logits, and would be trained wrongly.
    """
    width = logit_width(model)
    input_ids = (torch.arange(6, device=model.device) * 7919 % width)[None]
    logits = ops.at_least_float32(model(input_ids=input_ids).logits[0])
    is_half = model.dtype.itemsize < 4  # where the short forward rounds otherwise than transformers
    plain = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state if is_half else None
    hidden = backbone_hidden(model, input_ids, None) if plain is None else plain
    ours = lm_logits(model, hidden[0], width).log_softmax(dim=-1)
    # Rounding grows with the logits, and those of a model that is sure of its words are large.
    tolerance = (0.05 if is_half else 1e-3) * max(1.0, float(logits.abs().max()))
    if (difference := float((logits.log_softmax(dim=-1) - ours).abs().max())) > tolerance:
        raise ConfigurationError(
            f"Models of type {model.config.model_type!r} do more to their logits than one matrix product (log-probs "
            f"differ by {difference:.3g}, allowed is {tolerance:.3g}), for instance soft-capping or scaling. Such a "
            "family is not supported; Qwen, Llama and Mistral are."
        )


class Critic(nn.Module):
    """Estimates the value of the state before each token.

    Args:
        model: The policy at the start of training.
        shared: True: the critic is a value head on the policy's own hidden states, so the value loss also trains the
            policy. False: it owns a copy of the policy's backbone as well, or of its adapter where there is one.

    The head starts at zero, so every value is 0 at first and the first advantages are the returns themselves. The head
    of the reference code (Search-R1's token classifier with one class) starts at random instead.
    """

    def __init__(self, model: PreTrainedModel, shared: bool = False) -> None:
        super().__init__()
        embedding = model.get_input_embeddings().weight
        hidden_size = model.get_output_embeddings().weight.shape[1]
        self.shared = shared
        trunk = model.base_model if shared else adapters.twin(model.base_model)
        if not shared:
            self.backbone = trunk
        # A module in a tuple is not registered, so `parameters` and `state_dict` leave out the policy's.
        self._trunk: tuple[Any] = (trunk,)
        dtype = getattr(torch, working_dtype(str(embedding.dtype).rpartition(".")[2]))
        self.head = nn.Linear(hidden_size, 1, device=embedding.device, dtype=dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def values(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        rows: Tensor,
        columns: Tensor,
        num_shared: int = 0,
    ) -> Tensor:
        """Compute the values at given positions.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, T] bool; None: padding is on the right.
            rows: [N] int64; `collate.predicting_positions` returns `rows` and `columns`.
            columns: [N] int64; the state before token t is read at column t - 1.
            num_shared: Leading columns that are the same in all rows, see `backbone_hidden`.

        Returns:
            [N] float32.
        """
        return self.read(backbone_hidden(self._trunk[0], input_ids, attention_mask, (rows, columns), num_shared))

    def read(self, hidden: Tensor) -> Tensor:
        """Compute values [n] from hidden states [n, d], in full precision under autocast too, like the returns."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(ops.at_least_float32(hidden)).squeeze(-1)


def _keep_norms_in_float64(model: PreTrainedModel) -> None:
    """Replace norms that go through float32 whatever the model's dtype, as those of transformers do.

    Raises:
        ConfigurationError: The family has such a norm of another formula.
    """
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            kind, eps = type(norm).__name__, getattr(norm, "variance_epsilon", None)
            if "RMSNorm" not in kind or isinstance(norm, nn.RMSNorm):
                continue
            if eps is None or not kind.endswith("RMSNorm"):
                raise ConfigurationError(
                    f"Models of type {model.config.model_type!r} can't be computed in float64: their {kind} goes "
                    "through float32. Set learner.precision=float32, or choose another family, such as Qwen, Llama or "
                    "Mistral."
                )
            weight: Any = norm.weight
            exact = nn.RMSNorm(weight.shape, eps)
            exact.weight = weight
            setattr(parent, name, exact)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing bars of its own between the lines of a run."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _load(loader: Callable[..., Any], path: str | Path, **settings: Any) -> Any:
    try:
        with no_progress_bars():
            return loader(str(as_folder(path) or path), **settings)
    except ConfigurationError:
        raise
    except Exception as error:  # a stranger's files can make the parsing libraries raise anything
        raise ConfigurationError(f"Cannot load {str(path)!r}. {hint_for(path, error)}") from error
