"""Columns of records: every form becomes the same conversation, and the loss of turns is kept."""

import numpy as np
import pytest
import tokenizer_support

from train.data import chat, columns

# Fixtures.
tokenizer = tokenizer_support.tokenizer

MESSAGES = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Yes."},
]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({"messages": MESSAGES}, MESSAGES),
        (
            {
                "conversations": [
                    {"from": "human", "value": "One?"},
                    {"from": "gpt", "value": "Yes."},
                ]
            },
            MESSAGES,
        ),
        (
            {
                "conversations": [
                    {"from": "Human", "value": "One?"},
                    {"from": "assistant", "value": "Yes."},
                ],
                "system": "Be brief.",
                "id": 3,
            },
            [SYSTEM, *MESSAGES],
        ),
        ({"conversations": MESSAGES, "system": ""}, MESSAGES),
        ({"prompt": "One?", "completion": "Yes."}, MESSAGES),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, MESSAGES),
        ({"prompt": "One?", "completion": MESSAGES[1]}, MESSAGES),
        ({"prompt": '[{"role": "user", "content": "One?"}]', "completion": "Yes."}, MESSAGES),
        ({"instruction": "One?", "input": "", "output": "Yes."}, MESSAGES),
        ({"instruction": "One?", "input": None, "output": "Yes."}, MESSAGES),
        (
            {
                "instruction": "Two?",
                "input": "In short.",
                "output": "No.",
                "system": "Be brief.",
                "history": [["One?", "Yes."]],
            },
            [
                SYSTEM,
                *MESSAGES,
                {"role": "user", "content": "Two?\n\nIn short."},
                {"role": "assistant", "content": "No."},
            ],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "input_text", "text": "One?"}]},
                    {"role": "assistant", "content": [{"type": "output_text", "text": "Yes."}]},
                ]
            },
            [
                {"role": "user", "content": [{"type": "text", "text": "One?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
            ],
        ),
    ],
)
@pytest.mark.parametrize("kind", ["auto", "chat"])
def test_every_form_becomes_a_conversation(record, wanted, kind):
    assert columns.to_training_record(record, kind) == {"messages": wanted}


def test_a_text_that_looks_like_json_stays_a_prompt():
    for prompt in ("[1, 2]", "[a", '[{"x": 1}]'):
        record = columns.to_training_record({"prompt": prompt, "completion": "b"})
        assert record["messages"][0] == {"role": "user", "content": prompt}


def test_results_of_sharegpt_have_the_names_of_the_calls_before_them():
    call = '{"name": "add", "arguments": {"a": 1}}'
    turns = [
        {"from": "human", "value": "?"},
        {"from": "function_call", "value": f"[{call}, {call.replace('add', 'sub')}]"},
        {"from": "observation", "value": "1"},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "Done."},
    ]
    messages = columns.to_training_record({"conversations": turns})["messages"]
    assert messages[1] == {
        "role": "assistant",
        "tool_calls": [
            {"name": "add", "arguments": {"a": 1}},
            {"name": "sub", "arguments": {"a": 1}},
        ],
    }
    assert [message.get("name") for message in messages] == [None, None, "add", "sub", None]


def test_forms_are_chosen_by_kind_and_null_is_absence():
    both = {"text": "A", "instruction": "One?", "output": "Yes.", "messages": None}
    assert columns.to_training_record(both) == {"text": "A"}
    assert columns.to_training_record(both, "chat") == {"messages": MESSAGES}
    assert columns.describe_columns(both) == "reads text and not instruction, output"
    tools = [{"name": "f"}]
    record = {"messages": MESSAGES, "tools": tools}
    assert columns.to_training_record(record) == record
    assert columns.to_training_record({**record, "tools": []}) == {"messages": MESSAGES}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, r"got the keys \['chosen', 'prompt'\]; wanted text, or"),
        ({"text": "a", "messages": MESSAGES}, "not both. Choose by kind='text'.*--kind"),
        ({"conversations": [{"from": "cat", "value": "miau"}]}, r"\[0\].from: got 'cat'; wanted"),
        ({"conversations": [{"from": 3, "value": "miau"}]}, r"\[0\].from: got 3"),
        ({"conversations": {}}, "conversations: got {}; wanted a list"),
        ({"conversations": MESSAGES, "system": 3}, "system: got 3; wanted a string"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "no valid JSON"),
        ({"conversations": [{"from": "function_call", "value": "3"}]}, "name and arguments"),
        ({"prompt": 3, "completion": "a"}, "prompt: got 3; wanted a list"),
        ({"instruction": ["a"], "output": "b"}, "instruction: got .*; wanted a string"),
        ({"instruction": "a", "output": "b", "history": ["a"]}, "history: got .*pairs"),
    ],
)
def test_records_of_no_form_are_refused(record, message):
    with pytest.raises(ValueError, match=message):
        columns.to_training_record(record)


def learnt(tokenizer, record, **settings) -> list[str]:
    """Return the text of each run of tokens that are learnt, without the token of its end."""
    document = chat.RecordEncoder(tokenizer, **settings).encode(record)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], document.loss_mask.astype(int), [0]])))
    return [
        tokenizer.decode(document.tokens[a : b - 1].tolist())
        for a, b in zip(edges[::2], edges[1::2], strict=True)
    ]


def turns(**second):
    """Return a conversation of three answers, of which the second has further keys."""
    answers = [{"content": "A"}, {"content": "B", **second}, {"content": "C"}]
    return [
        m for a in answers for m in ({"role": "user", "content": "?"}, {"role": "assistant", **a})
    ]


@pytest.mark.parametrize("value", [0, 0.0, False])
@pytest.mark.parametrize("key", columns.LOSS_KEYS)
def test_a_turn_of_weight_0_is_read_and_not_learnt(tokenizer, key, value):
    messages = turns(**{key: value})
    assert learnt(tokenizer, {"messages": messages}) == ["A", "C"]
    plain = chat.RecordEncoder(tokenizer).encode({"messages": turns()})
    document = chat.RecordEncoder(tokenizer).encode({"messages": messages})
    assert document.tokens.tolist() == plain.tokens.tolist()


@pytest.mark.parametrize("value", [1, 1.0, True, None])
def test_other_turns_are_learnt(tokenizer, value):
    assert learnt(tokenizer, {"messages": turns(weight=value)}) == ["A", "B", "C"]


def test_weights_of_other_roles_and_of_sharegpt(tokenizer):
    messages = [{"role": "user", "content": "?", "weight": 0}, *turns(weight=1, loss=True)[1:]]
    assert learnt(tokenizer, {"messages": messages}) == ["A", "B", "C"]
    messages = [
        {"from": "human", "value": "?"},
        {"from": "gpt", "value": "A", "weight": 0},
        {"from": "human", "value": "?"},
        {"from": "gpt", "value": "B"},
    ]
    assert learnt(tokenizer, {"conversations": messages}) == ["B"]


def test_weights_and_dropped_thoughts_leave_out_both(tokenizer):
    messages = turns(weight=0)
    messages[1] = {**messages[1], "reasoning": "Thought"}
    assert learnt(tokenizer, {"messages": messages}, thinking="drop") == ["C"]


def test_of_prompt_and_completion_the_completion_is_learnt(tokenizer):
    record = {"prompt": turns()[:3], "completion": [{"role": "assistant", "content": "B"}]}
    assert learnt(tokenizer, record) == ["B"]
    record["prompt"][1]["weight"] = 1
    assert learnt(tokenizer, record) == ["A", "B"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (turns(weight=0.5), r"messages\[3\].weight: got 0.5; wanted 0 or 1"),
        (turns(loss="no"), r"messages\[3\].loss: got 'no'"),
        (turns(train=[]), r"messages\[3\].train: got \[\]"),
        (turns(weight=1, loss=0), "wanted keys that agree"),
        ([{"role": "user", "content": "?", "weight": 1}, *MESSAGES], "only turns of the assistant"),
        ([MESSAGES[0], {**MESSAGES[1], "weight": 0}], "no assistant turn to learn"),
    ],
)
def test_weights_that_are_refused(tokenizer, messages, message):
    with pytest.raises(ValueError, match=message):
        chat.RecordEncoder(tokenizer).encode({"messages": messages})


def test_a_long_text_is_encoded_in_parts_to_the_same_ids(tokenizer, monkeypatch):
    text = "".join(f"line {i}, and so on.\n\n  1. item {i}\nnext? /{i}\n" for i in range(200))
    whole = tokenizer.encode(text)
    monkeypatch.setattr(chat, "_MAX_ENCODED_CHARS", 500)
    parts = list(chat.split_text(tokenizer, text))
    assert len(parts) > 10
    assert "".join(parts) == text
    assert [i for part in parts for i in tokenizer.encode(part)] == whole
    encoder = chat.RecordEncoder(tokenizer, begin_token=None, end_token=None)
    assert encoder.encode({"text": text}).tokens.tolist() == whole
    assert list(chat.split_text(tokenizer, "x" * 2000)) == ["x" * 2000]
