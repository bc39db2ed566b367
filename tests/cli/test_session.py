"""Entries in `generate --interactive` have the right effects, and the screen shows the right things."""

import io
import json
import os
import re
import readline
import signal
import subprocess
import sys
from unittest import mock

import pytest

from mlx_gpt import files
from mlx_gpt.cli.session import interact

# ---- beginnings of texts --------------------------------------------------------------------------------------------


@pytest.fixture
def talk(mlx_gpt, models):
    """Type these lines into the dialogue and return what it prints."""

    def talk(*lines, flags=("--seed", "1", "--max-tokens", "4")):
        model = ("--model", models / "one", "--interactive")
        answer = mlx_gpt("generate", *model, *flags, stdin="".join(f"{line}\n" for line in lines))
        assert answer.code == 0, answer.err
        return answer

    return talk


def test_a_dialogue_answers_each_line(talk):
    one, two = (talk(line).out for line in ("The duck", "Geese"))
    assert one != two
    assert talk("The duck", "", "Geese").out == one + two


def test_settings_can_be_changed_during_a_dialogue(talk):
    greedy = talk("The duck", flags=("--temperature", "0", "--max-tokens", "6"))
    changed = talk("/temperature 0", "/max-tokens 6", "The duck")
    assert "temperature is now 0.0." in changed.err
    assert "max_tokens is now 6." in changed.err
    assert changed.out == greedy.out


def test_a_stop_string_may_have_spaces(talk):
    made = talk("The duck").out.removesuffix("\n")
    stop = made[1:4]
    assert talk(f"/stop '{stop}'", "The duck").out == f"{made[: made.index(stop)]}\n"
    assert talk(f"/stop '{stop}'", "/stop", "The duck").out == f"{made}\n"


def test_the_dialogue_explains_itself(talk):
    printed = talk("/help", "/settings", "/temperature 0.5", "/settings").err
    for name in ("temperature", "top_k", "max_tokens", "stop", "Ctrl-D", "Ctrl-C"):
        assert name in printed
    assert re.findall(r"^temperature +([\d.]+)$", printed, re.MULTILINE) == ["0.8", "0.5"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/temperature -1", "`temperature` must be at least 0"),
        ("/temperature hot", "`temperature` must be a number, not 'hot'"),
        ("/temperature", "wants one value"),
        ("/temperature 1 2", "wants one value"),
        ("/temperatur 1", "did you mean /temperature?"),
        ("/stop 'half", "write /stop VALUE"),
        ("/", "There is no command /: /help lists them."),
        ("duck " * 40, "more than the model's context of 32"),
    ],
)
def test_a_mistake_in_the_dialogue_changes_nothing_and_ends_nothing(talk, line, message):
    answer = talk(line, "The duck")
    assert message in answer.err
    assert "Traceback" not in answer.err
    assert answer.out == talk("The duck").out


def test_an_unknown_command_says_that_there_is_none(talk):
    for line in ("/quit", "/exit now"):
        assert "There is no command /" in talk(line).err


def test_bytes_that_are_not_text_do_not_end_the_dialogue(start, models):
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}  # as in most languages, though not in C
    talk = ("generate", "--model", models / "one", "--interactive", "--max-tokens", "2")
    process = start(*talk, stdin=subprocess.PIPE, text=False, env=strict)
    _, err = process.communicate(b"na\xefve\n/temperature 0.5\n", timeout=30)
    assert process.returncode == 0, err
    assert b"Traceback" not in err
    assert b"not valid Unicode" in err
    assert b"temperature is now 0.5." in err


def test_a_dialogue_in_a_terminal(terminal, trained):
    """Ctrl-C stops a text without quitting, the arrow brings a line back, and Ctrl-D quits."""
    endless = ("--temperature", "0", "--repetition-penalty", "1", "--max-tokens", "1000000")
    window = terminal("generate", "--model", trained / "weights/ducks", "--interactive", *endless)
    window.see("Ctrl-D quits")
    window.see("> ")
    # Python loses a Ctrl-C that comes after the prompt and before it waits for a key.
    window.insist("\x03", "Ctrl-D quits")
    window.see("> ")
    window.type("The duck\n")
    window.see("The duck\r\n")
    window.see(" ")  # the answer has begun; before that, Ctrl-C would act on the prompt
    window.type("\x03")
    window.see("(stopped)")
    window.see("> ")
    window.type("/max_tokens 3\n")
    window.see("max_tokens is now 3.")
    window.see("> ")
    window.type("\x1b[A\x1b[A\n")  # twice up
    window.see("The duck")
    window.see("Generation: 3 tokens")
    window.see("> ")
    window.type("\x04")
    assert window.process.wait(timeout=20) == 0


# ---- conversations --------------------------------------------------------------------------------------------------


@pytest.fixture
def converse(mlx_gpt, quacking):
    """Enter these lines in a conversation and return what it prints."""

    def converse(*lines, model=quacking, flags=()):
        flags = ("--model", model, "--interactive", *flags)
        answer = mlx_gpt("generate", *flags, stdin="".join(f"{line}\n" for line in lines))
        assert answer.code == 0, answer.err
        assert "Traceback" not in answer.err
        return answer

    return converse


def test_each_line_is_a_message_and_only_answers_are_on_stdout(converse):
    answer = converse("Hello", "", "Who are you?")
    assert answer.out == "Quack.\nQuack.\n"
    assert answer.err == ""


def test_the_model_sees_what_was_said_before(converse, rambling):
    flags = ("--temperature", "0", "--max-tokens", "8")
    second = converse("Geese", model=rambling, flags=flags).out
    assert not converse("The duck", "Geese", model=rambling, flags=flags).out.endswith(second)
    assert converse("The duck", "/clear", "Geese", model=rambling, flags=flags).out.endswith(second)
    assert converse("/system Swim.", "Geese", model=rambling, flags=flags).out != second
    assert converse("/system Swim.", '/system ""', "Geese", model=rambling, flags=flags).out == second
    assert converse("The duck", "/undo", "Geese", model=rambling, flags=flags).out.endswith(second)


def test_again_gives_another_answer(converse, rambling):
    flags = ("--seed", "1", "--max-tokens", "8", "--stop", "\n")
    made = converse("The duck", "/again", "/again", model=rambling, flags=flags).out
    assert len(set(made.split("\n"))) == 4  # the last one is empty
    assert converse("The duck", "/again", "/again", model=rambling, flags=flags).out == made


def test_commands_say_what_they_did(converse):
    err = converse("Hi", "/system Be brief.", "/system", "/undo", "/new").err
    assert err.count("The system message is: Be brief.") == 2
    assert "(Took back: Hi)" in err
    assert "(A new conversation. The system message stays.)" in err
    assert "There is no system message." in converse("/system").err


@pytest.mark.parametrize(
    ("line", "system"),
    [('"Be brief."', "Be brief."), ('"Yes" or "No"', '"Yes" or "No"'), ('"', '"'), ("'tis", "'tis")],
)
def test_only_quotation_marks_around_a_whole_system_message_are_removed(converse, line, system):
    assert f"The system message is: {system}\n" in converse(f"/system {line}").err


def test_help_names_every_command(converse):
    err = converse("/help").err
    for word in ("/again", "/undo", "/clear", "/new", "/system", "/save", "/settings", "Ctrl-C", "temperature", '"""'):
        assert word in err
    assert "num_samples" not in err


def test_settings_of_a_conversation_have_their_own_defaults_and_flags_win(converse):
    shown = converse("/settings").err
    assert re.search(r"repetition_penalty +1\.0", shown)
    assert re.search(r"max_tokens +1000", shown)
    changed = converse("/top-k 3", "/settings", flags=("--repetition-penalty", "1.1")).err
    assert re.search(r"repetition_penalty +1\.1", changed)
    assert re.search(r"top_k +3", changed)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/undo", "There is nothing to take back."),
        ("/again", "There is no answer yet"),
        ("/save talks.jsonl", "There is nothing to save yet"),
        ("/save", "needs the name of a .jsonl file"),
        ("/save essay.txt", "needs the name of a .jsonl file"),
        ("/save es\0say.jsonl", "needs the name of a .jsonl file"),
        ("/sistem x", "did you mean /system?"),
        ("/num-samples 2", "There is no command /num-samples"),
        ("x" * 200, "has 219 tokens, and the model's context of 128 leaves 96 beside an answer"),
        ("/system " + "x" * 200, "The system message is too long"),
    ],
)
def test_a_mistake_is_one_sentence_and_the_conversation_stays(converse, tmp_path, line, message):
    answer = converse(line, "Hi", "/save ./talk.jsonl")
    assert message in answer.err.splitlines()[0]
    assert answer.out == "Quack.\n"
    assert json.loads((tmp_path / "talk.jsonl").read_text())["messages"][0] == {"role": "user", "content": "Hi"}


def test_several_samples_of_an_answer_are_refused(mlx_gpt, quacking):
    answer = mlx_gpt("generate", "--model", quacking, "--interactive", "--num-samples", "2")
    assert answer.code == 2
    assert "leave --num-samples out" in answer.err


def saved(path):
    """The conversations in a file."""
    return [
        [(message["role"], message["content"]) for message in json.loads(line)["messages"]]
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def test_conversations_are_added_to_a_file_as_rows(converse, tmp_path):
    path = tmp_path / "my talks.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "no end of line"}]}')
    converse("/system Be a duck.", "Läufer 鴨", f"/save {path}", "/new", "More", f"/save {path}")
    duck = ("system", "Be a duck.")
    assert saved(path) == [
        [("user", "no end of line")],
        [duck, ("user", "Läufer 鴨"), ("assistant", "Quack.")],
        [duck, ("user", "More"), ("assistant", "Quack.")],
    ]


def test_a_conversation_that_is_saved_again_replaces_its_row(converse, tmp_path):
    """One that is the beginning of another would be on both sides of a split."""
    path, empty = tmp_path / "talks.jsonl", tmp_path / "one.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Läufer"}]}\n', encoding="utf-8")
    answer = converse(
        "鴨", f"/save {path}", f"/save {empty}", "More", f"/save {path}", f"/save {empty}", f"/save {empty}"
    )
    assert answer.err.count("Replaced this conversation's row") == 3
    whole = [("user", "鴨"), ("assistant", "Quack."), ("user", "More"), ("assistant", "Quack.")]
    assert saved(path) == [[("user", "Läufer")], whole]
    assert saved(empty) == [whole]


def test_a_row_stays_if_it_cannot_be_replaced(tmp_path, monkeypatch):
    path = tmp_path / "talks.jsonl"
    path.write_text("one\ntwo\n")
    for fault in (OSError("full"), KeyboardInterrupt()):
        with monkeypatch.context() as patch:
            patch.setattr(files, "flush", mock.Mock(side_effect=fault))
            with pytest.raises(type(fault)):
                files.append_line(path, "three", instead_of="two")
        assert path.read_text() == "one\ntwo\n"
    assert files.append_line(path, "three", instead_of="two")
    assert not files.append_line(path, "four", instead_of="two")
    assert path.read_text() == "one\nthree\nfour\n"


def test_another_question_in_the_place_of_a_saved_one_is_another_row(converse, tmp_path):
    path = tmp_path / "talks.jsonl"
    converse("One", f"/save {path}", "/undo", "Two", f"/save {path}", "/new", "Two", f"/save {path}")
    assert [row[0] for row in saved(path)] == [("user", "One"), ("user", "Two"), ("user", "Two")]


def test_a_file_that_cannot_be_written_is_one_sentence(converse, tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    answer = converse("Hi", "/save folder.jsonl", "/save none/talk.jsonl", "/save ~nobody-at-all/talk.jsonl", "Hi")
    assert "folder.jsonl is a folder" in answer.err
    assert "There is no file or folder none/talk.jsonl" in answer.err
    assert "There is no file or folder ~nobody-at-all/talk.jsonl" in answer.err
    assert answer.out == "Quack.\n" * 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['"""one', "two", '  three"""'], "one\ntwo\n  three"),
        (['"""', "one", '"""'], "one"),
        (["one\\", "two"], "one\ntwo"),
        (['"""/undo"""'], "/undo"),
        (['what does """ mean?'], 'what does """ mean?'),
        (['"""one', "two"], "one\ntwo"),  # the end of the input
    ],
)
def test_a_message_may_have_several_lines(start, quacking, tmp_path, converse, lines, message):
    path = tmp_path / "talk.jsonl"
    at_end = [] if lines[-1] == "two" and lines[0].startswith('"') else [f"/save {path}"]
    answer = converse(*lines, *at_end)
    assert answer.out == "Quack.\n"
    if at_end:
        assert saved(path)[0][0] == ("user", message)


def test_a_system_message_may_have_several_lines(converse):
    assert "The system message is: Be\nbrief.\n" in converse('/system """Be', 'brief."""').err
    assert "The system message is: Be\nbrief.\n" in converse("/system Be\\", "brief.").err


def test_an_error_of_mlx_is_one_sentence_and_the_conversation_goes_on(capsys):
    said = []

    class Session:
        def say(self, text):
            said.append(text)
            if text == "Hi":
                raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO("Hi\nAgain\n"))
        interact(Session())  # type: ignore[arg-type]
    assert said == ["Hi", "Again"]
    assert "This failed: [METAL] Command buffer execution failed: Insufficient Memory." in capsys.readouterr().err


def test_the_oldest_exchanges_leave_a_full_context_and_it_says_so(converse, tmp_path):
    path = tmp_path / "talk.jsonl"
    answer = converse("/system S", "A", "B", "C", "D", f"/save {path}", "E")
    assert answer.out == "Quack.\n" * 5
    notes = [line for line in answer.err.splitlines() if "context" in line]
    assert notes == [
        "(The context of 128 tokens is full: the model no longer sees the oldest exchange.)",
        "(The context of 128 tokens is full: the model no longer sees the 2 oldest exchanges.)",
    ]
    assert saved(path)[0][:2] == [("system", "S"), ("user", "A")]


def test_it_says_why_an_answer_is_cut(converse, rambling):
    flags = ("--stop", "☃", "--temperature", "0")
    assert "ends here after 3 tokens: /max_tokens allows more" in converse("Hi", flags=("--max-tokens", "3")).err
    assert "because the context of 256 tokens is full" in converse("Hi", model=rambling, flags=flags).err


def test_an_empty_answer_takes_the_message_back(converse, tmp_path):
    path = tmp_path / "talk.jsonl"
    answer = converse("/stop Q", "Hi", "/stop", "Ho", f"/save {path}")
    assert "(The model answered nothing: the message was taken back.)" in answer.err
    assert saved(path) == [[("user", "Ho"), ("assistant", "Quack.")]]


def test_a_template_that_refuses_is_one_sentence(converse, tmp_path, with_template, make_model):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('No system message, please.') }}{% endif %}Q\n"
    folder = with_template(tmp_path / "m", lambda tokenizer: make_model(vocab_size=tokenizer.vocab_size), refusing)
    answer = converse("/system Be brief.", "/system", "Hi", model=folder, flags=("--max-tokens", "2"))
    assert answer.err.startswith("No system message, please.\nThere is no system message.\n")


def test_a_conversation_in_a_terminal(terminal, saying, tmp_path):
    """Ctrl-C stops an answer, whose beginning stays, and Ctrl-D quits."""
    endless = saying(tmp_path / "endless", b"haha", 20_000)
    window = terminal("generate", "--model", endless, "--interactive", "--max-tokens", "20000")
    window.see("Ctrl-D quits")
    window.see("> ")
    window.type("Hi\n")
    window.see("hahaha")
    window.type("\x03")
    window.see("(Stopped. What is above stays in the conversation; /undo takes it back.)")
    window.see("> ")
    window.type('/max-tokens 4\n/again\n"""Ho\n')
    window.see("haha\r\n(The answer ends here after 4 tokens")
    window.see("... ")
    window.type('"""\n')
    window.see("haha\r\n(The answer ends here after 4 tokens")
    window.see("> ")
    window.type("/save talk.jsonl\n")
    window.see("as its last row")
    window.see("> ")
    window.type("\x04")
    assert window.process.wait(timeout=20) == 0
    assert saved(tmp_path / "talk.jsonl") == [
        [("user", "Hi"), ("assistant", "haha"), ("user", "Ho"), ("assistant", "haha")]
    ]


def test_ctrl_c_ends_a_conversation_from_a_pipe(start, saying, tmp_path):
    """A pipe has no person behind it who could quit in another way."""
    endless = saying(tmp_path / "endless", b"haha", 20_000)
    talk = ("generate", "--model", endless, "--interactive", "--max-tokens", "20000")
    process = start(*talk, stdin=subprocess.PIPE)
    process.stdin.write("Hi\nHo\n")
    process.stdin.flush()
    assert process.stdout.read(4) == "haha"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert err.endswith("Interrupted.\n")


@pytest.mark.skipif("GNU" not in (readline.__doc__ or ""), reason="libedit does not know where a paste ends")
def test_pasted_lines_are_one_message(terminal, quacking, tmp_path):
    window = terminal("generate", "--model", quacking, "--interactive")
    window.see("\x1b[?2004h> ")  # asks the terminal to mark what is pasted
    window.type("\x1b[200~/one\rtwo\x1b[201~")
    window.type("\n")
    window.see("Quack.")
    window.see("> ")
    window.type("/save talk.jsonl\n")
    window.see("as its last row")
    assert saved(tmp_path / "talk.jsonl") == [[("user", "/one\ntwo"), ("assistant", "Quack.")]]
