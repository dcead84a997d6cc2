"""Training: Muon against torch, resuming, accumulation, processes, kills, bad input."""

import json
import os
import pathlib
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_DEC, TINY_ENC, call, log_rows, one_line
from safetensors import safe_open
from safetensors.torch import load_file
from tqdm import tqdm

import lib.runs
import train
from lib.device import World, start
from lib.settings import Lines, UserError, progress, read_json, read_settings, setting
from model import Config, Transformer
from train import Muon, Settings, lr_share, make_optimizers

ENC, DEC = ([*base, "--eval_interval=100"] for base in (TINY_ENC, TINY_DEC))


def weights(folder):
    return load_file(os.path.join(folder, "model.safetensors"))


def distance(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture
def run_train(monkeypatch, capsys, text_file):
    def run(*argv, base=ENC):
        return call(train.main, [*base, f"--data={text_file}", *argv], monkeypatch, capsys)

    return run


# --- Muon and the schedule


def test_muon_equals_torchs(monkeypatch):
    # torch's iterates in bfloat16 always
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.float().clone())
    torch.manual_seed(0)
    shapes = [(8, 8), (8, 24), (24, 8), (24, 8), (8, 24), (16, 4), (1, 5)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = Muon(ours, lr=0.02, momentum=0.9, weight_decay=0.1)
    a.STACK = 400  # two of the four 8 x 24 at once
    more = dict(nesterov=True, adjust_lr_fn="match_rms_adamw")
    b = torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.1, **more)
    for step in range(10):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p) * (step > 0)  # at first there is nothing to normalise
            q.grad = p.grad.clone()
        a.step(), b.step()
        for p, q in zip(ours, theirs):
            assert torch.allclose(p, q, atol=1e-5), step


def test_every_parameter_goes_to_one_optimizer_and_embeddings_not_to_muon(capsys):
    model = Transformer(Config(vocab_size=50, n_enc=1, n_dec=1, tied=False, bias="all"))
    cfg = Settings(lr=0.1, embed_lr=0.2, device="cpu", dtype="bfloat16")
    muon, adamw = make_optimizers(model, cfg, world := start(cfg))
    with world.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16 == muon.dtype
    routed = [id(p) for o in (muon, adamw) for group in o.param_groups for p in group["params"]]
    assert sorted(routed) == sorted(map(id, model.parameters()))
    in_muon = {id(p) for p in muon.param_groups[0]["params"]}
    outside = ("embed.weight", "head.weight")
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and name not in outside]
    assert in_muon == set(map(id, hidden)) and "embed.weight" in capsys.readouterr().err


def test_schedule():
    for schedule in ("linear", "cosine"):
        cfg = Settings(schedule=schedule, warmup_iters=10, max_iters=110)
        assert lr_share(0, cfg) == 0.1 and lr_share(9, cfg) == 1.0
        assert abs(lr_share(60, cfg) - 0.5) < 1e-9 and lr_share(109, cfg) < 0.02
    cfg = Settings(schedule="linear", warmup_iters=10)  # no end known yet
    assert [lr_share(step, cfg) for step in (0, 4, 50)] == [0.1, 0.5, 1.0]
    # Warm-up takes a tenth of the steps at most.
    assert lr_share(2, Settings(schedule="linear", warmup_iters=50, max_iters=20)) == 1.0


# --- runs


@pytest.mark.parametrize(
    "base, more",
    [(ENC, ["--dtype=float32"]), (DEC, ["--dtype=bfloat16"])]
    + [(ENC, ["--objective=prefix", "--dtype=bfloat16"]), (DEC, ["--objective=ul2"])],
)
def test_a_run_learns_and_leaves_a_whole_folder(run_train, base, more):
    status, _, err = run_train("--max_iters=25", "--out=r", "--lr=0.02", *more, base=base)
    assert status == 0, err
    whole = "model.safetensors config.json tokenizer.json train_state.pt log.jsonl loss.png"
    assert set(os.listdir("r")) == {*whole.split(), "run.json", "source", "samples.json", ".lock"}
    steps, evals = log_rows("r"), log_rows("r", "val_loss")
    assert [row["step"] for row in steps] == list(range(25))
    assert set(steps[0]) == {"step", "time_s", "tokens", "lr", "loss"}
    assert evals[0]["step"] == 0 and evals[-1]["step"] == 25
    assert evals[-1]["val_loss"] < evals[0]["val_loss"] - 0.5
    assert abs(steps[0]["loss"] - np.log(517)) < 0.3
    assert evals[-1]["bits_per_byte"] > 0.99 * evals[-1]["val_loss"] / np.log(2)  # ends have none
    assert read_json("r/run.json")["settings"]["lr"] == 0.02 and os.path.exists("r/source/model.py")
    samples, model = read_json("r/samples.json"), Transformer.load("r").eval()
    src = None if samples["src"] is None else torch.tensor(samples["src"])
    mask = torch.tensor(samples["loss_mask"])
    loss = model(src, torch.tensor(samples["tgt"]), mask) / mask.sum()
    assert abs(loss.item() - evals[-1]["val_loss"]) < 1


def test_resuming_and_interrupting_equal_not_stopping_bit_for_bit(run_train, monkeypatch):
    fixed = ["--max_iters=9", "--eval_interval=4", "--grad_accum=2", "--dropout=0.2"]
    assert run_train(*fixed, "--out=whole")[0] == 0
    real, calls = train.count_tokens, []

    def interrupts(*args):
        calls.append(1)
        if len(calls) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(train, "count_tokens", interrupts)
    status, _, err = run_train(*fixed, "--out=part")
    assert status == 128 + signal.SIGTERM and "--init_from=resume --out=part" in err
    assert "step 5 is saved" in err
    with open("part/log.jsonl", "ab") as file:
        file.write(b'{"step": 5, "loss": 1.0}\n[1]\n\xff\xfe\n{"step": "x"}\n\x00{"step": 6, "lo')
    status, _, err = run_train("--init_from=resume", "--out=part", base=[])
    assert status == 0 and distance("whole", "part") == 0, err
    assert log_rows("part") == log_rows("whole")


def test_the_best_weights_are_kept_through_a_resume(run_train, monkeypatch):
    pathlib.Path("rows.jsonl").write_text('{"source": "s", "target": "t"}\n' * 60)
    scores = iter([(1, 2.0), (5, 3.0), (5, 2.0), (4, 1.0), (5, 2.5), (4, 1.0)])

    def evaluate(*about):
        score, loss = next(scores)
        return dict(rouge_l=score, val_loss=loss)

    monkeypatch.setattr(train, "evaluate", evaluate)
    fixed = ["--data=rows.jsonl", "--objective=seq2seq", "--max_iters=3", "--eval_interval=1"]
    assert run_train(*fixed, "--out=r")[0] == 0
    again = fixed[0], "--init_from=resume", "--out=r", "--max_iters=5"
    assert run_train(*again, base=[])[0] == 0 and next(scores, None) is None
    with safe_open("r/best.safetensors", "pt") as best:
        assert best.metadata()["step"] == "2"
        assert torch.equal(Transformer.load("r").embed.weight, best.get_tensor("embed.weight"))
    assert not torch.equal(weights("r")["embed.weight"], Transformer.load("r").embed.weight)
    times = [json.loads(line)["time_s"] for line in open("r/log.jsonl")]
    assert times == sorted(times)


@pytest.mark.parametrize("key", ["dropout", "word_dropout", "label_smoothing"])
def test_what_is_for_training_alone_changes_training_alone(run_train, key):
    for out, more in (("with", [f"--{key}=0.5"]), ("without", [])):
        assert run_train("--max_iters=2", f"--out={out}", *more)[0] == 0
    first, second = (log_rows(out)[1]["loss"] for out in ("with", "without"))
    assert first != second  # at step 0, blocks add nothing
    first, second = (log_rows(out, "val_loss")[0]["val_loss"] for out in ("with", "without"))
    assert first == second


def test_rates_follow_the_schedule_and_gradients_are_clipped(run_train, monkeypatch):
    step, used = Muon.step, []

    def spy(muon):
        [group] = muon.param_groups
        norms = [p.grad.norm() for p in group["params"]]
        used.append((group["lr"], sum(norm**2 for norm in norms) ** 0.5, group["weight_decay"]))
        step(muon)

    monkeypatch.setattr(Muon, "step", spy)
    monkeypatch.setattr(Transformer, "logits", lambda m, x, f=Transformer.logits: 30 * f(m, x))
    assert run_train("--max_iters=4", "--weight_decay=0.3", "--lr=1e-3", "--out=r")[0] == 0
    rates, norms, decays = zip(*used)
    assert rates == pytest.approx([row["lr"] for row in log_rows("r")], rel=1e-4)
    assert rates[0] == 1e-3 > 2 * rates[-1] and max(norms) < 1.001 and set(decays) == {0.3}


def test_max_minutes_fixes_the_number_of_steps(run_train, monkeypatch):
    monkeypatch.setattr(train, "TIMED", (2, 8))
    status, _, err = run_train("--max_minutes=0.005", "--out=r")
    assert status == 0 and (fits := re.search(r"(\d+) steps fit", err)), err
    assert torch.load("r/train_state.pt", weights_only=True)["max_iters"] == int(fits[1])
    assert log_rows("r", "val_loss")[-1]["step"] == int(fits[1])
    seconds = [9, 9, 0.5, 0.5, 8, 9]  # neither the first ones nor the slowest count
    assert train.steps_that_fit(seconds, 6, 20, Settings(max_minutes=1)) == 6 + 80


def process(*argv, **env):
    command = [sys.executable, os.path.join(ROOT, "train.py"), *argv]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=os.environ | env, **pipes)


def test_accumulation_and_two_processes_equal_a_larger_batch(run_train):
    rows = [dict(source="s" * (1 + i % 9), target="t" * (1 + i % 5)) for i in range(90)]
    pathlib.Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fixed = ["--data=rows.jsonl", "--objective=seq2seq", "--max_iters=4", "--threads=1"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    about = dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    ranks = [process(*ENC, *fixed, "--out=processes", **about, RANK=rank) for rank in "01"]
    for out, more in (
        ("large", ["--batch_size=8"]),
        ("passes", ["--batch_size=2", "--grad_accum=4"]),
        ("other", ["--batch_size=8", "--seed=1"]),
    ):
        assert run_train(*fixed, *more, f"--out={out}")[0] == 0
    for rank in ranks:
        _, err = rank.communicate(timeout=120)
        assert rank.returncode == 0, err[-2000:]
    assert distance("large", "passes") < 1e-5 and distance("large", "processes") < 1e-5
    assert distance("large", "other") > 1e-3  # the measure is not blind
    last = [log_rows(name, "val_loss")[-1] for name in ("large", "processes")]
    assert abs(last[0]["val_loss"] - last[1]["val_loss"]) < 1e-4
    assert last[0]["tokens"] == last[1]["tokens"]


def test_a_kill_between_the_two_files_of_a_checkpoint(run_train, monkeypatch):
    """The model is of step 2, the state of step 1: all goes on from step 1."""
    fixed, saves, save = ["--max_iters=4", "--eval_interval=1"], [], torch.save
    assert run_train(*fixed, "--out=whole")[0] == 0

    def dies(*args):
        saves.append(args)
        return sys.exit(9) if len(saves) == 3 else save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", dies)
        assert run_train(*fixed, "--out=part")[0] == 9
    assert run_train("--init_from=resume", "--out=part", base=[])[0] == 0
    assert distance("whole", "part") == 0 and log_rows("part") == log_rows("whole")


@pytest.mark.slow
def test_killed_runs_resume_exactly(run_train, text_file):
    """A run that is killed at random moments and resumed, against one that is not."""
    fixed = [*TINY_ENC, f"--data={text_file}", "--max_iters=99", "--eval_interval=1"]
    assert run_train(*fixed, "--threads=1", "--out=whole", base=[])[0] == 0
    path, rng, statuses = pathlib.Path("killed/train_state.pt"), random.Random(0), []
    for kill in range(20):
        argv, saved = (["--init_from=resume"], path.stat().st_mtime_ns) if kill else (fixed, 0)
        run = process(*argv, "--threads=1", "--out=killed")
        while run.poll() is None and (not path.exists() or path.stat().st_mtime_ns == saved):
            time.sleep(0.002)  # until it has saved once, so that every try makes progress
        time.sleep(rng.random() * 0.25)  # a step and its checkpoint take about that long
        run.kill()
        statuses.append(run.wait())
    assert -signal.SIGKILL in statuses
    status, _, err = run_train("--init_from=resume", "--out=killed", base=[])
    assert status == 0 and distance("whole", "killed") == 0, err
    assert not [name for name in os.listdir("killed") if name.startswith(".new-")]


def test_a_full_disk_keeps_the_last_checkpoint(run_train):
    assert run_train("--max_iters=5", "--out=full")[0] == 0
    path = pathlib.Path("full/train_state.pt")
    kept, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) * 3 // 4, hard))
    try:  # writing fails as on a full disk
        status, _, err = run_train("--init_from=resume", "--out=full", "--max_iters=8", base=[])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2 and "free some space" in one_line(err) and path.read_bytes() == kept
    Transformer.load("full")  # whole, too
    assert not [name for name in os.listdir("full") if name.startswith(".new-")]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(run_train):
    rates = ["--lr=100", "--embed_lr=100", "--weight_decay=100", "--warmup_iters=1"]
    status, _, err = run_train("--max_iters=40", *rates, "--out=r")
    assert status == 2 and re.search(r"the loss is \S+ .* is kept", one_line(err))
    Transformer.load("r")


def test_float16_learns_and_leaves_out_steps_that_overflow(run_train, monkeypatch):
    said, usable = [], World.usable
    monkeypatch.setattr(World, "usable", lambda *about: said.append(usable(*about)) or said[-1])
    for out, dtype in (("full", "float32"), ("half", "float16")):
        assert run_train("--max_iters=6", f"--dtype={dtype}", f"--out={out}")[0] == 0
    full, half = ([row["loss"] for row in log_rows(name)] for name in ("full", "half"))
    assert all(said) and half == pytest.approx(full, rel=5e-3)
    monkeypatch.setattr(World, "scale", 2.0**24)
    assert run_train("--max_iters=25", "--dtype=float16", "--lr=0.02", "--out=late")[0] == 0
    late = [row["loss"] for row in log_rows("late")]
    assert not said[12] and said[-1] and late[-1] < late[0] - 0.5


def test_starting_from_the_weights_of_a_run(run_train):
    assert run_train("--max_iters=2", "--out=a")[0] == 0
    small = ["--batch_size=4", "--eval_rows=8", "--compile=false", "--device=cpu", "--init_from=a"]
    small += ["--src_len=24", "--tgt_len=16", "--max_iters=2", "--objective=prefix"]
    assert run_train("--out=b", base=small)[0] == 0
    # What was trained once stays trained, and what text runs have stays.
    kept = dict(src_len=32, embed_skip=True, cross_next=True).items()
    assert vars(Transformer.load("b").config).items() >= kept
    for word in ("--arch=dec", "--preset=nano", "--n_enc=2", "--tokenizer=bpe"):
        status, _, err = run_train(word, "--out=c", base=small)
        assert status == 2 and "--init_from" in one_line(err)
    os.rename("a", "moved")
    for word in ("--max_iters=1", "--max_iters=3", "--threads=1"):  # fewer, more, none said
        assert run_train("--init_from=resume", "--out=b", word, base=[])[0] == 0
    assert torch.load("b/train_state.pt", weights_only=True)["max_iters"] == 3


def test_new_runs_never_touch_old_ones(run_train):
    assert run_train("--max_iters=1")[0] == run_train("--max_iters=1")[0] == 0
    assert sorted(os.listdir("out")) == ["encdec-tiny-words.txt", "encdec-tiny-words.txt-2"]
    os.rename("out/encdec-tiny-words.txt", "out/x[1]")
    status, _, err = run_train("--max_iters=1", "--out=out/x[1]")
    assert status == 2 and "not empty" in one_line(err)


NAMES_ITSELF = "--device=meta --seed=-1 --threads=5000 --eval_rows=100000000000 --init_from=nowhere"
NAMES_ITSELF += " --tokenizer=nowhere --objective=causal --out=/proc/nowhere stray"


@pytest.mark.parametrize(
    "argv, says",
    [("--batch_size=0", "--batch_size=0 must be a number from 1"), ("--seeds=4", "mean --seed?")]
    + [("--src_len=100000 --tgt_len=50000", "give more text"), ("--n_enc=0", "--arch=dec")]
    + [("--init_from=resume", "--out"), ("--data=nowhere.txt", "no such file")]
    + [(word, word.split("=")[-1]) for word in NAMES_ITSELF.split()],
)
def test_bad_input_is_one_line_and_harms_nothing(run_train, argv, says):
    status, _, err = run_train("--max_iters=1", *argv.split())
    assert status == 2 and says in one_line(err) and not os.path.exists("out"), err[-2000:]


def test_bad_run_folders(run_train, text_file):
    assert run_train("--max_iters=2", "--out=r")[0] == 0

    def refused(*argv):
        status, _, err = run_train("--init_from=resume", "--out=r", *argv, base=[])
        assert status == 2
        return one_line(err)

    assert "--lr=0.5 differs" in refused("--lr=0.5")
    lock = lib.runs.lock_folder("r")
    assert "in use by another process" in refused()
    lock.close()
    state = pathlib.Path("r/train_state.pt")
    state.write_bytes(state.read_bytes()[:-500])
    assert "truncated" in refused()
    state.unlink()
    assert "missing" in refused()
    pathlib.Path(text_file).write_text("other words " * 3000)
    assert "data has changed" in refused()


@dataclass
class Keys:
    n: int = setting(None, "how many", high=9)
    wide: bool = setting(False, "a switch")
    name: str = setting("x", "a name", ("x", "y=z"))


def test_keys_of_the_command_line(capsys):
    assert read_settings(Keys, "", ["--n", "3", "--wide", "--name=y=z"]) == Keys(3, True, "y=z")
    assert read_settings(Keys, "", ["--wide", "false", "--n=0"]) == Keys(0)
    for word in ("--n", "--n=x", "--n=1.5", "--n=10", "--n=nan", "--wide=2", "--name=z", "--nn=1"):
        with pytest.raises(UserError, match=word.split("=")[0]):
            read_settings(Keys, "", [word])
    with pytest.raises(SystemExit):
        read_settings(Keys, "what it is", ["--help"])
    assert "--n=INTEGER" in capsys.readouterr().out


def test_progress_in_a_file_is_lines(capsys):
    assert list(progress(range(3), "short")) == [0, 1, 2]
    assert capsys.readouterr().err == ""  # the first line comes after ten seconds
    list(tqdm(range(3), "long", mininterval=0, file=Lines()))
    said = capsys.readouterr().err
    assert "\r" not in said and len(said.splitlines()) >= 3 and "long: 100%" in said
