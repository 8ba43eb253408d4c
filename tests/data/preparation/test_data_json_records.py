import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from mamba_dist.data.preparation import json_records
from mamba_dist.data.preparation.json_records import read_record

DEEP = 985
LINES = [
    b'{"text": "plain"}',
    b'{"text": "a", "text": "b"}',
    b'{"text": "a", "text": 1}',
    b'{"text": 1, "te\\u0078t": "spelled"}',
    b'{"text": "a", "n": NaN}',
    b'{"text": "a", "n": [Infinity, -Infinity]}',
    b'{"text": "a", "n": 1e400}',
    b'{"text": "a", "n": ' + b"9" * 400 + b"}",
    b'{"text": "a", "n": ' + b"9" * 5000 + b"}",
    b'{"text": "a", "n": -0, "m": 1E+5, "k": 1e-5}',
    b'{"text": "a", "n": 01}',
    b'{"text": "a", "n": 1.}',
    b'{"text": "a", "n": .5}',
    b'{"text": "a",}',
    b'{"text": "a"} ',
    b'{"text": "a"}\r',
    b'{"text": "a"}x',
    b'{"text": "a"}\x00',
    b'\xa0{"text": "a"}',
    b'\xc2\xa0{"text": "a"}',
    b'\x0b{"text": "a"}',
    b'{"text": "lone \\ud800"}',
    b'{"text": "a", "other": "lone \\udc00"}',
    b'{"text": "\\ude00\\ud83d"}',
    b'{"text": "\\ud83d\\ude00 \\u0000 \\/ \\u00e9"}',
    b'{"text": "\\x"}',
    b'{"text": "\\u12"}',
    b'{"text": "\x01"}',
    b'{"text": "tab\t"}',
    b'{"text": "\x7f"}',
    b'{"text": "\xff"}',
    b'{"text": "\xed\xa0\x80"}',
    b'{"text": "\xc0\x80"}',
    b'\xef\xbb\xbf{"text": "marked"}',
    b'\xef\xbb\xbf\xef\xbb\xbf{"text": "marked twice"}',
    b"{'text': 'a'}",
    b'{"text": "a", "n": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    b'{"text": "a", "n": ' + b'{"k":' * 250 + b"1" + b"}" * 250 + b"}",
    b'{"text": "' + b"[{" * 300 + b'", "n": [1]}',
    b'{"text": null}',
    b'["text"]',
    b'"text"',
    b"null",
    b"",
]


def outcome(line: bytes, first: bool) -> Any:
    """What a reader of the documents sees; integers may differ in fields that are no text."""
    try:
        record = read_record(line, "text", first=first)
    except (ValueError, RecursionError) as error:
        return type(error), str(error)
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return list(record), record["text"]
    return repr(record)


def by_json(line: bytes, first: bool, monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patched:
        patched.setattr(json_records, "_fast_loads", lambda: None)
        return outcome(line, first)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("line", LINES)
def test_orjson_reads_what_json_reads(
    line: bytes, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("orjson", reason="pip install 'mamba-dist[fast]'")
    assert outcome(line, first) == by_json(line, first, monkeypatch)


def test_orjson_reads_damaged_lines_as_json_does(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("orjson", reason="pip install 'mamba-dist[fast]'")
    rng = random.Random(0)
    inserted = b'{}[]",:\\u0019eE+-.ntf \t\r\xef\xbb\xbf\xed\xa0\x80\xff'
    for _ in range(20_000):
        line = bytearray(rng.choice(LINES[:35])[:80])
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(line) + 1)
            line[at : at + rng.randint(0, 2)] = bytes(rng.choices(inserted, k=rng.randint(0, 2)))
        changed, first = bytes(line), rng.random() < 0.5
        assert outcome(changed, first) == by_json(changed, first, monkeypatch), changed


def refuses(line: bytes) -> Any:
    raise ValueError("no")


@pytest.mark.parametrize(
    ("fast", "line"),
    [
        (refuses, b'{"text": "a"}'),
        (lambda line: {"text": 1.0}, b'{"text": "a"}'),
        (lambda line: [], b'{"text": "a"}'),
        (
            lambda line: {"text": "b", "n": nested(300)},
            b'{"text": "a", "n": "' + b"[" * 300 + b'"}',
        ),
    ],
)
def test_json_decides_wherever_the_fast_reader_might_differ(
    fast: Callable[[bytes], Any], line: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_records, "_fast_loads", lambda: fast)
    assert read_record(line, "text", first=False) == json.loads(line)


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value
