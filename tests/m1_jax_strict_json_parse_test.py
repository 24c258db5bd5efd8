"""JSON that a user may have damaged."""

import json

import pytest

from m1_jax import strict_json


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ('{"a": 1, "a": 2}', "a is given twice"),
        ("[NaN]", "NaN is not JSON"),
        ("[-Infinity]", "Infinity is not JSON"),
        ("[1e999]", "1e999 is too large"),
        ("1" * 5000, "has 5000 digits"),
        ("[" * 300 + "]" * 300, "more than 200 arrays"),
        ('{"a":' * 201 + "1" + "}" * 201, "more than 200 arrays"),
        ("[" * 100_000, "more than 200 arrays"),
        (b'{"a": "\xff"}', "byte 7 is no UTF-8"),
        ('{"' + "k" * 9000 + '": 1, "' + "k" * 9000 + '": 2}', "kkk"),
        ("\n\n{", "Expecting"),
    ],
)
def test_damage_is_one_short_line_with_the_files_name(text, reason):
    with pytest.raises(strict_json.JsonError) as refused:
        strict_json.parse_json(text, "some.json")
    message = str(refused.value)
    assert message.startswith("some.json: got no valid JSON (")
    assert reason in message
    assert len(message) <= 300
    assert "\n" not in message


@pytest.mark.parametrize(
    "text", ['{"a": [1, 2.5, null, true, "x"]}', "18446744073709551615", "-1", '"\ud83d\ude00"']
)
def test_json_is_read_as_it_is(text):
    assert strict_json.parse_json(text, "a") == json.loads(text)
    assert strict_json.parse_json("\ufeff" + text, "a") == json.loads(text)
    if text.isascii():
        assert strict_json.parse_json(text.encode("utf-8-sig"), "a") == json.loads(text)


def test_depth_is_counted_in_values_not_in_brackets():
    wide = json.dumps([[i] for i in range(1000)])
    assert len(strict_json.parse_json(wide, "a")) == 1000
    deep = "[" * 200 + "]" * 200
    assert strict_json.parse_json(deep, "a") is not None
