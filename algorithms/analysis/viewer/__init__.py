"""Shows the trajectories that runs have saved, in a terminal and on one self-contained page."""
