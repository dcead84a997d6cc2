"""Training: Muon against torch's, resuming, accumulation, processes, kills, and everything a user can get wrong."""
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import ROOT, TINY_DEC, TINY_ENC, call, one_line
from data.tokenizer import Tokenizer
from model import Config, Transformer
from train import Muon, Settings, lr_share, make_optimizers, orthogonalize, resolve


def weights(folder):
    return load_file(os.path.join(folder, "model.safetensors"))


def equal(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a, b):
    a, b = weights(a), weights(b)
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture
def run_train(monkeypatch, capsys, text_file):
    def run(*argv, base=TINY_ENC):
        return call(train.main, [*base, f"--data={text_file}", *argv], monkeypatch, capsys)
    return run


# --- Muon

def test_muon_equals_torchs(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.float().clone())  # torch's iterates in bfloat16 always
    torch.manual_seed(0)
    shapes = [(8, 8), (8, 24), (24, 8), (24, 8), (8, 24), (16, 4), (1, 5)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = Muon(ours, lr=0.02, momentum=0.9, weight_decay=0.1)
    a.STACK = 400  # two of the four 8 x 24 at once
    b = torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=True, adjust_lr_fn="match_rms_adamw")
    for step in range(10):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step(), b.step()
        for p, q in zip(ours, theirs):
            assert torch.allclose(p, q, atol=1e-5), step


def test_orthogonalize_brings_singular_values_near_one_and_survives_zero():
    G = torch.randn(3, 8, 20)
    G[2] = 0
    values = torch.linalg.svdvals(orthogonalize(G, torch.float32))
    assert ((values[:2] > 0.6) & (values[:2] < 1.3)).all() and (values[2] == 0).all()


def test_every_parameter_goes_to_one_optimizer_and_embeddings_not_to_muon():
    said = []
    model = Transformer(Config(vocab_size=50, n_enc=1, n_dec=1, tied=False, bias=True, qkv_bias=True))
    muon, adamw = make_optimizers(model, resolve(Settings()), torch.float32, said.append)
    ids = [id(p) for o in (muon, adamw) for group in o.param_groups for p in group["params"]]
    assert sorted(ids) == sorted(map(id, model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    in_muon = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert in_muon == {name for name, p in model.named_parameters() if p.ndim == 2 and name not in ("embed.weight", "head.weight")}
    assert len(said) == 2 and "muon" in said[0] and "embed.weight" in said[1]


def test_schedule():
    for schedule, middle in (("linear", 0.5), ("cosine", 0.5)):
        cfg = Settings(schedule=schedule, warmup_iters=10, max_iters=110)
        assert lr_share(0, cfg) == 0.1 and lr_share(9, cfg) == 1.0
        assert abs(lr_share(60, cfg) - middle) < 1e-9 and lr_share(109, cfg) < 0.02
    assert lr_share(50, Settings(schedule="linear", warmup_iters=10)) == 1.0  # the end is not known yet


# --- runs

@pytest.mark.parametrize("base", [TINY_ENC, TINY_DEC])
def test_a_run_learns_and_leaves_a_whole_folder(run_train, base):
    status, _, err = run_train("--max_iters=60", "--out=r", "--lr=0.02", base=base)
    assert status == 0, err
    assert set(os.listdir("r")) == {"model.safetensors", "config.json", "tokenizer.json", "train_state.pt", "log.jsonl", "loss.png",
                                    "run.json", "source"}
    rows = [json.loads(line) for line in open("r/log.jsonl")]
    steps, evals = [r for r in rows if "loss" in r], [r for r in rows if "val_loss" in r]
    assert [r["step"] for r in steps] == list(range(60)) and set(steps[0]) == {"step", "time_s", "tokens", "lr", "loss"}
    assert evals[0]["step"] == 0 and evals[-1]["step"] == 60 and evals[-1]["val_loss"] < evals[0]["val_loss"] - 1
    assert abs(steps[0]["loss"] - np.log(Tokenizer("bytes").vocab_size)) < 0.1
    recorded = json.load(open("r/run.json"))
    assert recorded["settings"]["lr"] == 0.02 and "torch" in recorded["versions"]
    assert open("r/source/model.py").read() == open(os.path.join(ROOT, "model.py")).read()


@pytest.mark.parametrize("base", [TINY_ENC, TINY_DEC])
def test_bfloat16(run_train, base):
    status, _, err = run_train("--max_iters=20", "--lr=0.02", "--out=r", "--dtype=bfloat16", base=base)
    assert status == 0, err
    evals = [row["val_loss"] for row in map(json.loads, open("r/log.jsonl")) if "val_loss" in row]
    assert evals[-1] < evals[0] - 0.5


@pytest.mark.parametrize("base", [TINY_ENC, TINY_DEC])
def test_resuming_equals_not_stopping_bit_for_bit(run_train, monkeypatch, base):
    fixed = ["--max_iters=12", "--eval_interval=4"]
    assert run_train(*fixed, "--out=whole", base=base)[0] == 0
    real = train.save

    def dies(folder, model, optimizers, state):
        real(folder, model, optimizers, state)
        if state["step"] == 8:
            raise SystemExit(9)
    monkeypatch.setattr(train, "save", dies)
    assert run_train(*fixed, "--out=part", base=base)[0] == 9
    monkeypatch.setattr(train, "save", real)
    status, _, err = run_train("--init_from=resume", "--out=part", base=[])
    assert status == 0, err
    assert equal("whole", "part")


def test_interrupt_saves_and_resume_gives_the_same_weights(run_train, monkeypatch, text_file):
    assert run_train("--max_iters=14", "--out=whole", "--grad_accum=2")[0] == 0
    real, calls = train.loss_of, []

    def interrupts(model, batch):
        calls.append(1)
        if len(calls) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(model, batch)
    monkeypatch.setattr(train, "loss_of", interrupts)
    status, _, err = run_train("--max_iters=14", "--out=part", "--grad_accum=2")
    assert status == 128 + signal.SIGTERM and "--init_from=resume --out=part" in err and "step 5 is saved" in err
    with open("part/log.jsonl", "a") as f:
        f.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    monkeypatch.setattr(sys, "argv", ["train.py"])
    status, _, err = run_train("--init_from=resume", "--out=part", base=[])
    assert status == 0, err
    assert equal("whole", "part")
    rows = [json.loads(line) for line in open("part/log.jsonl")]
    assert [r["step"] for r in rows if "loss" in r] == list(range(14))
    keys = [{k: v for k, v in r.items() if k != "time_s"} for r in rows if "loss" in r]
    assert keys == [{k: v for k, v in json.loads(line).items() if k != "time_s"} for line in open("whole/log.jsonl") if '"loss"' in line]


def test_max_minutes_fixes_the_number_of_steps(run_train):
    status, _, err = run_train("--max_minutes=0.05", "--out=r")
    assert status == 0 and (fits := re.search(r"(\d+) steps fit", err)), err
    assert torch.load("r/train_state.pt", weights_only=True)["max_iters"] == int(fits[1])
    assert json.loads(open("r/log.jsonl").read().splitlines()[-1])["step"] == int(fits[1])


def test_accumulation_equals_a_larger_batch(run_train):
    fixed = ["--max_iters=8", "--eval_interval=100"]
    assert run_train(*fixed, "--out=a", "--batch_size=8")[0] == 0
    assert run_train(*fixed, "--out=b", "--batch_size=4", "--grad_accum=2")[0] == 0
    assert run_train(*fixed, "--out=c", "--batch_size=1", "--grad_accum=8")[0] == 0
    assert distance("a", "b") < 1e-5 and distance("a", "c") < 1e-5
    assert run_train(*fixed, "--out=d", "--batch_size=8", "--seed=1")[0] == 0
    assert distance("a", "d") > 1e-3  # the measure is not blind


def process(*argv, out=subprocess.DEVNULL, before=None, launcher=()):
    command = [sys.executable, *launcher, os.path.join(ROOT, "train.py"), *argv]
    return subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True, preexec_fn=before)


@pytest.mark.parametrize("objective", [pytest.param("span", marks=pytest.mark.slow), "seq2seq"])
def test_two_processes_equal_accumulation(objective, run_train, text_file):
    if objective == "seq2seq":
        with open("rows.jsonl", "w") as f:
            f.writelines(json.dumps(dict(source="s" * (1 + i % 9), target="t" * (1 + i % 5))) + "\n" for i in range(90))
    data = "rows.jsonl" if objective == "seq2seq" else text_file
    fixed = [*TINY_ENC, f"--data={data}", f"--objective={objective}", "--max_iters=8", "--eval_interval=4", "--threads=1"]
    assert run_train(*fixed[len(TINY_ENC):], "--out=one", "--grad_accum=2")[0] == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    two = process(*fixed, "--out=two", launcher=launcher)
    _, err = two.communicate(timeout=120)
    assert two.returncode == 0, err[-2000:]
    assert distance("one", "two") < 1e-5
    last = [json.loads(open(f"{name}/log.jsonl").read().splitlines()[-1]) for name in ("one", "two")]
    assert abs(last[0]["val_loss"] - last[1]["val_loss"]) < 1e-4 and last[0]["tokens"] == last[1]["tokens"]


def kill_and_resume(kills, text_file, rng, iters=40):
    """A run that is killed `kills` times at random moments and resumed, against one that is not. -> what differs"""
    fixed = [*TINY_ENC, f"--data={text_file}", f"--max_iters={iters}", "--eval_interval=1", "--eval_rows=4"]
    whole = process(*fixed, "--out=whole")
    assert whole.wait(timeout=300) == 0, whole.stderr.read()
    done = 0
    while done < kills:
        begun = os.path.exists("killed/train_state.pt")
        run = process(*(["--init_from=resume", "--out=killed"] if begun else [*fixed, "--out=killed"]))
        start = os.path.getmtime("killed/train_state.pt") if begun else 0
        while run.poll() is None and (not os.path.exists("killed/train_state.pt") or os.path.getmtime("killed/train_state.pt") == start):
            time.sleep(0.002)  # until it has saved once, so that every try makes progress
        time.sleep(rng.random() * 0.25)  # a step and its checkpoint take about that long
        run.send_signal(signal.SIGKILL)
        finished = run.wait() == 0
        done += not finished
        if finished:  # killed often enough to reach the end: begin again
            assert equal("whole", "killed")
            subprocess.run(["rm", "-r", "killed"])
    if not os.path.exists("killed/train_state.pt"):
        return
    last = process("--init_from=resume", "--out=killed")
    assert last.wait(timeout=300) == 0, last.stderr.read()
    assert equal("whole", "killed")
    assert not [name for name in os.listdir("killed") if name.endswith(".new")]


def test_killed_runs_resume_exactly(text_file):
    kill_and_resume(1, text_file, random.Random(0))


@pytest.mark.slow
def test_killed_runs_resume_exactly_twenty_times(text_file):
    kill_and_resume(20, text_file, random.Random(1), iters=40)


@pytest.mark.parametrize("moment", ["before_state", "before_weights"])
def test_a_kill_between_the_two_renames(run_train, monkeypatch, moment):
    assert run_train("--max_iters=10", "--eval_interval=5", "--out=whole")[0] == 0
    real, count = os.replace, [0]

    def dies(a, b):
        if b.endswith("train_state.pt" if moment == "before_state" else "model.safetensors"):
            count[0] += 1
            if count[0] == 2:  # the checkpoint of step 5
                raise SystemExit(137)
        real(a, b)
    monkeypatch.setattr(os, "replace", dies)
    assert run_train("--max_iters=10", "--eval_interval=5", "--out=cut")[0] == 137
    monkeypatch.setattr(os, "replace", real)
    status, _, err = run_train("--init_from=resume", "--out=cut", base=[])
    assert status == 0, err
    assert equal("whole", "cut")


def test_a_full_disk_keeps_the_last_checkpoint(run_train):
    assert run_train("--max_iters=5", "--eval_interval=4", "--out=full")[0] == 0
    size = os.path.getsize("full/train_state.pt")
    kept = {name: open(f"full/{name}", "rb").read() for name in ("model.safetensors", "train_state.pt")}

    def limit():  # no file may grow beyond three quarters of a checkpoint: writing fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (size * 3 // 4, size * 3 // 4))
    run = process("--init_from=resume", "--out=full", "--max_iters=12", before=limit)
    _, err = run.communicate()
    assert run.returncode == 2 and "free some space" in one_line(err)
    assert all(open(f"full/{name}", "rb").read() == content for name, content in kept.items())
    assert not [name for name in os.listdir("full") if name.endswith(".new")]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(run_train):
    status, _, err = run_train("--max_iters=40", "--eval_interval=4", "--lr=1e30", "--embed_lr=1e30", "--out=r", "--warmup_iters=1")
    assert status == 2 and re.search(r"is (nan|inf) at step \d+; the checkpoint of step \d+ in r is kept", one_line(err))
    Transformer.load("r")


def test_starting_from_the_weights_of_a_run(run_train):
    assert run_train("--max_iters=30", "--out=a", "--lr=0.02")[0] == 0
    small = ["--batch_size=4", "--eval_rows=8", "--warmup_iters=2", "--compile=false", "--device=cpu", "--max_iters=2", "--init_from=a"]
    status, _, err = run_train("--out=b", "--objective=prefix", base=small)
    assert status == 0, err
    assert json.load(open("b/run.json"))["settings"]["src_len"] == 32  # the parent's
    os.rename("a", "moved")
    status, _, err = run_train("--init_from=resume", "--out=b", "--max_iters=4", base=[])
    assert status == 0, err
    os.rename("moved", "a")
    for argv, says in ((["--arch=dec"], "is an encoder-decoder"), (["--n_embd=64"], "n_embd"), (["--tokenizer=bpe", "--vocab_size=600"], "")):
        status, _, err = run_train(*argv, "--out=c", base=small)
        assert (status == 2 and says in one_line(err)) if says else status == 0


def test_new_runs_never_touch_old_ones(run_train):
    assert run_train("--max_iters=1")[0] == 0
    before = {name: open(f"out/encdec-nano-words/{name}", "rb").read() for name in ("model.safetensors", "run.json")}
    assert run_train("--max_iters=1")[0] == 0
    assert sorted(os.listdir("out")) == ["encdec-nano-words", "encdec-nano-words-2"]
    status, _, err = run_train("--max_iters=1", "--out=out/encdec-nano-words")
    assert status == 2 and "not empty" in one_line(err)
    assert before == {name: open(f"out/encdec-nano-words/{name}", "rb").read() for name in before}
    assert run_train("--max_iters=1", "--out=out/x[1]")[0] == 0
    status, _, err = run_train("--max_iters=1", "--out=out/x[1]")
    assert status == 2 and "not empty" in one_line(err)


@pytest.mark.parametrize("argv, says", [
    (["--batch_size=0"], "--batch_size=0 must be positive"),
    (["--batch_size=two"], "--batch_size"),
    (["--n_heads=4"], "did you mean --n_head?"),
    (["--arch=decoder"], "--arch"),
    (["--n_head=3", "--n_kv_head=2"], "n_head=3 is not a multiple of n_kv_head=2"),
    (["--device=cuda"], "--device=cuda cannot be used"),
    (["--device=gpu"], "--device=gpu cannot be used"),
    (["--src_len=100000", "--tgt_len=50000"], "give more text"),
    (["--data=nowhere.txt"], "no such file"),
    (["--init_from=nowhere"], "nowhere"),
    (["--init_from=resume"], "--out"),
    (["--tokenizer=nowhere"], "nowhere"),
    (["--objective=causal"], "causal"),
    (["--lr=-1"], "--lr"),
    (["--max_iters=0"], "--max_iters=0"),
    (["--head_dim=7"], "head_dim"),
    (["--max_iters"], "--max_iters"),
    (["--lr=nan"], "--lr"),
    (["--seed=-1"], "--seed"),
    (["--noise=1.5"], "--noise"),
    (["--mean_span=0"], "--mean_span"),
    (["--n_embd=0"], "--n_embd"),
    (["--device=meta"], "--device=meta"),
    (["--out=/proc/nowhere"], "/proc/nowhere"),
    (["stray"], "stray"),
])
def test_bad_input_is_one_line_and_harms_nothing(run_train, argv, says):
    if argv[0] == "--device=cuda" and torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    status, _, err = run_train("--max_iters=1", *argv)
    assert status == 2 and says in one_line(err), err[-2000:]
    assert not os.path.exists("out")


def test_bad_run_folders(run_train, text_file):
    assert run_train("--max_iters=2", "--out=r")[0] == 0
    state = open("r/train_state.pt", "rb").read()

    def resume(*argv):
        status, _, err = run_train("--init_from=resume", "--out=r", *argv, base=[])
        assert status == 2
        return one_line(err)
    assert "--lr=0.5 differs" in resume("--lr=0.5")
    open("r/train_state.pt", "wb").write(state[:-500])
    assert "truncated" in resume()
    open("r/train_state.pt", "wb").write(state)
    good = open("r/model.safetensors", "rb").read()
    open("r/model.safetensors", "wb").write(good[:-1] + bytes([good[-1] ^ 1]))
    assert "altered" in resume()
    open("r/model.safetensors", "wb").write(good)
    os.remove("r/train_state.pt")
    assert "no checkpoint" in resume()
    with open(text_file, "a") as f:
        f.write("more text")
    open("r/train_state.pt", "wb").write(state)
    assert "data has changed" in resume()
