"""Outputs as columns: what goes in comes out, at every length and in any form."""

import numpy as np
import pytest

from infer import output_tokens, stopping
from infer import request as request_lib


def make_tokens(count):
    return [
        output_tokens.OutputToken(
            7 * n, float(np.float32(-0.1 * n)), -float("inf") if n % 5 == 4 else -0.5, n // 3,
            ((n, -0.25),) if n % 4 == 0 else (),
        )
        for n in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 200])
def test_tokens_come_back_as_they_were_appended(count):
    wanted = make_tokens(count)
    tokens = output_tokens.OutputTokens()
    for token in wanted:
        tokens.append(token)
    assert len(tokens) == count
    assert list(tokens) == wanted == [tokens[n] for n in range(count)]
    assert tokens == wanted
    assert tuple(wanted) == tokens
    assert hash(tokens) == hash(tuple(wanted))
    assert tokens[3:50:2] == tuple(wanted[3:50:2])
    if count:
        assert (tokens[-1], tokens[-count]) == (wanted[-1], wanted[0])
    for index in (count, -count - 1):
        with pytest.raises(IndexError, match=f"of {count} tokens"):
            tokens[index]
    assert tokens.ids.tolist() == [token.id for token in wanted]
    assert tokens.logps.tolist() == [token.logp for token in wanted]
    assert tokens.raw_logps.tolist() == [token.logp_raw for token in wanted]
    assert tokens.versions.tolist() == [token.version for token in wanted]
    assert [c.dtype for c in (tokens.ids, tokens.logps)] == [np.int32, np.float32]


def test_columns_make_tokens_that_go_on():
    wanted = [token for token in make_tokens(70) if not token.top]
    tokens = output_tokens.OutputTokens.from_columns(
        *zip(*((t.id, t.logp, t.logp_raw, t.version) for t in wanted), strict=True)
    )
    assert tokens == wanted
    seen = tokens.ids
    tokens.append(output_tokens.OutputToken(5, -1.0, -2.0, 3))
    assert tokens[-1] == output_tokens.OutputToken(5, -1.0, -2.0, 3)
    assert seen.tolist() == [token.id for token in wanted]  # a view does not change
    empty = output_tokens.OutputTokens.from_columns([], [], [], [])
    empty.append(wanted[0])
    assert empty == wanted[:1]
    with pytest.raises(ValueError, match=r"columns: got the lengths \[1, 2\]; wanted one length"):
        output_tokens.OutputTokens.from_columns([1], [0.0, 0.0], [0.0], [1])


def test_unequal_outputs_differ():
    tokens, shorter, other = make_tokens(9), make_tokens(8), make_tokens(9)
    other[2] = output_tokens.OutputToken(1, 0.0, 0.0, 0)
    columns = output_tokens.OutputTokens()
    for token in tokens:
        columns.append(token)
    assert columns != shorter
    assert columns != other
    assert columns != 3


class TextProgress:
    """Makes any text of a token."""

    text = ""

    def push(self, token, logp):
        return stopping.OutputUpdate(self.text, None)


def test_the_text_of_many_pieces():
    progress = TextProgress()
    request = request_lib.Request(0, (1,), None, (), progress, None, None)
    pieces = [chr(97 + n % 26) * (n % 3) for n in range(3000)]
    for n, piece in enumerate(pieces):
        progress.text = piece
        request.take(output_tokens.OutputToken(n, 0.0, 0.0, 0))
        request.show_next()
        if n % 500 == 0:
            assert request.text == "".join(pieces[: n + 1])
    assert request.text == "".join(pieces)
