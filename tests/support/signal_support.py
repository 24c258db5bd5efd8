"""A signal to this process at a certain step of a run, as a preemption sends it."""

import os
import signal

from train import loop


def stop_after(monkeypatch, step):
    """Send SIGTERM during a training step."""
    real_step = loop.step_lib.train_step

    def train_step(state, batch, *, settings):
        result = real_step(state, batch, settings=settings)
        if int(result[0].step) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(loop.step_lib, "train_step", train_step)
