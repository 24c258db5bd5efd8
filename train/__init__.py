"""Training: pretraining, SFT and RL."""
