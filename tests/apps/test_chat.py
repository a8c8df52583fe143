"""The terminal chat answers line by line, obeys its commands, and leaves cleanly."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time

import pytest

from trivium.apps.chat import Session, chat, load_voice
from trivium.config import UserError
from trivium.data.chat import render_prompt
from trivium.models.generate import generate


def talk(workspace, text, model="sft@latest", **options):
    chat(workspace, model, lines=io.StringIO(text), max_tokens=options.pop("max_tokens", 8), **options)


def test_each_line_gets_an_answer_that_depends_on_what_was_said(model_workspace, capsys):
    talk(
        model_workspace,
        "Where does Anna live?\nWhere does Anna live?\n/reset\nWhere does Anna live?\n",
        temperature=0.0,
    )
    first, second, notice, third = capsys.readouterr().out.splitlines()
    assert notice == "(a new conversation)"
    assert first == third != second
    voice = load_voice(model_workspace, "sft@latest")
    prompt = render_prompt(voice.tokenizer, [{"role": "user", "content": "Where does Anna live?"}])
    made = generate(voice.model, [prompt], max_new_tokens=8, temperature=0.0, stop_ids=voice.stop_ids)[0]
    assert first == voice.tokenizer.decode([i for i in made.token_ids if i not in voice.stop_ids])


def test_the_same_seed_gives_the_same_talk(model_workspace, capsys):
    talks = []
    for seed in (1, 1, 2):
        talk(model_workspace, "Hello\nAgain\n", temperature=1.0, seed=seed)
        talks.append(capsys.readouterr().out)
    assert talks[0] == talks[1] != talks[2]


def test_models_can_be_changed_and_mistakes_are_one_sentence(model_workspace, capsys):
    talk(model_workspace, "/model ppo\n/model\n/model nothing\n/help\n/quit\nnever asked\n")
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "(now talking to ppo@latest)"
    assert out[1].startswith("(talking to ppo@latest; there are: ") and "sft" in out[1]
    assert "no run 'nothing'" in out[2] and out[3].startswith("/reset starts over") and len(out) == 4
    with pytest.raises(UserError, match="no finished run of 'dpo'"):
        talk(model_workspace, "x\n", model="dpo@latest")
    with pytest.raises(UserError, match="reward model"):
        talk(model_workspace, "x\n", model="reward_model@latest")


def test_a_base_model_goes_on_writing(model_workspace):
    voice = load_voice(model_workspace, "pretrain@latest")
    assert voice.base
    ids = voice.prompt([{"role": "user", "content": "Anna lives"}])
    assert ids == [voice.tokenizer.bos_id, *voice.tokenizer.encode("Anna lives")]


def test_a_full_context_is_said_and_not_a_crash(model_workspace, capsys):
    talk(model_workspace, "word " * 300 + "\n\nShort?\n")
    out = capsys.readouterr().out.splitlines()
    assert "fills the model's 128 tokens" in out[0] and len(out) >= 2, "the next line is answered again"


def test_what_a_terminal_would_obey_is_not_printed(model_workspace, capsys, monkeypatch):
    session = Session(model_workspace, load_voice(model_workspace, "sft@latest"), 0.0, 1.0, 8, "", 0)
    ids = session.voice.tokenizer.encode("red \x1b[31m\x07 end")
    monkeypatch.setattr("trivium.apps.chat.stream", lambda *_, **__: iter([(i, 0.0) for i in ids]))
    session.answer("x")
    assert capsys.readouterr().out == "red \ufffd[31m\ufffd end\n"


def test_ctrl_c_between_answers_leaves_without_a_traceback(model_workspace):
    call = f"chat(Path({str(model_workspace)!r}), 'sft@latest', max_tokens=4)"
    code = f"from pathlib import Path; from trivium.apps.chat import chat; {call}"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        process.stdin.write("Hello\n")
        process.stdin.flush()
        assert process.stdout.readline()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0 and "Traceback" not in errors
    finally:
        process.kill()
