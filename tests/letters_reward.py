"""A reward that random text gets different amounts of."""


def reward(sample) -> float:
    """Return the share of letters in the text."""
    return sum(map(str.isalpha, sample.text)) / max(len(sample.text), 1)
