"""Reinforcement learning: sample, score, update, sync."""
