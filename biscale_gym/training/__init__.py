"""Training agents of the environments with Stable-Baselines3: presets, evaluation, checkpoints, constraints."""
