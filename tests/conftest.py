"""Shared by all tests: a tiny corpus, and a way to call a script as a user would."""

import json
import os
import random
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "assets")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a network

import torch  # noqa: E402

import data.corpus  # noqa: E402
import lib.runs  # noqa: E402
import lib.settings  # noqa: E402

torch.set_num_threads(1)  # models this small gain nothing from more

TINY = ["--preset=tiny", "--tokenizer=bytes", "--src_len=32", "--tgt_len=16", "--batch_size=4"]
TINY += ["--eval_rows=8", "--warmup_iters=2", "--compile=false", "--dtype=float32", "--device=cpu"]
TINY_ENC = TINY + ["--arch=encdec", "--n_enc=1", "--n_dec=1"]
TINY_DEC = TINY + ["--arch=dec", "--n_dec=2"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Token files go to the test's own folder, runs to its own out/."""
    monkeypatch.setattr(data.corpus, "CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NANOENCDEC_CACHE", str(tmp_path / "cache"))  # for processes of a test
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def few_plots(monkeypatch):
    """loss.png once a folder: drawing takes longer than the training of these runs."""
    draw = lib.runs.Log.plot

    def plot(log, metric=None):
        if not os.path.exists(os.path.join(log.folder, "loss.png")):
            draw(log, metric)

    monkeypatch.setattr(lib.runs.Log, "plot", plot)


@pytest.fixture
def text_file(tmp_path):
    """A text with something to learn: words of a small made-up language."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(60)]
    path = tmp_path / "words.txt"
    path.write_text(" ".join(rng.choices(words, k=6000)), encoding="utf-8")
    return str(path)


def call(main, argv, monkeypatch, capsys):
    """Runs a script's main with these words -> (exit status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["script.py", *argv])
    capsys.readouterr()
    status = 0
    try:
        lib.settings.script(main)
    except SystemExit as stop:
        status = stop.code or 0
    out, err = capsys.readouterr()
    return status, out, err


def log_rows(folder, key="loss"):
    """The lines of a run's log that have this key, without their times."""
    with open(f"{folder}/log.jsonl", encoding="utf-8") as file:
        return [row | dict(time_s=0) for row in map(json.loads, file) if key in row]


def one_line(err):
    """The error message, asserted to be the only thing said in the form of an error."""
    lines = [line for line in err.strip().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]
