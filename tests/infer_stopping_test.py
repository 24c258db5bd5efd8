"""Tests of infer.stopping: text, stop strings and ends against naive rules over the whole text."""

import codecs
import math

import hypothesis
import pytest
import tokenizer_support
from hypothesis import strategies as st

from infer import options as options_lib
from infer import stopping

# Fixtures.
tokenizer = tokenizer_support.tokenizer

SURE, UNSURE = math.log(0.995), math.log(0.5)


def run(progress, ids, logps=None):
    """Push tokens up to the end; return the text of each push and the reason."""
    texts = []
    for place, token in enumerate(ids):
        update = progress.push(token, UNSURE if logps is None else logps[place])
        texts.append(update.text)
        if update.finish_reason is not None:
            return texts, update.finish_reason
    return texts, None


def spell(tokenizer, text, cuts):
    """Return ids of `text` encoded piece by piece: other borders, the same text."""
    data, ids = text.encode(), []
    borders = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    for start, end in zip(borders, borders[1:], strict=False):
        piece = data[start:end]
        try:
            ids += tokenizer.encode(piece.decode())
        except UnicodeDecodeError:
            ids += [byte_ids(tokenizer)[byte] for byte in piece]
    return ids


def byte_ids(tokenizer):
    found = {}
    for token in range(tokenizer.vocab_size):
        data = tokenizer.token_bytes(token)
        if len(data) == 1:
            found.setdefault(data[0], token)
    return found


def naive(tokenizer, ids, options):
    """Decode everything again for each token; look for stop strings at each character."""
    stop_ids = options_lib.all_stop_ids(options, tokenizer.stop_ids)
    data, before = b"", 0
    for number, token in enumerate(ids, 1):
        stopped = token in stop_ids and number > options.min_tokens
        data += b"" if stopped else tokenizer.token_bytes(token)
        last = stopped or number == options.max_tokens
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        text = decoder.decode(data, final=last)
        for end in range(before + 1, len(text) + 1):
            ending = [stop for stop in options.stop if text[:end].endswith(stop)]
            if ending and number >= options.min_tokens:
                return text[: end - max(map(len, ending))], "stop", number
        if last:
            return text, "stop" if stopped else "length", number
        before = len(text)
    return None, None, len(ids)


TEXT = st.text(st.sampled_from("ab<\n é\U0001f600"), max_size=30)
STOPS = st.lists(st.text(st.sampled_from("ab<é"), min_size=1, max_size=4), max_size=4)


@hypothesis.given(
    TEXT,
    st.lists(st.integers(0, 100), max_size=8),
    STOPS,
    st.integers(0, 12),
    st.integers(1, 40),
    st.integers(0, 5),
)
@hypothesis.settings(max_examples=300)
def test_against_the_whole_text(tokenizer, text, cuts, stops, min_tokens, more, junk):
    options = options_lib.Options(
        stop=tuple(stops), min_tokens=min_tokens, max_tokens=min_tokens + more
    )
    ids = spell(tokenizer, text, cuts) + [200] * junk + [510, 3]
    progress = stopping.OutputProgress(options, tokenizer)
    texts, reason = run(progress, ids)
    wanted, wanted_reason, number = naive(tokenizer, ids, options)
    assert (reason, progress.num_tokens) == (wanted_reason, number)
    if reason is not None:
        assert "".join(texts) == wanted
    assert progress.finish_reason == reason


@hypothesis.given(TEXT, st.lists(st.integers(0, 100), max_size=20), STOPS)
def test_borders_of_tokens_do_not_matter(tokenizer, text, cuts, stops):
    options = options_lib.Options(stop=tuple(stops))
    results = set()
    for borders in ([], cuts, range(len(text) * 4)):
        texts, reason = run(
            stopping.OutputProgress(options, tokenizer), [*spell(tokenizer, text, borders), 510]
        )
        results.add(("".join(texts), reason))
    assert len(results) == 1


@hypothesis.given(TEXT, STOPS)
def test_released_text_is_never_taken_back(tokenizer, text, stops):
    progress = stopping.OutputProgress(options_lib.Options(stop=tuple(stops)), tokenizer)
    texts, reason = run(progress, spell(tokenizer, text, range(100)))
    if reason is None:
        assert "".join(texts) + progress.flush() == text
        # No more is held than might begin a stop string.
        held = text.removeprefix("".join(texts))
        assert held == "" or any(stop.startswith(held) for stop in stops)


@hypothesis.given(
    st.lists(st.text(st.sampled_from("abc"), max_size=6), max_size=6),
    st.lists(st.text(st.sampled_from("abc"), min_size=1, max_size=4), max_size=4),
)
@hypothesis.settings(max_examples=300)
def test_stop_strings_in_long_pieces(pieces, stops):
    def released(pieces):
        found, out = stopping._StopStrings(stops), ""
        for piece in pieces:
            text, hit = found.push(piece, active=True)
            out += text
            if hit:
                return out, True
        return out + found.flush(), False

    assert released(pieces) == released("".join(pieces))


def test_stop_strings_across_tokens(tokenizer):
    progress = stopping.OutputProgress(options_lib.Options(stop=("END", "N")), tokenizer)
    ids = tokenizer.encode("abc E") + tokenizer.encode("N") + tokenizer.encode("D")
    texts, reason = run(progress, ids)
    # "N" is complete before "END" is.
    assert ("".join(texts), reason) == ("abc E", "stop")
    # So it is in one piece, too, and of two that end together the longer one is cut off.
    assert stopping._StopStrings(("abcd", "bc", "c")).push("xabcd", active=True) == ("xa", True)
    with pytest.raises(ValueError, match="got token 7 after the end"):
        progress.push(7, 0.0)


def test_stop_tokens_have_no_text(tokenizer):
    (token,) = tokenizer.encode("a")
    options = options_lib.Options(stop_token_ids=(token,), ignore_eos=True, min_tokens=2)
    texts, reason = run(stopping.OutputProgress(options, tokenizer), [token, 510, token])
    assert ("".join(texts), reason) == ("a", "stop")


def test_unfinished_character_at_the_end(tokenizer):
    first = byte_ids(tokenizer)["é".encode()[0]]
    texts, reason = run(
        stopping.OutputProgress(options_lib.Options(max_tokens=1), tokenizer), [first]
    )
    assert (texts, reason) == (["\ufffd"], "length")


def test_loops():
    assert (stopping.LOOP_NUM_TOKENS, stopping.LOOP_PROBABILITY) == (3_000, 0.99)


@pytest.mark.parametrize(
    ("logps", "options", "reason", "number"),
    [
        ([SURE] * 5, {}, None, 5),
        ([SURE] * 5, {"stop_on_loop": True}, "loop", 4),
        ([SURE] * 3 + [UNSURE] + [SURE] * 3, {"stop_on_loop": True}, None, 7),
        ([SURE] * 3 + [math.log(0.99)] + [SURE], {"stop_on_loop": True}, None, 5),
        ([SURE] * 9, {"stop_on_loop": True, "min_tokens": 6}, "loop", 6),
        ([SURE] * 9, {"stop_on_loop": True, "max_tokens": 3}, "length", 3),
    ],
)
def test_loop_stop(tokenizer, logps, options, reason, number):
    progress = stopping.OutputProgress(options_lib.Options(**options), tokenizer, loop_tokens=4)
    _, found = run(progress, [65] * len(logps), logps)
    assert (found, progress.num_tokens) == (reason, number)


def drive(tokenizer, text, budget, burst, **options):
    """Play the engine: dispatch up to `burst` tokens of a model that writes `text`, then look."""
    progress = stopping.OutputProgress(
        options_lib.Options(thinking_tokens=budget, **options), tokenizer
    )
    model, out, texts = tokenizer.encode(text), [], []

    def push(token):
        out.append(token)
        update = progress.push(token, UNSURE)
        texts.append(update.text)
        return update.finish_reason is None

    while model and progress.finish_reason is None:
        forced = progress.forced_tokens()
        if forced:
            assert progress.pause_at == progress.num_tokens
            for token in forced:
                assert token == progress.next_forced()
                if not push(token):
                    break
            # The model goes on with its answer, which here is what it had after its own tag.
            rest = tokenizer.decode(model).partition("</think>")[2]
            model = tokenizer.encode(rest)
            continue
        limit = len(out) + burst
        if progress.pause_at is not None:
            assert progress.pause_at > progress.num_tokens
            limit = min(limit, progress.pause_at)
        while model and len(out) < limit:
            if not push(model.pop(0)):
                break
    return out, "".join(texts) + progress.flush(), progress


THOUGHT = "<think>\nWait, let me check whether the number is prime.\n</think>\n\nYes."


@pytest.mark.parametrize("budget", [0, 1, 3, 5, 9])
def test_budget_is_exact_whatever_the_bursts(tokenizer, budget):
    results = [drive(tokenizer, THOUGHT, budget, burst)[:2] for burst in (1, 2, 7, 100)]
    assert all(result == results[0] for result in results)
    ids, text = results[0]
    opened = len(tokenizer.encode("<think>"))
    closing = list(stopping.encode_closing_tag(tokenizer))
    start = max(budget, opened)  # never inside of the opening tag
    assert ids[start : start + len(closing)] == closing
    assert text.count("</think>") == 1
    progress = drive(tokenizer, THOUGHT, budget, 3)[2]
    # All up to the token that completes the tag; two newlines follow it.
    assert progress.reasoning_tokens == start + len(closing) - 2
    assert progress.pause_at is None


@pytest.mark.parametrize(
    "text", [THOUGHT, "Yes, and <think> is a tag.", "</think> first", " \n<think>a</think> b"]
)
def test_nothing_is_forced_without_need(tokenizer, text):
    ids, out, progress = drive(tokenizer, text, 100, 4)
    assert (ids, out) == (tokenizer.encode(text), text)
    assert progress.forced_tokens() == ()
    expected = 0
    if text.lstrip().startswith("<think>"):
        expected = next(n for n in range(len(ids)) if "</think>" in tokenizer.decode(ids[:n]))
    assert progress.reasoning_tokens == expected


def test_budget_with_a_stop_string_and_a_limit(tokenizer):
    _, text, progress = drive(tokenizer, THOUGHT, 9, 4, stop=("</think>",))
    assert progress.finish_reason == "stop"
    assert text == "<think>\n" + tokenizer.decode(tokenizer.encode(THOUGHT)[4:9]) + "\n"
    ids, _, progress = drive(tokenizer, THOUGHT, 9, 4, max_tokens=11)
    assert (len(ids), progress.finish_reason, progress.forced_tokens()) == (11, "length", ())


def test_unforced_token_is_an_error(tokenizer):
    progress = stopping.OutputProgress(options_lib.Options(thinking_tokens=3), tokenizer)
    run(progress, tokenizer.encode("<think>"))
    with pytest.raises(ValueError, match="got token 9; wanted .*, which closes the thinking"):
        progress.push(9, 0.0)


def test_closing_needs_few_tokens(tokenizer, monkeypatch):
    monkeypatch.setattr(stopping, "MAX_CLOSING_TOKENS", 5)
    stopping.OutputProgress(options_lib.Options(), tokenizer)
    with pytest.raises(ValueError, match="with 6 tokens .* wanted at most 5 tokens"):
        stopping.OutputProgress(options_lib.Options(thinking_tokens=3), tokenizer)
