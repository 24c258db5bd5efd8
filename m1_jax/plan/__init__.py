"""Compile full-size programs ahead of time, without the hardware."""
