"""Reading finished runs. It knows a run directory by its files alone and needs neither torch nor the learner."""
