"""Tests of m1_jax.tokenizer: text never becomes control, bytes are exact, files are checked."""

import json

import hypothesis
import pytest
import tokenizers
from hypothesis import strategies as st

from m1_jax import testing
from m1_jax import tokenizer as tokenizer_lib

END = "<end_of_sentence>"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return testing.write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tok(directory):
    return tokenizer_lib.Tokenizer.load(directory)


def edited(directory, tmp_path, edit):
    """Load a copy of tokenizer.json after `edit` changed its content."""
    content = json.loads((directory / "tokenizer.json").read_text())
    edit(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    return tokenizer_lib.Tokenizer.load(tmp_path)


def with_names(text):
    """Text in which names of control tokens are likely."""
    return st.lists(text | st.sampled_from(tokenizer_lib.STRUCTURE_TOKENS), max_size=6).map("".join)


@hypothesis.given(with_names(st.text(max_size=20)))
def test_text_survives_and_never_becomes_a_control_token(tok, text):
    ids = tok.encode(text)
    assert not {tok.special_token_id(name) for name in tokenizer_lib.STRUCTURE_TOKENS} & set(ids)
    assert tok.decode(ids, skip_special=False) == text
    assert tok.decode(ids) == text


@hypothesis.given(with_names(st.text(max_size=20)))
def test_allow_special_reads_the_names(directory, tok, text):
    library = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tok.encode(text, allow_special=True) == library.encode(text).ids


@hypothesis.given(st.lists(st.integers(0, 520), max_size=30), st.booleans())
def test_streamed_text_equals_the_text_of_all(tok, ids, skip_special):
    stream = tok.decoder(skip_special)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == tok.decode(ids, skip_special)


@hypothesis.given(st.lists(st.integers(0, 511), max_size=30))
def test_decode_equals_the_library(directory, tok, ids):
    library = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tok.decode(ids) == library.decode(ids)


def test_stream_holds_a_character_back(tok):
    stream = tok.decoder()
    ids = tok.encode("é")
    assert len(ids) == 2
    assert [stream.push(i) for i in ids] == ["", "é"]
    assert stream.push(ids[0]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_ids_beyond_the_tokenizer(tok):
    assert tok.vocab_size == 512
    assert tok.decode([600]) == "\ufffd"
    with pytest.raises(ValueError, match="got -1"):
        tok.decode([-1])


def test_special_ids(tok):
    assert tok.special_token_id(END) == 510
    assert tok.stop_ids == (510,)
    assert tok.decode([510]) == ""
    assert tok.decode([510], skip_special=False) == END
    with pytest.raises(ValueError, match=r"got '<nope>'; this tokenizer.json has <begin"):
        tok.special_token_id("<nope>")
    with pytest.raises(ValueError, match="special token: got 'a'"):
        tok.special_token_id("a")


def test_added_tokens_without_the_special_flag(directory, tmp_path):
    def edit(content):
        for entry in content["added_tokens"]:
            entry["special"] = entry["content"] == "<end_of_document>"
        entry = dict(content["added_tokens"][-1], id=512, content="<think>", special=False)
        content["added_tokens"].append(entry)

    tok = edited(directory, tmp_path, edit)
    assert tok.special_token_id(END) not in tok.encode(f"a{END}b")
    assert tok.encode(f"a{END}b", allow_special=True)[1] == tok.special_token_id(END)
    assert tok.encode("<think>") == [512]  # an added token that is text
    assert tok.decode([512]) == "<think>"
    assert tok.decode([510]) == ""
    assert tok.vocab_size == 513


def test_control_name_in_the_bpe_vocabulary_alone(directory, tmp_path):
    def edit(content):
        content["added_tokens"] = []
        content["model"]["vocab"].update({END: 510, "<x>": 511})

    tok = edited(directory, tmp_path, edit)
    assert tok.stop_ids == (510,)
    assert 510 not in tok.encode(END)
    assert tok.decode([510], skip_special=False) == END


def test_whole_word_lookup_is_cut(directory, tmp_path):
    def edit(content):
        content["model"]["vocab"][END] = 510
        content["model"]["ignore_merges"] = True
        content["pre_tokenizer"]["use_regex"] = False

    tok = edited(directory, tmp_path, edit)
    assert 510 not in tok.encode(END)
    assert tok.decode(tok.encode(f"{END}{END}a")) == f"{END}{END}a"


def test_stop_ids_of_the_companion_files(directory, tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 510]}')
    settings = {"eos_token": {"content": "<end_of_document>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tok = edited(directory, tmp_path, lambda content: None)
    assert tok.stop_ids == (3, 510, 511)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert tokenizer_lib.Tokenizer.load(tmp_path).stop_ids == (7, 511)


def test_end_tokens_of_all_files_are_united(directory, tmp_path):
    edited(directory, tmp_path, lambda content: None)
    for config_ids, generation_ids, wanted in (
        (5, None, (5, 510)),
        (5, 7, (5, 7, 510)),
        ([5, 510], [7, 5], (5, 7, 510)),
        (list(range(20)), list(range(10, 30)), (*range(30), 510)),
        (None, [], (510,)),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config_ids}))
        (tmp_path / "generation_config.json").write_text(
            json.dumps({"eos_token_id": generation_ids})
        )
        assert tokenizer_lib.Tokenizer.load(tmp_path).stop_ids == wanted


def test_byte_order_marks_are_left_out(directory, tmp_path):
    wanted = edited(directory, tmp_path, lambda content: None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        raw = (directory / name).read_bytes()
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + raw)
    marked = tokenizer_lib.Tokenizer.load(tmp_path)
    assert marked.fingerprint == wanted.fingerprint
    assert marked.stop_ids == wanted.stop_ids


def test_transformers_number_for_no_limit_is_read(directory, tmp_path):
    edited(directory, tmp_path, lambda content: None)
    text = '{"model_max_length": 1000000000000000019884624838656}'
    (tmp_path / "tokenizer_config.json").write_text(text)
    assert tokenizer_lib.Tokenizer.load(tmp_path).stop_ids == (510,)


def test_tokenizer_json_alone(directory, tmp_path):
    assert edited(directory, tmp_path, lambda content: None).stop_ids == (510,)


def test_post_processor_and_truncation_add_and_drop_nothing(directory, tmp_path):
    def edit(content):
        library = tokenizers.Tokenizer.from_str(json.dumps(content))
        library.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{END} $A", special_tokens=[(END, 510)]
        )
        library.enable_truncation(4)
        library.enable_padding(length=8)
        content.update(json.loads(library.to_str()))

    assert len(edited(directory, tmp_path, edit).encode("abcdefgh" * 9, allow_special=True)) > 8
    assert edited(directory, tmp_path, edit).encode("") == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json is not valid JSON: .*Copy it again"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: got a JSON list; wanted an object"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", '{"eos_token": "<e>"}', "got eos_token '<e>', which token"),
        ("tokenizer_config.json", '{"eos_token": 3}', "got the token 3; wanted a string"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id: got 'x'; wanted an id"),
        ("config.json", '{"eos_token_id": [true]}', "config.json: eos_token_id: got True; wanted"),
        ("config.json", '{"eos_token_id": 3000000000}', "eos_token_id: got 3000000000; wanted"),
        ("tokenizer.json", "", "tokenizer.json is not valid JSON"),
        ("tokenizer.json", "[" * 100_000, "tokenizer.json is not valid JSON: more than 200"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        ("tokenizer_config.json", '{"additional_special_tokens": 5}', "tokens 5; wanted a list"),
    ],
)
def test_damaged_files(directory, tmp_path, name, content, message):
    edited(directory, tmp_path, lambda content: None)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        tokenizer_lib.Tokenizer.load(tmp_path)


def test_missing_file_and_other_decoders(directory, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json: no such file; wanted .* Copy"):
        tokenizer_lib.Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="wanted ByteLevel"):
        edited(directory, tmp_path, lambda content: content.update(decoder=None))


def test_lone_surrogate(tok):
    with pytest.raises(ValueError, match="lone surrogate .* at character 1; wanted valid Unicode"):
        tok.encode("a\ud800")
