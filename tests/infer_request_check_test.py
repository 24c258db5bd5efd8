"""What an engine refuses before anything runs, and what a request does not use cannot refuse."""

import dataclasses
import json

import pytest
import tokenizers
from tokenizer_support import load_tokenizer

from infer import config as config_lib
from infer import grammar, json_schema, request_check, stopping
from infer import options as options_lib
from m1_jax import testing
from m1_jax import tokenizer as tokenizer_lib

SIZES = config_lib.EngineConfig(max_length=256, num_pages=2, chunk_tokens=64)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.fixture(scope="module")
def checker():
    return request_check.RequestChecker(load_tokenizer(), 512, SIZES)


@pytest.fixture(scope="module")
def compiler():
    return grammar.GrammarCompiler(load_tokenizer(), 512)


@pytest.fixture(scope="module")
def large_tokenizer(tmp_path_factory):
    """Return a tokenizer with one id more than the model, and its end tokens 20 in number."""
    folder = testing.write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.add_special_tokens(["<pad>"])
    library.save(str(folder / "tokenizer.json"))
    config = {"eos_token_id": list(range(480, 500))}
    (folder / "generation_config.json").write_text(json.dumps(config))
    return tokenizer_lib.Tokenizer.load(folder)


def test_lengths(checker):
    options = options_lib.Options(max_tokens=120)
    checker.check(range(1, 10), options)
    with pytest.raises(ValueError, match=r"got 10 prompt tokens .* wanted 129 at most .num_pages"):
        checker.check(range(1, 11), options)
    with pytest.raises(ValueError, match="got 0 prompt tokens"):
        checker.check([], options)


@pytest.mark.parametrize(
    ("prompt", "values", "error"),
    [
        ((1, 512), {}, "prompt: got token id 512; wanted 0 to 511"),
        ((1, True), {}, "prompt: got token id True"),
        ((1,), {"stop_token_ids": (600,)}, "stop_token_ids: got 600"),
        ((1,), {"regex": "(unclosed"}, "regex"),
        ((1,), {"stop": ("x<end_of_sentence>",)}, "stop: got 'x<end_of_sentence>'.*stop_token_ids"),
    ],
)
def test_refusals(checker, prompt, values, error):
    with pytest.raises(ValueError, match=error):
        checker.check(prompt, options_lib.Options(max_tokens=4, **values))


def test_a_tokenizer_with_more_ids_than_the_model(large_tokenizer):
    assert large_tokenizer.vocab_size == 513
    checker = request_check.RequestChecker(large_tokenizer, 512, SIZES)
    checker.check([1, 2], options_lib.Options(max_tokens=4))
    with pytest.raises(ValueError, match="prompt: got token id 512; wanted 0 to 511"):
        checker.check([1, 512], options_lib.Options(max_tokens=4))
    with pytest.raises(ValueError, match="constrained decoding: got a tokenizer of 513 ids"):
        checker.check([1], options_lib.Options(max_tokens=4, regex="a"))


def test_any_number_of_end_tokens(large_tokenizer):
    checker = request_check.RequestChecker(large_tokenizer, 512, SIZES)
    options = options_lib.Options(max_tokens=9, stop_token_ids=tuple(range(100, 130)))
    checked = checker.check([1], options)
    assert len(checked.stop_ids) == options_lib.MAX_STOP_IDS
    assert checked.matcher is None
    for token in (100, 129, 480, 499, large_tokenizer.stop_ids[-1]):
        progress = checker.options_checker.make_progress(options)
        assert progress.push(token, 0.0) == stopping.OutputUpdate("", "stop")
    # The device cannot forbid them all, so a mask does.
    early = dataclasses.replace(options, min_tokens=2)
    matcher = checker.check([1], early).matcher
    for allowed in (False, False, True, True):
        assert grammar._mask_allows(matcher.mask(), 129) == allowed
        assert grammar._mask_allows(matcher.mask(), 480) == allowed
        assert grammar._mask_allows(matcher.mask(), 77)
        matcher.accept(77)


# ---- stop strings that are control tokens


@pytest.mark.parametrize("name", ["<beginning_of_sentence>", "<end_of_document>"])
def test_a_stop_string_that_is_a_control_token(name):
    tokenizer = load_tokenizer()
    options = options_lib.Options(stop=("zz", name), max_tokens=40)
    letters = tokenizer.encode("ab")
    progress = stopping.OutputProgress(options, tokenizer)
    texts = [progress.push(token, 0.0).text for token in letters]
    end = progress.push(tokenizer.special_token_id(name), 0.0)
    assert ("".join(texts) + end.text, end.finish_reason) == ("ab", "stop")
    # Ordinary text that spells the same characters.
    progress = stopping.OutputProgress(options, tokenizer)
    updates = [progress.push(token, 0.0) for token in tokenizer.encode(f"ab{name}")]
    assert "".join(update.text for update in updates) == "ab"
    assert updates[-1].finish_reason == "stop"
    # Not before min_tokens.
    early = dataclasses.replace(options, min_tokens=4)
    progress = stopping.OutputProgress(early, tokenizer)
    token = tokenizer.special_token_id(name)
    ends = [progress.push(each, 0.0).finish_reason for each in (*letters, token, token)]
    assert ends == [None, None, None, "stop"]


def test_ignore_eos_and_the_end_token_as_a_stop_string():
    tokenizer = load_tokenizer()
    options = options_lib.Options(stop=("<end_of_sentence>",), ignore_eos=True)
    progress = stopping.OutputProgress(options, tokenizer)
    assert progress.push(tokenizer.stop_ids[0], 0.0).finish_reason == "stop"


# ---- constraints of which nothing is dropped


def accepts(compiler, schema, text):
    tokenizer = load_tokenizer()
    matcher = compiler.compile_matcher(options_lib.Options(json_schema=schema))
    for token in tokenizer.encode(text):
        if not grammar._mask_allows(matcher.mask(), token):
            return False
        matcher.accept(token)
    return grammar._mask_allows(matcher.mask(), tokenizer.stop_ids[0])


@pytest.mark.parametrize(
    "schema",
    [
        SCHEMA,
        json.dumps(SCHEMA),
        {"name": "x", "strict": True, "schema": SCHEMA},
        json.dumps({"name": "x", "description": "y", "schema": SCHEMA}),
        {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        {"type": "json_schema", "name": "x", "strict": False, "schema": SCHEMA},
    ],
)
def test_the_schema_within_a_wrapper_holds(compiler, schema):
    assert accepts(compiler, schema, '{"a": 5}')
    assert not accepts(compiler, schema, '{"b": 5}')
    assert not accepts(compiler, schema, "7")


def test_json_mode(compiler):
    assert accepts(compiler, {"type": "json_object"}, '{"b": [1]}')
    assert not accepts(compiler, {"type": "json_object"}, "[1]")


@pytest.mark.parametrize(
    ("schema", "error"),
    [
        ({**SCHEMA, "requird": ["a"]}, "keyword 'requird' in the schema.*; did you mean required"),
        ({"properties": {"a": {"nullable": True}}}, "keyword 'nullable' in /properties/a, which"),
        ({"items": {"anyOf": [{"bogus": 1}]}}, "keyword 'bogus' in /items/anyOf/0"),
        ({"$defs": {"q": {"bogus": 1}}}, "keyword 'bogus' in /.defs/q"),
        ({"name": "x", "schema": SCHEMA, "type": "object"}, "keyword '(name|schema)'"),
        ({"name": "x", "schema": "text"}, "keyword '(name|schema)'"),
        ({"type": "integer", "format": "int32"}, "format 'int32' of a integer in the schema"),
        ({"type": "string", "contentEncoding": "base64"}, "keyword 'contentEncoding'"),
        ('{"type": "string", "type": "null"}', "json_schema: not JSON: type is given twice"),
        ("[" * 3000 + "]" * 3000, "json_schema: not JSON: more than 200"),
    ],
)
def test_a_schema_of_which_a_part_would_be_dropped(compiler, schema, error):
    with pytest.raises(ValueError, match=error) as caught:
        compiler.compile_matcher(options_lib.Options(json_schema=schema))
    assert len(str(caught.value)) < 400


def test_a_deep_schema_is_refused():
    schema = SCHEMA
    for _ in range(3000):
        schema = {"items": schema}
    with pytest.raises(ValueError, match="json_schema: not JSON"):
        json_schema.plain_schema(schema)


def test_what_describes_is_taken(compiler):
    described = {
        **SCHEMA,
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "T",
        "x-order": 1,
        "properties": {"a": {"type": "integer", "description": "d", "default": 3}},
    }
    assert accepts(compiler, described, '{"a": 5}')


def test_a_grammar_s_own_temperature_is_refused(compiler):
    with pytest.raises(ValueError, match="grammar: got a rule with a temperature"):
        compiler.compile_matcher(options_lib.Options(grammar='start[temperature=0.5]: "a"'))
    compiler.compile_matcher(options_lib.Options(grammar='start: "[temperature]"'))


def test_a_budget_rests_where_all_is_the_answer():
    tokenizer = load_tokenizer()
    expression = "<think>[a-z]{20}</think>[0-9]{3}"
    options = options_lib.Options(regex=expression, thinking_tokens=5, max_tokens=60)
    progress = stopping.OutputProgress(options, tokenizer)
    for token in tokenizer.encode("<think>" + "a" * 20 + "</think>123"):
        assert progress.next_forced() is None
        assert progress.pause_at is None
        progress.push(token, 0.0)
    free = dataclasses.replace(options, after_thinking=True)
    progress = stopping.OutputProgress(free, tokenizer)
    for token in tokenizer.encode("<think>aaaaa"):
        if progress.next_forced() is None:
            progress.push(token, 0.0)
    assert progress.next_forced() is not None
