"""What a request's output is compared by, for tests of the engine."""


def bits(output):
    """Return id and both log-probabilities of each token: equal lists are bit-exact outputs."""
    return [(token.id, token.logp, token.logp_raw) for token in output.tokens]
