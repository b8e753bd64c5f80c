"""Where a run stands: stage and step, the best checks so far, and what it has cost."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Position:
    """Where a run stands. A resumed run needs this, the weights and the learner's state.

    Attributes:
        stage: Index of the stage being trained.
        stage_step: Steps done in it.
        stage_starts: Step of the whole run at which each stage so far began.
        dev_exact_match: Exact match at the last check on the dev split in this stage; None before the first.
        best_checks: Step of the whole run and exact match of the best check on the dev split, for each stage so far;
            None before the first check.
        costs: Seconds and tokens so far, by name.
    """

    stage: int = 0
    stage_step: int = 0
    stage_starts: list[int] = field(default_factory=lambda: [0])
    dev_exact_match: float | None = None
    best_checks: list[tuple[int, float] | None] = field(default_factory=lambda: [None])
    costs: dict[str, float] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Training steps of the whole run."""
        return self.stage_starts[-1] + self.stage_step

    def next_stage(self) -> None:
        """Go to the beginning of the next stage."""
        self.stage_starts.append(self.step)
        self.stage += 1
        self.stage_step = 0
        self.dev_exact_match = None
        self.best_checks.append(None)

    def note_check(self, exact_match: float) -> None:
        """Record a check on the dev split that was made at the present step."""
        self.dev_exact_match, best = exact_match, self.best_checks[-1]
        if best is None or exact_match > best[1]:
            self.best_checks[-1] = self.step, exact_match

    def best_steps(self) -> list[int]:
        """The steps of the best checks."""
        return [check[0] for check in self.best_checks if check is not None]
