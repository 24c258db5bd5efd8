"""Tests of infer.grammar: whatever the logits say, the text matches, and thinking stays free."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizer_support

from infer import grammar, stopping
from infer import options as options_lib
from infer.execution import sampling
from m1_jax import tokenizer as tokenizer_lib

# Fixtures.
tokenizer = tokenizer_support.tokenizer

# The model's vocabulary is larger than the tokenizer's, and not a whole number of words.
V, STOP = 523, 510

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["search", "open \u00e9"]},
        "count": {"type": "integer", "minimum": -5, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 3},
        "deep": {
            "type": "object",
            "properties": {"yes": {"type": "boolean"}, "no": {"type": "null"}},
            "required": ["yes"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "count", "deep"],
    "additionalProperties": False,
}


def is_valid(text):
    value = json.loads(text)
    assert {"name", "count", "deep"} <= set(value) <= {"name", "count", "deep", "tags"}
    assert value["name"] in ("search", "open \u00e9")
    assert type(value["count"]) is int
    assert -5 <= value["count"] <= 120
    tags = value.get("tags", [])
    assert len(tags) <= 3
    assert all(isinstance(tag, str) and len(tag) <= 6 for tag in tags)
    assert type(value["deep"].pop("yes")) is bool
    assert value["deep"] in ({}, {"no": None})
    return True


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return grammar.GrammarCompiler(tokenizer, V)


def allowed(mask):
    assert mask.dtype == np.uint32
    assert mask.shape == (17,)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def draw(rng, mask, temperature=5.0):
    """Sample from random logits in which nothing but the mask knows of any structure."""
    noise = rng.gumbel(size=V) + rng.normal(size=V) * 3 / temperature
    ids = sorted(allowed(mask))
    return ids[int(np.argmax(noise[ids]))]


def write(matcher, rng, tokenizer, prefix=(), thinking_tokens=None):
    """Play the engine for a model that knows nothing; return the text."""
    options = options_lib.Options(max_tokens=3_000, thinking_tokens=thinking_tokens)
    progress, texts = stopping.OutputProgress(options, tokenizer), []
    given = list(prefix)
    while progress.finish_reason is None:
        mask, token = matcher.mask(), progress.next_forced()
        if token is None:
            token = given.pop(0) if given else draw(rng, mask)
        assert token in allowed(mask)
        matcher.accept(token)
        texts.append(progress.push(token, 0.0).text)
    assert progress.finish_reason == "stop"
    assert matcher.finished
    return "".join(texts)


def test_json_is_always_valid(compiler, tokenizer):
    options = options_lib.Options(json_schema=SCHEMA)
    texts = {
        write(compiler.compile_matcher(options), np.random.default_rng(i), tokenizer)
        for i in range(12)
    }
    assert all(map(is_valid, texts))
    assert len(texts) > 10


def test_json_is_always_valid_through_the_sampler(compiler, tokenizer):
    """Eight rows at temperature 5, two of them unconstrained, logits that change at each step."""
    options = options_lib.Options(json_schema=json.dumps(SCHEMA))
    matchers = [compiler.compile_matcher(options) if row % 4 else None for row in range(8)]
    made = sampling.make_options(8, temperature=5.0, top_p=0.9)
    rng, seeds = np.random.default_rng(0), jnp.arange(8, dtype=jnp.uint32)
    outputs, ended = [[] for _ in matchers], [matcher is None for matcher in matchers]
    choose = sampling.jax.jit(sampling.sample_tokens)
    for step in range(1_500):
        everything = np.full((8, 17), 0xFFFFFFFF, np.uint32)
        for row, matcher in enumerate(matchers):
            if not ended[row]:
                everything[row] = matcher.mask()
        logits = rng.normal(size=(8, V)).astype(np.float32) * 4
        at = sampling.sampling_keys(seeds, jnp.full(8, step))
        tokens = np.asarray(choose(logits, made, at, mask=everything).token).tolist()
        for row, token in enumerate(tokens):
            if not ended[row]:
                matchers[row].accept(token)
                ended[row] = token == STOP
                outputs[row].append(token)
        if all(ended):
            break
    assert all(ended)
    assert all(is_valid(tokenizer.decode(ids)) for ids in outputs if ids)


@pytest.mark.parametrize(
    "options",
    [
        {"regex": r"[a-c]{2,5}-\d{1,3}\u00e9?"},
        {"grammar": 'start: A ("-" A)?\nA: /[a-c]{2,4}/'},
    ],
)
def test_regex_and_grammar(compiler, tokenizer, options):
    pattern = options.get("regex", r"[a-c]{2,4}(-[a-c]{2,4})?")
    for i in range(20):
        matcher = compiler.compile_matcher(options_lib.Options(**options))
        text = write(matcher, np.random.default_rng(i), tokenizer)
        assert re.fullmatch(pattern, text)


def test_masks_hold_no_foreign_ids(compiler, tokenizer):
    matcher = compiler.compile_matcher(options_lib.Options(regex=r"(.|\n)*"))
    ids = allowed(matcher.mask())
    assert STOP in ids
    assert max(ids) < tokenizer.vocab_size
    assert not ids & {508, 509, 511}  # control tokens
    first, second = matcher.mask(), matcher.mask()
    assert first is not second
    np.testing.assert_array_equal(first, second)
    assert compiler.compile_matcher(options_lib.Options()) is None


def test_only_the_end_is_left(compiler, tokenizer):
    matcher = compiler.compile_matcher(options_lib.Options(regex="ab"))
    for token in (*tokenizer.encode("a"), *tokenizer.encode("b")):
        assert not matcher.finished
        matcher.accept(token)
    assert matcher.finished
    assert allowed(matcher.mask()) == {STOP}
    matcher.accept(STOP)
    with pytest.raises(ValueError, match="got token 65; wanted one that mask"):
        compiler.compile_matcher(options_lib.Options(regex="zz")).accept(65)


def test_json_white_space_ends(compiler, tokenizer):
    matcher = compiler.compile_matcher(options_lib.Options(json_schema=SCHEMA))
    (brace,), (space,) = tokenizer.encode("{"), tokenizer.encode(" ")
    matcher.accept(brace)
    for _ in range(64):
        assert space in allowed(matcher.mask())
        matcher.accept(space)
    assert not allowed(matcher.mask()) & {space, *tokenizer.encode("\n")}


THOUGHT = "<think>\nhmm {1} > 2 </thi</think"


def answer(text):
    """Return the answer, and whether there was thinking."""
    if not text.startswith("<think>"):
        return text, False
    after = text.partition("</think>")[2]
    short = after.removeprefix("\n").removeprefix("\n")
    return short, True


def test_thinking_is_free_and_the_answer_valid(compiler, tokenizer):
    """A random model may think or not; one that is pushed thinks and goes on at random."""
    options = options_lib.Options(json_schema=SCHEMA, after_thinking=True)
    for i in range(20):
        prefix = ["", "<", THOUGHT, THOUGHT + ">"][i % 4]
        ids = tokenizer.encode(prefix)
        rng = np.random.default_rng(i)
        text = write(compiler.compile_matcher(options), rng, tokenizer, ids, thinking_tokens=40)
        short, thought = answer(text)
        assert is_valid(short)
        assert thought or not prefix


def test_thinking_allows_all_but_the_end(compiler, tokenizer):
    matcher = compiler.compile_matcher(options_lib.Options(regex="yes", after_thinking=True))
    (y,) = tokenizer.encode("y")
    opening = tokenizer.encode("<think>")
    assert {y, opening[0]} <= allowed(matcher.mask())
    assert STOP not in allowed(matcher.mask())
    matcher.accept(opening[0])
    assert y not in allowed(matcher.mask())
    for token in opening[1:]:
        matcher.accept(token)
    assert allowed(matcher.mask()) == set(range(512)) - {STOP}
    for text in ("yes, no", "</think"):
        for token in tokenizer.encode(text):
            matcher.accept(token)
    assert not matcher.finished
    matcher.accept(*tokenizer.encode(">"))
    (newline,) = tokenizer.encode("\n")
    assert {y, newline} <= allowed(matcher.mask())
    matcher.accept(newline)
    matcher.accept(newline)
    assert newline not in allowed(matcher.mask())
    for char in "yes":
        matcher.accept(*tokenizer.encode(char))
    assert matcher.finished


def test_forced_closing_fits(compiler, tokenizer):
    matcher = compiler.compile_matcher(options_lib.Options(regex="yes", after_thinking=True))
    for token in (*tokenizer.encode("<think> hm"), *stopping.encode_closing_tag(tokenizer)):
        assert token in allowed(matcher.mask())
        matcher.accept(token)
    assert write(matcher, np.random.default_rng(0), tokenizer) == "yes"


def test_answer_that_begins_like_the_tag(compiler, tokenizer):
    for text in ("<thin", "<b>", "a"):
        options = options_lib.Options(regex="<thin|<b>|a", after_thinking=True)
        matcher = compiler.compile_matcher(options)
        for token in tokenizer.encode(text):
            assert token in allowed(matcher.mask())
            matcher.accept(token)
        assert STOP in allowed(matcher.mask())
        matcher.accept(STOP)
        assert matcher.finished
    # "<t" fits both; thinking then forgets that the answer had begun.
    matcher = compiler.compile_matcher(options)
    for token in tokenizer.encode("<think>x</think>"):
        matcher.accept(token)
    assert write(matcher, np.random.default_rng(0), tokenizer) in ("<thin", "<b>", "a")


class FakeTokenizer(tokenizer_lib.Tokenizer):
    """Single bytes, and tokens that run across the end of the tag."""

    MORE = (
        b"",
        b">\n",
        b">\n\n",
        b">\n\n\n",
        b">x",
        b"k>y",
        b"</think>z",
        b"\xef\xbf\xbd",
        b"\n\n",
    )

    def __init__(self, stop_ids=(256,)):
        self.vocab_size, self.stop_ids = 256 + len(self.MORE), stop_ids

    def token_bytes(self, token_id, skip_special=True):
        if token_id < 256:
            return bytes([token_id])
        return self.MORE[token_id - 256] or (b"" if skip_special else b"<end>")

    def encode(self, text, allow_special=False):
        return list(text.encode())


def test_tokens_across_the_end_of_the_tag():
    fake = FakeTokenizer()
    compiler = grammar.GrammarCompiler(fake, 300)

    def ids(matcher):
        bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")
        return {i - 256 for i in np.flatnonzero(bits).tolist() if i >= 256}

    def start(text):
        options = options_lib.Options(regex="[xy]", after_thinking=True)
        matcher = compiler.compile_matcher(options)
        for byte in text.encode():
            matcher.accept(byte)
        return matcher

    # 0 is the end, 7 an unknown id or U+FFFD, 6 closes and goes on at once.
    assert ids(start("")) == set()
    assert ids(start("<think")) == {1, 2, 3, 4}
    assert ids(start("<think>")) == {1, 2, 3, 4, 5, 8}
    assert ids(start("<think></thin")) == {1, 2, 3, 4, 8}
    assert ids(start("<think></think")) == {1, 2, 5, 8}
    matcher = start("<think></think")
    matcher.accept(257)
    assert ids(matcher) == set()  # one newline is left
    matcher = start("<think></think>")
    assert ids(matcher) == {8}
    with pytest.raises(ValueError, match="got token 260; wanted one that mask"):
        start("<think></think").accept(260)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"json_schema": "{bad"}, "json_schema: not JSON: Expecting property name"),
        ({"json_schema": "[1]"}, "json_schema: got a JSON list; wanted an object"),
        ({"json_schema": {"x": {1}}}, "json_schema: not JSON: Object of type set"),
        ({"json_schema": {"type": "objekt"}}, "json_schema: Invalid type: objekt. Correct it"),
        ({"json_schema": {"not": {}}}, 'json_schema: Unimplemented keys: ."not".'),
        ({"json_schema": {"enum": []}}, "json_schema: Unsatisfiable schema"),
        ({"regex": "a("}, "regex: .*invalid regex"),
        ({"regex": r"[^\s\S]"}, "regex: NoExtensionBias|regex: no text matches it"),
        ({"grammar": "start: foo"}, 'grammar: .*unknown name: "foo"'),
        ({"grammar": "{"}, "grammar: "),
    ],
)
def test_refused_constraints(compiler, options, error):
    with pytest.raises(ValueError, match=error):
        compiler.compile_matcher(options_lib.Options(**options))


def test_refused_tokenizers(tokenizer):
    with pytest.raises(ValueError, match="got a tokenizer of 512 ids .* for a model of 400"):
        grammar.GrammarCompiler(tokenizer, 400)
    with pytest.raises(ValueError, match="got a tokenizer without stop tokens"):
        grammar.GrammarCompiler(FakeTokenizer(stop_ids=()), 300)
