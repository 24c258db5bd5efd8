"""Damages files of requests and prompts, and reads them as the commands do, without a model.

    python benchmarks/damage_inputs.py [--cases=600] [--first=0] [--show=NAME]

Each case has a seed of its own, its number. It takes a good file, damages it in one way, and reads
it with the reading function of `infer.offline` or `infer.generate`. A case must end within 60 s,
either in requests, whose outputs can be written, or in a ValueError. Each line of the error has at
most 300 characters. It names the file, and the line that is at fault. Anything else is a fault:
another exception, a signal, no end. --show prints the errors of one kind of damage. The exit status
is 1 where there is a fault.
"""

import argparse
import collections
import json
import multiprocessing
import pathlib
import random
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

from infer import batch_input, batch_output, generate, offline
from m1_jax import testing

ROOT = pathlib.Path(__file__).resolve().parents[1]
MAX_SECS, MAX_CHARS = 60, 300
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": [1, 2]}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Add é."}]},
        {"role": "assistant", "content": None, "reasoning": "A tool.", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
    ],
    "tools": [TOOL],
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
BATCH_LINES = [
    {"id": "r1", "prompt": "Hello, wörld", "max_tokens": 20, "temperature": 0.7, "seed": 3},
    {"id": 2, **CHAT, "preset": "lightning", "max_tokens": 9, "stop": ["x", "\n\n"]},
    {"prompt": "a", "system": "b", "top_p": 0.9, "top_k": 50.0, "min_p": 0.1, "stop": "q"},
    {"prompt": "a", "json_schema": SCHEMA, "after_thinking": True, "max_tokens": 30},
    {"prompt": "a", "json_schema": json.dumps(SCHEMA), "id": None, "top_logprobs": 3},
    {"prompt": "a", "regex": "[a-z]{3}", "logit_bias": {"7": 1.5}, "stop_token_ids": [1, 2]},
    {"prompt": "a", "grammar": 'start: "yes" | "no"', "repetition_penalty": 1.2},
    {"prompt": "a", "thinking_tokens": 5, "min_tokens": 1, "ignore_eos": False},
]
PROMPT_LINES = [{"prompt": "Hello, wörld"}, {"prompt": "a", "system": "b"}, CHAT]
RAW = "@RAW@"  # stands for text that is no value of `json.dumps`
OTHER_VALUES = [
    *(None, True, False, 0, -1, 1, 50.0, 0.5, 1e308, 2**63, 2**64, "", "x", "\u2028", "9" * 5000),
    *([], {}, [[]], [None], ["x"], [1, "x"], {"": None}, {"a": {"b": []}}, "y" * 100_000),
]
NUMBERS = ["1" + "0" * 400, "9" * 5000, "1e999", "-1e999", "-0.0", "1e-400", "NaN", "Infinity"]
NUMBERS += [
    "-Infinity",
    "0x10",
    "01",
    "1_000",
    "+1",
    ".5",
    "18446744073709551616",
    "0." + "3" * 999,
]
NAMES = [
    "",
    "PROMPT",
    "promt",
    "max_token",
    "custom_id",
    "body",
    "p\u0433ompt",
    "k" * 9000,
    "\ud800",
]
NAMES += [
    "prompt ",
    "n",
    "stream",
    "response_format",
    "model",
    "__class__",
    "\x00",
    "id",
    "messages",
]

# ---- damages: from a generator of random numbers and lines of JSON to the bytes of a file


def dump_lines(lines: list[Any], raw: str = "") -> bytes:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    return text.replace(json.dumps(RAW), raw).encode()


def replace_value(rng: random.Random, lines: list[Any], value: Any) -> list[Any]:
    """Return the lines with one random value, at any depth, replaced."""
    lines = json.loads(json.dumps(lines))
    node: Any = lines
    key: Any = rng.randrange(len(lines))
    while isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
        node = node[key]
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
    node[key] = value
    return lines


def cut_bytes(rng: random.Random, lines: list[Any]) -> bytes:
    data = dump_lines(lines)
    start = rng.randrange(len(data))
    return data[:start] + data[rng.choice([start + 1, start + 9, len(data)]) :]


def flip_bits(rng: random.Random, lines: list[Any]) -> bytes:
    data = bytearray(dump_lines(lines))
    for _ in range(rng.choice([1, 1, 1, 8])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def insert_bytes(rng: random.Random, lines: list[Any]) -> bytes:
    data = dump_lines(lines)
    place = rng.randrange(len(data) + 1)
    inserted = rng.choice(
        [rng.randbytes(rng.randrange(1, 9)), b"\n", b'"', b"{", b"}", b"\\", b",", b"\x1f\x8b\x08"]
    )
    return data[:place] + inserted + data[place:]


def change_kind(rng: random.Random, lines: list[Any]) -> bytes:
    return dump_lines(replace_value(rng, lines, rng.choice(OTHER_VALUES)))


def insert_surrogate(rng: random.Random, lines: list[Any]) -> bytes:
    text = rng.choice(["\ud835", "row-\udfff", "\ude00\ud83d", "a\ud800b", "😀\ud83d"])
    if rng.random() < 0.5:
        return dump_lines(replace_value(rng, lines, text))
    line = rng.choice(lines)
    return dump_lines([*lines, {**line, rng.choice(["id", "prompt", "stop", "system"]): text}])


def insert_mark(rng: random.Random, lines: list[Any]) -> bytes:
    data, mark = dump_lines(lines), "\ufeff".encode()
    starts = [0, *(match.end() for match in re.finditer(b"\n", data))]
    place = rng.choice([0, rng.choice(starts), rng.randrange(len(data))])
    encodings = [("utf-8", 5), ("utf-16", 1), ("utf-16-le", 1), ("utf-32", 1)]
    encoding = rng.choices(*zip(*encodings, strict=True))[0]
    return (data[:place] + mark + data[place:]).decode(errors="replace").encode(encoding)


def insert_nul(rng: random.Random, lines: list[Any]) -> bytes:
    if rng.random() < 0.5:
        return dump_lines(replace_value(rng, lines, rng.choice(["\x00", "a\x00b", "\x00" * 500])))
    data = dump_lines(lines)
    place = rng.randrange(len(data) + 1)
    return data[:place] + b"\x00" * rng.choice([1, 7, 4096]) + data[place:]


def nest_deeply(rng: random.Random, lines: list[Any]) -> bytes:
    depth = rng.choice([100, 190, 250, 985, 3000, 100_000])
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
    nested = opening * depth + "1" + closing * (depth if rng.random() < 0.7 else 0)
    if rng.random() < 0.4:  # as text, which arguments and schemas may be
        nested = json.dumps(nested)
        number = rng.randrange(len(lines))
        name = rng.choice(["json_schema", "prompt", "tools"])
        call = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": RAW}]}
        line = rng.choice([{**lines[number], name: RAW}, {"messages": [call]}])
        return dump_lines([*lines[:number], line, *lines[number + 1 :]], nested)
    return dump_lines(replace_value(rng, lines, RAW), nested)


def enlarge_number(rng: random.Random, lines: list[Any]) -> bytes:
    if rng.random() < 0.5:
        return dump_lines(replace_value(rng, lines, RAW), rng.choice(NUMBERS))
    names = ["id", "seed", "max_tokens", "temperature", "top_k", "stop_token_ids", "logit_bias"]
    line = {"prompt": "a", rng.choice(names): RAW}
    return dump_lines([*lines, line], rng.choice([*NUMBERS, f"[{rng.choice(NUMBERS)}]"]))


def change_name(rng: random.Random, lines: list[Any]) -> bytes:
    lines = json.loads(json.dumps(lines))
    number = rng.randrange(len(lines))
    line = lines[number]
    name = rng.choice(list(line))
    value = line[name] if rng.random() < 0.5 else line.pop(name)
    line[rng.choice(NAMES)] = rng.choice([value, "x", {"messages": []}])
    data = dump_lines(lines)
    if rng.random() < 0.2:  # a name that is given twice
        data = data.replace(b"}\n", b', "prompt": "again", "prompt": "and again"}\n', 1)
    return data


def change_line_ends(rng: random.Random, lines: list[Any]) -> bytes:
    data = dump_lines(lines)
    ends = [b"\r\n", b"\r", b"\n\n\n", b"", b"\x0b", b"\x0c", "\u2028".encode(), "\x85".encode()]
    if rng.random() < 0.3:
        text = rng.choice([json.dumps(lines, indent=2), json.dumps(lines), json.dumps(lines[0])])
        return text.encode()
    return data.replace(b"\n", rng.choice(ends), rng.choice([1, 2, -1]))


DAMAGES: list[Callable[[random.Random, list[Any]], bytes]] = [
    *(cut_bytes, flip_bits, insert_bytes, change_kind, insert_surrogate, insert_mark),
    *(insert_nul, nest_deeply, enlarge_number, change_name, change_line_ends),
]

# ---- cases


def make_checkpoint(folder: pathlib.Path) -> pathlib.Path:
    """Write what is read of a checkpoint before its weights."""
    folder.mkdir()
    shutil.copy(ROOT / "tests" / "data" / "m1-tiny" / "config.json", folder)
    return testing.write_tiny_tokenizer(folder, vocab_size=512)


def run_case(number: int, checkpoint: pathlib.Path, folder: pathlib.Path) -> tuple[str, str]:
    """Return what the case ends in, "value", "error" or "FAULT", and the error's text."""
    rng = random.Random(number)
    damage = DAMAGES[number % len(DAMAGES)]
    kind = rng.choice(["batch", "prompts.jsonl", "prompts.ndjson", "prompts.txt"])
    path = folder / ("batch.jsonl" if kind == "batch" else kind)
    data = damage(rng, BATCH_LINES if kind == "batch" else PROMPT_LINES)
    # In a file of plain prompts a line must not be a request as JSON.
    path.write_bytes(data.replace(b'{"', b'say {"') if kind == "prompts.txt" else data)
    try:
        if kind == "batch":
            inputs = batch_input.BatchConfig(str(checkpoint), str(path), str(folder / "out.jsonl"))
            for request in offline.read_inputs(inputs).requests:
                batch_output.encode_record(request.output_fields)
        else:
            prompts = generate.GenerateConfig(
                checkpoint=str(checkpoint), prompts_file=str(path), max_tokens=9
            )
            generate.read_inputs(prompts)
    except ValueError as error:
        return check_error(path, str(error))
    except BaseException:
        return "FAULT", traceback.format_exc()[-1500:]
    return "value", ""


def check_error(path: pathlib.Path, text: str) -> tuple[str, str]:
    """Return "error" for an error as it should be, else "FAULT", and the text."""
    head, *listed = text.split("\n  ")
    if not listed:
        named = [re.sub(r"^got 1 bad lines of \d+; nothing was run: ", "", text)]
    else:  # many bad lines, of which ten are listed
        named = [line for line in listed if not re.fullmatch(r"and \d+ more", line)]
    # Errors about a file as a whole have no line.
    of_file = re.compile(re.escape(str(path)) + r"(:\d+)?: ")
    is_good = all(of_file.match(line) for line in named) and all(
        len(line) <= MAX_CHARS and "\n" not in line for line in (head, *listed)
    )
    return ("error" if is_good else "FAULT"), text


def serve_cases(numbers: list[int], folder: pathlib.Path, connection: Any) -> None:
    """Run cases in a process of their own, and send each one's end."""
    checkpoint = make_checkpoint(folder / "checkpoint")
    for number in numbers:
        connection.send((number, *run_case(number, checkpoint, folder)))


def run_cases(numbers: list[int]) -> dict[int, tuple[str, str]]:
    """Return each case's end. A case that kills its process or does not end is a fault."""
    context, ends = multiprocessing.get_context("spawn"), {}
    while remaining := [number for number in numbers if number not in ends]:
        with tempfile.TemporaryDirectory() as folder:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=serve_cases, args=(remaining, pathlib.Path(folder), sender)
            )
            process.start()
            sender.close()
            try:
                for number in remaining:
                    if not receiver.poll(MAX_SECS):
                        ends[number] = ("FAULT", f"no end within {MAX_SECS} s")
                        break
                    ends[number] = receiver.recv()[1:]
            except EOFError:
                process.join()
                ends[number] = ("FAULT", f"its process ended with status {process.exitcode}")
            process.kill()
            process.join()
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=600)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--show", default="", help="a kind of damage, such as nest_deeply")
    arguments = parser.parse_args()
    ends = run_cases(list(range(arguments.first, arguments.first + arguments.cases)))
    counts = collections.Counter()
    for number, (end, text) in ends.items():
        name = DAMAGES[number % len(DAMAGES)].__name__
        counts[name, end] += 1
        if end == "FAULT" or name == arguments.show:
            print(f"case {number}, {name}: {end}: {text}\n")
    for damage in DAMAGES:
        name = damage.__name__
        print(
            f"{name:18}" + "".join(f"{counts[name, e]:5} {e}" for e in ("value", "error", "FAULT"))
        )
    faults = sum(end == "FAULT" for end, _ in ends.values())
    print(f"{len(ends)} cases, {faults} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
