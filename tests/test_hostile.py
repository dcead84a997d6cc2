"""Folders of strangers, absurd wishes: one line, status 2, and no file of the user is touched."""

import json
import os

import pytest
from conftest import TINY_ENC, call, one_line

import export
import sample
import train

RESUME = (train.main, "--init_from=resume", "--out=bpe", "--max_iters=2")
ASK = (sample.main, "--run=bpe", "--prompt=x", "--max_new_tokens=2")
WRONG = [  # file of a run, what it says, who reads it, what is said of it
    ("run.json", dict(batch_size=10**12), RESUME, "batch_size should be"),
    ("run.json", dict(objective="\x1b"), ASK, "has no prompts"),
]


def test_what_strangers_and_users_may_say(tmp_path, text_file, monkeypatch, capsys):
    def said(main, *words, status=2):
        found, out, err = call(main, words, monkeypatch, capsys)
        assert found == status, err
        return one_line(err) if status else out

    # A run folder may be called bpe, which is a tokenizer's name, too.
    said(train.main, *TINY_ENC, f"--data={text_file}", "--max_iters=1", "--out=bpe", status=0)
    for name, changes, words, says in WRONG:
        path = tmp_path / "bpe" / name
        about = json.loads(good := path.read_text())
        about.get("settings", about).update(changes)
        path.write_text(json.dumps(about))
        assert says in said(*words), changes
        path.write_text(good)
    assert "8192" in said(*ASK, "--prompt=" + "x" * 9000, "--show_attention=a.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "open_run", lambda *_: bytearray(2**62))
        assert "not enough memory" in said(*ASK)

    # Numbers that no plot can hold; a link that looks like a file left unfinished.
    os.mkdir("mine")
    (tmp_path / "mine/thesis").touch()
    (tmp_path / "mine/export.json").touch()
    os.symlink(os.path.abspath("mine"), "bpe/.new-x")
    os.remove("bpe/loss.png")
    with open("bpe/log.jsonl", "a") as file:
        file.write('{"step": 0, "loss": 1' + "0" * 4000 + '}\n{"step": -1' + "0" * 4000 + "}\n")
    said(*RESUME, status=0)
    os.symlink("mine", "link")
    for out in ("mine", "link", "bpe"):
        assert "holds something else" in said(export.main, "--run=bpe", f"--out={out}")
    assert "cannot be written" in said(export.main, "--run=bpe", "--json=nowhere/a.json")
    assert sorted(os.listdir("mine")) == ["export.json", "thesis"]
