"""Conversations and preferences of every schema get the same form, and faulty rows are reported with their places."""

import json
import random
import tracemalloc
from collections import Counter
from typing import Any

import pytest

from mlx_gpt.data.documents import read_kind, read_rows
from mlx_gpt.data.rows import Dropped
from mlx_gpt.data.schemas import read_row, schema_of
from mlx_gpt.errors import UserError
from tests.data.chats import BIRDS, FOUR, HELLO, assistant, numbered, system, user

CALL = {"function": {"name": "weather", "arguments": "{}"}}


def rows_of(path, **options):
    return [row for row, _ in read_rows(path, **options)]


# ---- schemas ---------------------------------------------------------------------------------------------------------

SCHEMAS: list[tuple[dict[str, Any], Any]] = [
    ({"messages": FOUR}, FOUR),
    ({"id": "x", "Messages": HELLO, "source": "web"}, HELLO),
    ({"messages": [system(""), *HELLO], "tools": None}, HELLO),
    ({"prompt": "Hi.", "completion": "Hello."}, HELLO),
    ({"Prompt": "Hi.", "Response": "Hello."}, HELLO),
    ({"prompt": FOUR[:4], "completion": FOUR[4:]}, FOUR),
    ({"system": "Be brief.", "prompt": FOUR[1:4], "completion": "Bye, bye."}, FOUR),
    ({"instruction": "Hi.", "input": "", "output": "Hello."}, HELLO),
    ({"instruction": "Add.", "input": "1, 2", "output": "3"}, [user("Add.\n\n1, 2"), assistant("3")]),
    ({"instruction": "Add.", "context": "1, 2", "response": "3"}, [user("Add.\n\n1, 2"), assistant("3")]),
    ({"instruction": "Hi.", "input": [], "output": "Hello."}, HELLO),
    ({"prompt": "Add.", "context": "1, 2", "completion": "3"}, [user("Add.\n\n1, 2"), assistant("3")]),
    ({"instruction": "Add.", "input": " ", "context": "1, 2", "output": "3"}, [user("Add.\n\n1, 2"), assistant("3")]),
    ({"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]}, HELLO),
    (
        {
            "conversation": [
                {"from": "system", "value": "Be brief."},
                {"from": "User", "value": "Hi."},
                {"from": "chatgpt", "value": "Hello."},
                {"from": "human", "value": "Bye."},
                {"from": "assistant", "value": "Bye, bye."},
            ]
        },
        FOUR,
    ),
    ({"conversations": HELLO}, HELLO),
    ({"prompt": "Which bird?", "chosen": "A duck.", "rejected": "A goose."}, BIRDS),
    ({**BIRDS, "score": 0.5}, BIRDS),
    ({"chosen": BIRDS["prompt"] + BIRDS["chosen"], "rejected": BIRDS["prompt"] + BIRDS["rejected"]}, BIRDS),
    (
        {
            "prompt": "Which bird?",
            "chosen": [system("Be brief."), *BIRDS["prompt"], *BIRDS["chosen"]],
            "rejected": [system("Be brief."), *BIRDS["prompt"], *BIRDS["rejected"]],
        },
        {**BIRDS, "prompt": [system("Be brief."), *BIRDS["prompt"]]},
    ),
    (
        {"system": "Be brief.", "prompt": "Which bird?", "chosen": "A duck.", "rejected": "A goose."},
        {**BIRDS, "prompt": [system("Be brief."), *BIRDS["prompt"]]},
    ),
]


@pytest.mark.parametrize(("row", "expected"), SCHEMAS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_each_schema_is_read(write, row, expected, name):
    assert rows_of(write([row, row], name)) == [expected] * 2


@pytest.mark.parametrize(
    ("row", "expected"),
    [(row, expected) for row, expected in SCHEMAS if all(isinstance(value, str) for value in row.values())],
)
def test_pairs_of_columns_are_read_from_csv(write, row, expected):
    assert rows_of(write([{"id": "1", **row}] * 2, "a.csv")) == [expected] * 2


def test_parts_of_a_text_are_joined_and_line_endings_become_those_of_unix(write):
    parts = [{"type": "text", "text": "Hi,\r\n"}, {"type": "text", "text": "you."}]
    path = write([{"messages": [user(parts), assistant("a\r\nb\rc")]}])
    assert rows_of(path) == [[user("Hi,\nyou."), assistant("a\nb\nc")]]


def test_a_column_of_conversations_may_be_read_as_documents(write):
    path = write([{"prompt": "Hi.", "completion": "Hello."}])
    assert rows_of(path, column="completion") == ["Hello."]


def test_a_text_beside_a_conversation_is_a_document(write):
    path = write([{"text": "one", "prompt": "Hi.", "completion": "Hello."}, {"text": None, "messages": HELLO}])
    assert rows_of(path) == ["one", HELLO]


# ---- faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [user("Hi."), user("Hi?"), assistant("Hello.")]}, "roles out of order"),
        ({"messages": [assistant("Hello."), user("Hi.")]}, "roles out of order"),
        ({"messages": [*HELLO, system("Be brief.")]}, "roles out of order"),
        ({"messages": [user("Hi."), assistant(" \n")]}, "an empty answer"),
        ({"messages": [user(""), assistant("Hello.")]}, "an empty question"),
        ({"messages": [system("Be brief."), user("Hi.")]}, "no answer"),
        ({"messages": [system(" ")]}, "`messages` is empty"),
        ({"messages": []}, "`messages` is empty"),
        ({"messages": "Hi."}, "`messages` is not a list of messages"),
        ({"messages": ["Hi.", "Hello."]}, "`messages` is not a list of messages"),
        ({"mesages": HELLO}, "no `messages`"),
        ({"messages": None}, "no `messages`"),
        ({"prompt": "Hi."}, "no `messages`"),
        ({"messages": [user("Hi."), {"content": "Hello."}]}, "a message without a role"),
        ({"messages": [user("Hi."), {"role": "narrator", "content": "Hello."}]}, "an unknown role"),
        ({"messages": [user("Hi."), {"role": "assistant"}]}, "a message without content"),
        ({"messages": [user("Hi."), assistant(5)]}, "a message whose content is not a text"),
        ({"messages": [user("Hi."), assistant("\ud800")]}, "not valid Unicode"),
        ({"messages": [user("Hi."), {**assistant(None), "tool_calls": [CALL]}]}, "a call of a tool"),
        ({"messages": [*HELLO, {"role": "tool", "content": "7"}]}, "a call of a tool"),
        ({"messages": [user("Hi."), {**assistant("Hello."), "weight": 0}]}, "a message with the weight 0"),
        ({"messages": [user([{"type": "image_url", "image_url": "x"}]), *HELLO[1:]]}, "another part that is not text"),
        ({"messages": HELLO, "tools": [CALL]}, "`tools`, which"),
        ({"messages": HELLO, "system": 5}, "`system` is not a text"),
        ({"prompt": "Hi.", "completion": ""}, "an empty answer"),
        ({"prompt": "Hi.", "completion": 5}, "`completion` is neither a text nor a list of messages"),
        ({"instruction": "Add.", "input": ["1"], "output": "3"}, "`input` is not a text"),
        ({"instruction": "Add.", "input": "1", "context": "2", "output": "3"}, "a text in both `input` and `context`"),
        ({"instruction": "Add.", "output": "3", "history": [["a", "b"]]}, "`history`, which"),
        ({"prompt": "Hi.", "chosen": "a", "rejected": "a"}, "`chosen` and `rejected` are alike"),
        ({"prompt": "Hi.", "chosen": "a", "rejected": " "}, "an empty answer"),
        ({"chosen": "a", "rejected": "b"}, "no `prompt`"),
        ({"prompt": HELLO, "chosen": "a", "rejected": "b"}, "roles out of order"),
        ({"prompt": "Hi.", "chosen": FOUR[1:], "rejected": FOUR[1:4]}, "no answer"),
        ({"prompt": "Hi!", "chosen": HELLO, "rejected": [*HELLO[:1], assistant("b")]}, "have different prompts"),
        ({"chosen": HELLO, "rejected": [user("Hi!"), assistant("Hello.")]}, "have different prompts"),
        ({"chosen": FOUR, "rejected": [*FOUR[:3], user("No."), assistant("b")]}, "does not end with the user"),
        ([1], "not an object"),
    ],
)
def test_a_fault_is_dropped_with_its_place_and_the_rest_is_read(write, row, reason):
    path = write([*numbered(3), row, {"messages": HELLO}])
    [*before, (fault, place), after] = read_rows(path)
    assert len(before) == 3
    assert isinstance(fault, Dropped)
    assert reason in fault.reason
    assert place == f"{path}, line 4"
    assert after[0] == HELLO


def test_a_row_with_anything_in_it_is_sound_or_dropped():
    draw = random.Random(1)
    junk = [None, "", " ", 5, [], {}, ["x"], "\ud800", *HELLO, [*HELLO], FOUR[:4], user([]), {"role": [], "value": "x"}]

    def spoilt(value: Any) -> Any:
        """Return a value, part of which is replaced by something else."""
        if draw.random() < 0.2 or not isinstance(value, dict | list) or not value:
            return draw.choice(junk)
        if isinstance(value, dict):
            name = draw.choice(list(value))
            return {**value, draw.choice([name, name, name, "x", "text", "prompt"]): spoilt(value[name])}
        place = draw.randrange(len(value))
        return [*value[:place], *draw.choice([[], [spoilt(value[place])]]), *value[place + 1 :]]

    kinds = Counter[str]()
    for row, _ in SCHEMAS * 200:
        found = read_row(spoilt(row), schema_of(row) or ("messages",))
        kinds[type(found).__name__] += 1
        if isinstance(found, str | Dropped):
            continue
        whole = (
            [found] if isinstance(found, list) else [found["prompt"] + found[name] for name in ("chosen", "rejected")]
        )
        for messages in whole:
            turns = messages[messages[0]["role"] == "system" :]
            assert [message["role"] for message in turns] == [("user", "assistant")[i % 2] for i in range(len(turns))]
            assert all(message["content"].strip() for message in turns[: len(turns) // 2 * 2])
            assert len(turns) > 1
        assert isinstance(found, list) or all(found.values())
        assert json.dumps(found, ensure_ascii=False).encode()
    assert min(kinds[name] for name in ("list", "dict", "Dropped")) > 50, kinds


def test_rows_of_a_table_that_do_not_fit_are_dropped(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"Hi, you",Hello\nBye,\na,b,c\nlone\nOne,two\n')
    found = [(row.reason, place) for row, place in read_rows(path) if isinstance(row, Dropped)]
    reasons = ["an empty answer", "more fields than the header", "too few fields"]
    assert found == [(reason, f"{path}, row {number}") for number, reason in enumerate(reasons, 2)]
    path.write_text("prompt,completion,Completion\na,b,c\n")
    with pytest.raises(UserError, match="2 columns called 'completion': rename"):
        list(read_rows(path))


def test_many_conversations_are_read_in_little_memory(tmp_path):
    path = tmp_path / "a.json"
    rows = [{"messages": [user(f"{i} " + "x" * 2000), assistant("y")]} for i in range(1_500)]
    path.write_text(json.dumps(rows))
    del rows
    tracemalloc.start()
    assert sum(1 for _ in read_kind(path, "conversations")) == 1_500
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000 < path.stat().st_size / 3


def test_images_in_parquet_are_not_read_to_see_that_they_are_there(tmp_path):
    """It only matters which rows have an image, so even damaged images do no harm."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, kind = tmp_path / "a.parquet", pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    images = [[{"bytes": b"PNG" * 1000, "path": None}], [], None]
    pq.write_table(pa.table({"messages": [HELLO, FOUR, HELLO], "images": pa.array(images, kind)}), path)
    group = pq.read_metadata(path).row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    [damaged] = [column for column in columns if column.path_in_schema.endswith("bytes")]
    with path.open("r+b") as file:
        file.seek(min(damaged.dictionary_page_offset or damaged.data_page_offset, damaged.data_page_offset))
        file.write(bytes(damaged.total_compressed_size))
    assert rows_of(path) == [Dropped("a column `images`, which is not supported"), FOUR, HELLO]


@pytest.mark.parametrize("column", ["image", "images", "video", "videos", "audio", "audios"])
def test_a_row_with_something_that_is_not_text_is_dropped(tmp_path, column):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"messages": HELLO, column: value}) + "\n" for value in ("a.bin", None)))
    assert rows_of(path) == [Dropped(f"a column `{column}`, which is not supported"), HELLO]
