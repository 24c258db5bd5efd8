"""Softmax attention of serving over pages of keys and values, on TPU."""
