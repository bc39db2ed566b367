"""A corpus has the kind of nearly all rows, and conversations and preferences are divided, written and read again."""

import json
from typing import Any

import pytest

from mlx_gpt.data.corpus import open_corpus
from mlx_gpt.data.prepare import prepare
from mlx_gpt.errors import UserError
from tests.data.chats import BIRDS, FOUR, HELLO, assistant, numbered, user


def both_sides(folder):
    corpus = open_corpus(folder)
    return [row for split in ("train", "val") for row in corpus.rows(split)]


# ---- kinds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 30, 119])
def test_a_few_rows_of_another_kind_are_left_out_and_reported(write, tmp_path, place):
    rows = numbered(120)
    rows[place:place] = [{"text": "A document."}, {"prompt": "Which?", "chosen": "a", "rejected": "b"}]
    path = write(rows)
    report = prepare([path], tmp_path / "out")
    assert (report.kind, report.kept) == ("conversations", 120)
    assert report.dropped == {"documents among conversations": 1, "preferences among conversations": 1}
    assert report.first["documents among conversations"] == f"{path}, line {place + 1}"
    assert len(both_sides(tmp_path / "out")) == 120


@pytest.mark.parametrize("place", [0, 30, 150])
def test_a_conversation_among_documents_is_left_out_wherever_it_is(write, tmp_path, place):
    texts = [f"This is document {i}." for i in range(150)]
    rows: list[dict[str, Any]] = [{"n": i, "body": text} for i, text in enumerate(texts)]
    rows.insert(place, {"messages": HELLO})
    path = write(rows)
    report = prepare([path], tmp_path / "out")
    assert (report.kind, report.kept) == ("documents", 150)
    assert report.dropped == {"conversations among documents": 1}
    assert report.first["conversations among documents"] == f"{path}, line {place + 1}"
    assert sorted(both_sides(tmp_path / "out")) == sorted(texts)


def test_a_readme_beside_many_conversations_is_left_out(write, tmp_path):
    write(numbered(60), "in/a.jsonl")
    (tmp_path / "in" / "README.md").write_text("# About this data")
    report = prepare([tmp_path / "in"], tmp_path / "out")
    assert (report.kind, report.kept) == ("conversations", 60)
    assert report.first["documents among conversations"].startswith(str(tmp_path / "in" / "README.md"))


def test_an_unclear_kind_is_refused_with_an_example_of_each(write, tmp_path):
    texts = write([{"text": f"text {i}"} for i in range(3)], "texts.jsonl")
    chats = write(numbered(5), "chats.jsonl")
    with pytest.raises(UserError) as caught:
        prepare([texts, chats], tmp_path / "out")
    for words in (f"5 rows are conversations (first {chats}, line 1)", f"3 are documents (first {texts}, line 1)"):
        assert words in str(caught.value)
    assert not list((tmp_path / "out").glob("*"))


def test_several_schemas_of_one_kind_are_one_corpus(write, tmp_path):
    rows = [
        {"messages": FOUR},
        {"prompt": "Hi.", "completion": "Hello."},
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"conversations": [{"from": "human", "value": "Bye."}, {"from": "gpt", "value": "Bye, bye."}]},
    ]
    report = prepare([write(rows), write(numbered(40), "b.json")], tmp_path / "out")
    assert (report.kind, report.kept, report.dropped) == ("conversations", 44, {})
    assert [user("Add.\n\n1, 2"), assistant("3")] in both_sides(tmp_path / "out")


def test_a_last_question_without_an_answer_is_cut_off_and_counted(write, tmp_path):
    path = write([*numbered(60), {"messages": FOUR[:4]}])
    report = prepare([path], tmp_path / "out")
    assert FOUR[:3] in both_sides(tmp_path / "out")
    assert (report.dropped, report.dropped_parts) == ({}, {"last questions without an answer": 1})
    assert f"cut off   1 last questions without an answer  first in {path}, line 61" in report.lines()


# ---- corpora --------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_again_and_can_be_read_by_a_person(write, tmp_path):
    duck = [user("Was ist das: 🦆?"), assistant("Eine »Ente«.\nEin Vogel.")]
    report = prepare([write([*numbered(80), {"messages": duck}, {"messages": duck}])], tmp_path / "out")
    assert report.dropped == {"repeated": 1}
    corpus = open_corpus(tmp_path / "out")
    train, val = list(corpus.conversations("train")), list(corpus.conversations("val"))
    expected = [row["messages"] for row in numbered(80)] + [duck]
    assert corpus.kind == "conversations"
    assert sorted(train + val, key=str) == sorted(expected, key=str)
    assert train == [each for each in expected if each in train], "the order of the source is kept"
    written = "".join((tmp_path / "out" / f"{split}.jsonl").read_text() for split in ("train", "val"))
    assert json.dumps({"messages": duck}, ensure_ascii=False) in written.splitlines()
    with pytest.raises(UserError, match="holds conversations, not documents"):
        list(corpus.documents("train"))


def test_the_report_says_conversations_turns_and_characters(write, tmp_path):
    report = prepare([write([*numbered(99), {"messages": FOUR}])], tmp_path / "out")
    [kept] = [line.split() for line in report.lines() if line.startswith("kept")]
    characters = sum(len(m["content"]) for row in [*numbered(99), {"messages": FOUR}] for m in row["messages"])
    assert kept == ["kept", "100", "conversations", "202", "turns", f"{characters:,}", "characters"]
    assert (report.train.turns + report.val.turns, report.train.rows + report.val.rows) == (202, 100)
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (record["kind"], record["turns"], record["train"]["turns"]) == ("conversations", 202, report.train.turns)


def test_preferences_are_written_with_all_their_messages(write, tmp_path):
    rows = [BIRDS, *({"prompt": f"Which, {i}?", "chosen": "a", "rejected": "b"} for i in range(60))]
    report = prepare(
        [write([*rows, {"prompt": "Which bird?", "chosen": "A duck.", "rejected": "A goose."}])], tmp_path / "out"
    )
    assert (report.kind, report.kept, report.dropped) == ("preferences", 61, {"repeated": 1})
    lines = "".join((tmp_path / "out" / f"{split}.jsonl").read_text() for split in ("train", "val")).splitlines()
    assert BIRDS in [json.loads(line) for line in lines]
    assert open_corpus(tmp_path / "out").kind == "preferences"
    assert "61 preferences" in str(report)


def test_a_conversation_keeps_its_side_among_others(write, tmp_path):
    prepare([write(numbered(200))], tmp_path / "a")
    prepare([write(numbered(400, start=100)[::-1], "b.jsonl")], tmp_path / "b")
    val = [list(open_corpus(tmp_path / name).conversations("val")) for name in "ab"]
    common = [row["messages"] for row in numbered(100, start=100)]
    assert [row in val[0] for row in common] == [row in val[1] for row in common]
    assert len(val[1]) == pytest.approx(40, abs=20)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("lengths", [[1, 1], [1, 1, 1, 1, 1], [1, 1, 900], [30, 20, 10, 900, 5, 10, 20]])
def test_few_conversations_stay_whole_and_both_sides_get_some(write, tmp_path, lengths, fraction):
    rows = [[user(f"{i}"), assistant("word " * length)] for i, length in enumerate(lengths)]
    report = prepare([write([{"messages": row} for row in rows])], tmp_path / "out", val_fraction=fraction)
    corpus = open_corpus(tmp_path / "out")
    train, val = list(corpus.conversations("train")), list(corpus.conversations("val"))
    assert train
    assert val
    assert sorted(train + val, key=str) == sorted(rows, key=str)
    assert report.note == "" or "no conversation is cut" in report.note


def test_one_conversation_cannot_be_divided(write, tmp_path):
    with pytest.raises(UserError, match="only one conversation, but training and validation need one each"):
        prepare([write([{"messages": HELLO}] * 3)], tmp_path / "out")


def test_a_file_of_which_nothing_is_left_is_refused(write, tmp_path):
    with pytest.raises(UserError, match=r"Nothing is left .*2 roles out of order, first in .*a\.jsonl, line 1"):
        prepare([write([{"messages": HELLO[::-1]}] * 2)], tmp_path / "out")


@pytest.mark.parametrize("val", ["val.jsonl", "valid.jsonl"])
def test_a_folder_written_by_hand_is_used_as_it_is(write, tmp_path, val):
    write([*numbered(3), {"messages": HELLO[::-1]}, {"prompt": "Hi.", "completion": "Hello."}], "mine/train.jsonl")
    write([{"messages": FOUR[:4]}], f"mine/{val}")
    write(numbered(9), "mine/test.jsonl")
    lines: list[str] = []
    corpus = open_corpus(tmp_path / "mine", cache=tmp_path / "cache")
    train = list(corpus.conversations("train", lines.append))
    assert train == [*(row["messages"] for row in numbered(3)), HELLO]
    assert list(corpus.conversations("val", lines.append)) == [FOUR[:3]]
    assert lines == [
        f"WARNING: left out 1 rows: roles out of order (first in {tmp_path / 'mine' / 'train.jsonl'}, line 4).",
        f"WARNING: left out 1 last questions without an answer (first in {tmp_path / 'mine' / val}, line 1).",
    ]
    assert not (tmp_path / "cache").exists()


def test_edited_rows_are_checked_and_change_the_fingerprint(write, tmp_path):
    prepare([write(numbered(80))], tmp_path / "out")
    before = open_corpus(tmp_path / "out")
    with (tmp_path / "out" / "train.jsonl").open("a") as file:
        file.write(f"{json.dumps({'messages': HELLO})}\n{json.dumps({'messages': HELLO[:1]})}\n")
    after = open_corpus(tmp_path / "out")
    lines: list[str] = []
    assert list(after.conversations("train", lines.append))[-1] == HELLO
    assert "1 rows: no answer" in lines[0]
    assert after.kind == before.kind == "conversations"
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize(
    ("train", "val", "words"),
    [
        (numbered(20), [{"text": "a"}], "val.jsonl holds documents, not conversations"),
        (numbered(3), [{"text": "a"}], "It is not clear whether these are conversations or documents"),
        (numbered(3), [{"messages": HELLO[:1]}], "val.jsonl has no conversation in it"),
    ],
)
def test_a_folder_whose_files_do_not_belong_together_is_refused(write, tmp_path, train, val, words):
    write(train, "mine/train.jsonl")
    write(val, "mine/val.jsonl")
    with pytest.raises(UserError, match=words):
        open_corpus(tmp_path / "mine")


def test_two_files_for_validation_are_refused_and_mlx_lms_is_not_hidden(write, tmp_path):
    for name in ("train", "val", "valid"):
        write(numbered(2), f"mine/{name}.jsonl")
    with pytest.raises(UserError, match=r"both val\.jsonl and valid\.jsonl"):
        open_corpus(tmp_path / "mine")
    (tmp_path / "mine" / "val.jsonl").unlink()
    with pytest.raises(UserError, match=r"valid\.jsonl that was written or edited by hand: move it away"):
        prepare([write(numbered(50))], tmp_path / "mine", overwrite=True)
