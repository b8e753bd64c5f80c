"""A policy for the masked learners of sb3-contrib on the discrete view: one network scores every candidate alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from agentic_rag_env.wrappers import DiscreteActions


class CandidateScorer(nn.Module):
    """Scores every action. One network serves all candidates; it sees a candidate's features and the state's.

    Args:
        sizes: Numbers of state features, of features per candidate, of candidates, and of searches per candidate.
        hidden_size: Width of the network.
    """

    def __init__(self, sizes: tuple[int, int, int, int], hidden_size: int) -> None:
        super().__init__()
        self.num_state, self.num_features, self.num_candidates, num_searches = sizes
        self.latent_dim_pi = 1 + self.num_candidates * (num_searches + 1)
        self.latent_dim_vf = 2 * hidden_size
        self.of_state = nn.Linear(self.num_state, hidden_size)
        self.of_candidate = nn.Linear(self.num_features, hidden_size)
        self.hidden = nn.Linear(hidden_size, hidden_size)
        self.searches = nn.Linear(hidden_size, num_searches)
        self.answer = nn.Linear(hidden_size, 1)
        self.question = nn.Linear(2 * hidden_size, 1)
        for head in (self.searches, self.answer, self.question):
            nn.init.normal_(head.weight, std=0.01)  # all actions have the same score at first

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores, [B, actions], and the features for the value, [B, 2 * hidden_size]."""
        state = self.of_state(observation[:, : self.num_state])
        candidates = observation[:, self.num_state :].unflatten(1, (self.num_candidates, self.num_features))
        each = torch.relu(self.hidden(torch.relu(self.of_candidate(candidates) + state[:, None])))
        whole = torch.cat((torch.relu(state), (each * candidates[..., :1]).amax(dim=1)), dim=1)
        scores = self.question(whole), self.searches(each).flatten(1), self.answer(each).squeeze(2)
        return torch.cat(scores, dim=1), whole

    def forward_actor(self, observation: Tensor) -> Tensor:
        """Scores, [B, actions]."""
        return self(observation)[0]

    def forward_critic(self, observation: Tensor) -> Tensor:
        """Return the features for the value, [B, 2 * hidden_size]."""
        return self(observation)[1]


def policy_class() -> type:
    """Make the library's policy around `CandidateScorer`; the library is imported only where it is used."""
    from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy

    class CandidatePolicy(MaskableActorCriticPolicy):
        def __init__(self, *args: Any, sizes: tuple[int, int, int, int], hidden_size: int, **kwargs: Any) -> None:
            self.sizes, self.hidden_size = sizes, hidden_size
            super().__init__(*args, **kwargs)

        def _build_mlp_extractor(self) -> None:
            self.mlp_extractor = CandidateScorer(self.sizes, self.hidden_size)  # type: ignore[assignment]

        def _build(self, lr_schedule: Callable[[float], float]) -> None:
            super()._build(lr_schedule)
            self.action_net = nn.Identity()  # the scores are the logits
            rate: dict[str, Any] = {"lr": lr_schedule(1), **self.optimizer_kwargs}
            self.optimizer = self.optimizer_class(self.parameters(), **rate)

    return CandidatePolicy


def policy_settings(view: DiscreteActions, hidden_size: int) -> dict[str, Any]:
    """The `policy_kwargs` of that policy.

    Args:
        view: One of the environments.
        hidden_size: Width of the network.
    """
    searches = 2 + len(view.query_words)
    sizes = (view.num_state_features, view.num_candidate_features, view.max_candidates, searches)
    return {"sizes": sizes, "hidden_size": hidden_size, "ortho_init": False}  # the scorer initializes its own weights
