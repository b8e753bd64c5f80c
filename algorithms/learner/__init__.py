"""What all algorithms share: hooks, the training step, rollouts, checkpoints and the run around them."""
