"""One run, from its settings to `summary.json`. Imports `learner` and `rollout`; `launch` and `sb3` import it."""
