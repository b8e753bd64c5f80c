"""One run, from its settings to `summary.json`. It imports `learner` and `rollout`; `launch` and `sb3` import it."""
