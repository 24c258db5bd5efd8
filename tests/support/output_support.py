"""What an output of the engine is compared by: ids, and bits of log-probabilities."""


def bits(output):
    """Return id and both log-probabilities of each token: equal lists are bit-exact outputs."""
    return [(token.id, token.logp, token.logp_raw) for token in output.tokens]


def token_ids(output):
    """Return the ids of an output's tokens."""
    return [token.id for token in output.tokens]
