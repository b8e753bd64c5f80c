"""Looking at trajectories: what finished runs have saved, in a terminal and on one self-contained page."""
