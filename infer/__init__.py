"""Generation and serving of MiniMax-M1: prompts, sampling, the command line."""
