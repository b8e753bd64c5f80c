"""Many runs: a job in each slot of the machine, and what keeps one run from writing over another."""
