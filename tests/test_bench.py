"""bench.py: scoring a run, and the comparison of the architectures, on tiny runs."""
import glob
import json
import os
import time

import numpy as np
import pytest
import torch

import bench
import train
from bench import continuation_loss, score_choices
from conftest import TINY_DEC, TINY_ENC, call, one_line
from data.choices import load_choices
from data.tokenizer import Tokenizer
from test_model import tiny
from test_tasks import copy_task, write


@pytest.fixture
def run_task(tmp_path, monkeypatch, capsys):
    """A run of a few steps on the copying task."""
    status, _, err = call(train.main, [*TINY_ENC, f"--data={copy_task(tmp_path)}", "--objective=seq2seq", "--max_iters=4", "--out=run"], monkeypatch, capsys)
    assert status == 0, err
    return "run"


def test_quality_writes_answers_and_scores(run_task, monkeypatch, capsys):
    status, out, err = call(bench.main, ["quality", "--run=run", "--json=q.json", "--threads=1"], monkeypatch, capsys)
    assert status == 0 and "rouge_l" in out, err
    rows = [json.loads(line) for line in open("run/predictions.jsonl")]
    assert len(rows) == 20 and set(rows[0]) == {"user_input", "response", "reference", "retrieved_contexts"}  # what ragas reads
    scores = json.load(open("q.json"))["rows"][0]
    logged = [json.loads(line) for line in open("run/log.jsonl")]
    best = max((row for row in logged if "rouge_l" in row), key=lambda row: row["rouge_l"])
    assert scores["val_loss"] > 0 and scores["rows"] == 20 and best["rouge_l"] >= 0


def test_quality_on_text(text_file, monkeypatch, capsys):
    call(train.main, [*TINY_DEC, f"--data={text_file}", "--max_iters=3", "--out=run"], monkeypatch, capsys)
    status, out, err = call(bench.main, ["quality", "--run=run", "--json=q.json", "--threads=1"], monkeypatch, capsys)
    assert status == 0, err
    scores = json.load(open("q.json"))["rows"][0]
    assert scores["perplexity"] == pytest.approx(np.exp(scores["text_loss"]), rel=1e-3) and scores["perplexity"] < 600


def test_quality_bad_input(run_task, monkeypatch, capsys):
    for argv, says in [(["--run=nowhere"], "nowhere"), (["--eval_split=test"], "it has train, val"), (["--data=squad:nowhere"], "no such file"),
                       (["--data=arc_easy"], "is for pretrained runs"), (["--batch_size=0"], "--batch_size")]:
        status, _, err = call(bench.main, ["quality", "--run=run", *argv], monkeypatch, capsys)
        assert status == 2 and says in one_line(err)


ARC = dict(id="1", question="Which?", choices=dict(text=["red", "blue sky"], label=["A", "B"]), answerKey="B")
MMLU = dict(question="Which?", subject="x", choices=["red", "blue sky"], answer=1)


def test_choices_in_both_forms(tmp_path):
    for name, record in (("arc_easy", ARC), ("mmlu", MMLU)):
        path = write(tmp_path / f"{name}.jsonl", json.dumps(record) + "\n")
        assert load_choices(f"{name}:{path}") == [("Which?", ["red", "blue sky"], 1)]
        write(tmp_path / f"{name}.jsonl", json.dumps(record) + "\n\n" + json.dumps(record) + "\n")
        assert len(load_choices(f"{name}:{path}")) == 2


@pytest.mark.parametrize("objective, arch", [("span", "encdec"), ("prefix", "encdec"), ("causal", "dec"), ("span", "dec")])
def test_choices_are_scored_by_their_likelihood(objective, arch):
    """Against one sequence at a time: log-probability of the choice's own tokens, given all before."""
    tok = Tokenizer("bytes")
    model = tiny(arch, vocab_size=tok.vocab_size, pad_id=tok.pad, bos_id=tok.bos, eos_id=tok.eos)
    questions = [("Which one?", ["red", "a blue sky", "x"], 0), ("And?", ["yes", "no"], 1)]
    wins = np.zeros(2)
    for question, choices, answer in questions:
        scores = []
        for choice in choices:
            head, body = tok.encode(f"Question: {question}\nAnswer:"), tok.encode(" " + choice)
            start = 0
            if objective == "span":
                head, body, start = head + [tok.sentinel(0), tok.eos], [tok.sentinel(0)] + body, 1
            if arch == "dec":
                head = head if objective == "causal" else head + [tok.sep]
                body, start, encoded = head + body, len(head) + start, None
            else:
                encoded = model.encode(torch.tensor([head]))
            logp = model.logits(model.decode(torch.tensor([[tok.bos, *body[:-1]]]), encoded)).log_softmax(-1)[0]
            scores.append(sum(logp[t, body[t]].item() for t in range(start, len(body))))
        wins += [np.argmax(scores) == answer, np.argmax([s / len(c) for s, c in zip(scores, choices)]) == answer]

    class World:
        device = torch.device("cpu")
        precision = staticmethod(torch.no_grad)

    class Cfg:
        eval_rows = 0
    got = score_choices(model, tok, objective, questions, Cfg, World)
    assert (got["acc"], got["acc_norm"], got["rows"]) == (50 * wins[0], 50 * wins[1], 2) and got["chance"] == pytest.approx(100 * (1 / 3 + 1 / 2) / 2)


@pytest.mark.parametrize("objective, arch", [("span", "encdec"), ("causal", "dec")])
def test_continuation_is_of_the_text_that_follows(objective, arch):
    """The loss of each window's last tokens, one window at a time."""
    tok = Tokenizer("bytes")
    model = tiny(arch, vocab_size=tok.vocab_size, pad_id=tok.pad, bos_id=tok.bos, eos_id=tok.eos)
    text = np.random.default_rng(0).integers(0, tok.n_text, 60)

    class Tokens:
        windows = staticmethod(lambda starts, n: np.stack([text[s:s + n] for s in starts]))
        __len__ = lambda self: len(text)

    class World:
        device = torch.device("cpu")
        precision = staticmethod(torch.no_grad)

    class Run:
        src_len, tgt_len, eval_rows, batch_size = 14, 6, 3, 2
    Run.objective = objective
    losses = []
    for start in (0, (60 - 17) // 2, 60 - 17):
        before, after = text[start:start + 12].tolist(), text[start + 12:start + 17].tolist()
        encoded = model.encode(torch.tensor([[*before, tok.sentinel(0), tok.eos]])) if objective == "span" else None
        inputs = [tok.bos, tok.sentinel(0), *after] if objective == "span" else [tok.bos, *before, *after]
        logp = model.logits(model.decode(torch.tensor([inputs[:-1]]), encoded)).log_softmax(-1)[0, -5:]
        losses += [-logp[t, id].item() for t, id in enumerate(after)]
    assert continuation_loss(model, tok, Tokens(), Run, World)["continuation_loss"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_compare_skips_what_is_there(tmp_path, monkeypatch, capsys):
    """A sweep runs each pair of architecture and seed once, also when it is begun again, and reports mean and spread."""
    path, calls = copy_task(tmp_path), []
    with open("rows.jsonl", "w") as f:
        f.write('{"cut off": ')

    def fake(cfg, trial, folder, done):
        calls.append((trial["arch"], trial["seed"]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return trial | dict(metric="f1", params_m=1.0, train_s=1.0, tokens_m=1.0, steps=1, rows=3, f1=10.0 * trial["seed"])
    monkeypatch.setattr(bench, "compare_run", fake)
    argv = ["compare", f"--data={path}", "--archs=dec,2/3", "--seeds=2", "--results=rows.jsonl", "--plot=plot.png"]
    assert call(bench.main, argv, monkeypatch, capsys)[0] == 130
    status, out, err = call(bench.main, argv, monkeypatch, capsys)
    assert status == 0 and "15.00 ± 7.07" in out, err
    assert calls == [("dec", 1), ("2/3", 1), ("dec", 2), ("dec", 2), ("2/3", 2)] and os.path.getsize("plot.png")


def test_distilled_rows_stand_beside_the_others(tmp_path, monkeypatch, capsys):
    """compare with a teacher, and the sweep of distill: what was run before is found again, under whichever of them."""
    path, calls = copy_task(tmp_path), []
    with open("rows.jsonl", "w") as f:  # of a time before there were teachers
        f.write(json.dumps(dict(data=path, split="val", preset="nano", arch="2/3", budget="4 min", train="", seed=1, metric="f1", params_m=1.0, train_s=1.0, tokens_m=1.0,
                                steps=1, rows=3, f1=1.0)) + "\n")

    def fake(cfg, trial, folder, done):
        calls.append((trial["preset"], trial["arch"], trial["distill"]))
        return trial | dict(metric="f1", params_m=1.0, train_s=1.0, tokens_m=1.0, steps=1, rows=3, f1=10.0 * len(calls))
    monkeypatch.setattr(bench, "compare_run", fake)
    common = [f"--data={path}", "--archs=2/3", "--seeds=1", "--results=rows.jsonl", "--plot=plot.png", "--teacher=T"]
    status, out, err = call(bench.main, ["compare", *common, "--distill=--alpha=0.5 --kl=reverse --sequences=data"], monkeypatch, capsys)
    assert status == 0 and "1.00 ± 0.00" in out and "distilled" in out and calls == [("nano", "2/3", "--alpha=0.5 --kl=reverse --sequences=data")], err
    status, out, err = call(bench.main, ["distill", *common], monkeypatch, capsys)
    assert status == 0 and "student's answers" in out, err
    assert [(preset, words) for preset, _, words in calls[1:]] == [
        ("nano", "--alpha=0"), ("nano", "--alpha=1 --kl=reverse --sequences=data"), ("nano", "--alpha=0.5 --kl=forward --sequences=data"),
        ("nano", "--alpha=1 --kl=forward --sequences=data"), ("nano", "--alpha=0.5 --kl=reverse --sequences=student"),
        ("nano", "--alpha=0.5 --kl=reverse --sequences=teacher"), ("mini", "--alpha=0.5 --kl=reverse --sequences=data")]
    assert bench.distill_words(["--preset=nano", "--init_from=r", "--objective=seq2seq", "--vocab_size=9", "--seed=1"]) == ["--seed=1", "--student=r"]


@pytest.mark.slow
def test_compare_really_runs(tmp_path, monkeypatch, capsys):
    keys = " ".join(key for key in TINY_ENC if not key.startswith(("--arch", "--device", "--n_enc", "--n_dec", "--n_hidden"))) + " --objective=seq2seq"
    for equal in ("tokens", "flops"):
        argv = ["compare", f"--data={copy_task(tmp_path)}", "--archs=dec,1/3", "--seeds=1", f"--equal={equal}", "--max_iters=20", f"--train={keys}",
                f"--results={equal}.jsonl", "--device=cpu"]
        status, out, err = call(bench.main, argv, monkeypatch, capsys)
        assert status == 0, err
        rows = [json.loads(line) for line in open(f"{equal}.jsonl")]
        assert [row["arch"] for row in rows] == ["dec", "1/3"] and rows[0]["steps"] == 20
        assert abs(rows[1]["params_m"] / rows[0]["params_m"] - 1) < 0.1
    assert rows[1]["steps"] != 20
    with open("flops.jsonl", "w") as f:  # as if of another split: the weights are there
        f.writelines(json.dumps(row | dict(split="test", commit="abc")) + "\n" for row in rows)
    before = {path: os.path.getmtime(path) for path in glob.glob("flops/*/model.safetensors")}
    assert call(bench.main, argv, monkeypatch, capsys)[0] == 0
    again = [json.loads(line) for line in open("flops.jsonl")][2:]
    assert before == {path: os.path.getmtime(path) for path in before} and len(before) == 2
    assert [row["val_loss"] for row in again] == [row["val_loss"] for row in rows] and {row["commit"] for row in again} == {"abc"}


def test_a_file_of_its_own_is_held_out_but_not_the_runs_own_by_another_name(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, "")
    assert bench.another_file("b.jsonl", "a.jsonl") and bench.another_file("squad:b.jsonl", "squad") and not bench.another_file("squad", "squad")
    assert not any(bench.another_file(name, "a.jsonl") for name in ("a.jsonl", "./a.jsonl", str(tmp_path / "a.jsonl"), f"pictures:{tmp_path}/a.jsonl"))


@pytest.mark.parametrize("argv, says", [(["--archs=enc"], "--archs=enc"), (["--preset=huge"], "--preset=huge"), (["--seeds=0"], "--seeds"),
                                        (["--equal=tokens"], "--max_iters"), (["--max_iters=5"], "--max_minutes"), (["--distill=--tau=2"], "--teacher")])
def test_compare_bad_input(argv, says, monkeypatch, capsys):
    status, _, err = call(bench.main, ["compare", *argv], monkeypatch, capsys)
    assert status == 2 and says in one_line(err)


def test_choices_bad_input(tmp_path):
    from lib.settings import UserError
    for record in (dict(MMLU, answer=2), dict(MMLU, choices=[1, 2]), dict(ARC, answerKey="C"), dict(question="x")):
        path = write(tmp_path / "bad.jsonl", json.dumps(record) + "\n")
        with pytest.raises(UserError, match="row 1 is no multiple-choice question"):
            load_choices(f"mmlu:{path}")
    with pytest.raises(UserError, match="no such file"):
        load_choices("arc_easy:nowhere")
    with pytest.raises(UserError, match="could not be reached.*--data=mmlu:FILE"):
        load_choices("mmlu")


def test_speed_of_engines_in_processes_of_their_own(monkeypatch, capsys):
    """Rows of every engine; what is not installed or cannot run says so, and the others go on."""
    argv = ["speed", "--preset=nano", "--archs=dec,2/3", "--engine=torch,onnx-int8", "--src=16", "--new=4", "--examples=2", "--device=cpu", "--json=s.json", "--plot=s.png"]
    status, out, err = call(bench.main, argv, monkeypatch, capsys)
    assert status == 0 and "onnx-int8: 2/3 against decoder-only" in out and os.path.getsize("s.png") > 1000, err
    rows = json.load(open("s.json"))["rows"]
    assert [(row["arch"], row["split"], row["engine"]) for row in rows] == [(a, s, e) for a, s in (("dec", None), ("encdec", "2/3")) for e in ("torch", "onnx-int8")]
    assert all(row["first_ms"] > 0 and row["tok_s"] > 0 and row["cache"] and row["examples"] == 2 and row["bound_tok_s"] > 0 for row in rows)
    assert rows[0]["params_m"] == rows[1]["params_m"]


def test_generation_without_a_cache_is_the_same():
    for arch in ("encdec", "dec"):
        model = tiny(arch)
        model.config.eos_id = -1
        prompts = [[5, 6, 7, 8], [9, 8, 7, 6]]
        assert list(bench.generate_without_cache(model, prompts, 5)) == list(model.generate(prompts, 5))


def test_serving_answers_everyone():
    """Whoever waits goes into the next batch; every client gets its answers one after the other."""
    sizes = []

    def run(prompts, new):
        sizes.append(len(prompts))
        time.sleep(0.01)
    found = bench.serve(run, 3, 8, 2, 50, np.random.default_rng(0), seconds=0.3)
    assert max(sizes) == 3 and found["requests"] == sum(sizes[1:]) and 5 <= found["p50_ms"] <= found["p95_ms"]


def test_flops_are_those_that_torch_counts(monkeypatch, capsys):
    status, out, err = call(bench.main, ["flops", "--preset=mini", "--src=300", "--new=50", "--json=f.json"], monkeypatch, capsys)
    rows = json.load(open("f.json"))["rows"]
    assert status == 0 and len(rows) == 4, err
    for row in rows:
        assert row["gflop"] == pytest.approx(row["gflop_counted"], rel=0.01) and row["gflop_halved"] < row["gflop"]


def test_shape(monkeypatch, capsys):
    """--shape makes another's model: the parameters of a T5 of 20 + 10 layers, but for its normalizations' and positions'."""
    shape = "n_enc=20 n_dec=10 n_embd=1024 n_head=6 n_kv_head=6 head_dim=64 n_hidden=2816 vocab_size=32128"
    status, _, err = call(bench.main, ["flops", "--archs=2/3", "--src=10", "--new=5", f"--shape={shape}", "--json=f.json"], monkeypatch, capsys)
    attention, mlp = 4 * 1024 * 384, 3 * 1024 * 2816
    assert status == 0 and json.load(open("f.json"))["rows"][0]["params_m"] == pytest.approx((32128 * 1024 + 40 * attention + 30 * mlp) / 1e6, rel=1e-3), err


def test_training_of_engines_in_processes_of_their_own(monkeypatch, capsys):
    argv = ["train", "--preset=nano", "--engine=encdec,dec", "--src=16", "--new=8", "--batch=2", "--rows=4", "--dtype=float32", "--compile=false", "--repeats=1", "--device=cpu", "--json=t.json"]
    status, out, err = call(bench.main, argv, monkeypatch, capsys)
    assert status == 0 and "of its time for the same rows (the paper: 0.71)" in out, err
    rows = json.load(open("t.json"))["rows"]
    assert [row["arch"] for row in rows] == ["encdec", "dec"] and all(row["peak_mb"] > 100 and row["rows"] == 4 and 0 < row["mfu"] < 2 for row in rows)


def test_memory(monkeypatch, capsys):
    """Caches by their formula; the measured peak holds at least the weights and one row's caches."""
    status, out, err = call(bench.main, ["memory", "--preset=mini", "--archs=dec,2/3", "--src=3000", "--batch=4", "--device=cpu", "--json=m.json"], monkeypatch, capsys)
    dec, encdec = json.load(open("m.json"))["rows"]
    assert status == 0 and dec["cache_mb"] == round(4 * 2 * 8 * 256 * (3000 + 256) * 4 / 1e6), err
    assert encdec["small_cache_mb"] == round(4 * (2 * 2 * 256 * 256 + 3000 * 256) * 4 / 1e6)
    assert dec["one_row_peak_mb"] > dec["one_row_mb"] and encdec["one_row_peak_mb"] > encdec["one_row_mb"]


def test_costs_bad_input(monkeypatch, capsys):
    for argv, says in [(["speed", "--engine=onnx-int3"], "--engine=onnx-int3"), (["speed", "--new=0"], "--new=0"), (["speed", "--src=1,x"], "--src=1,x"),
                       (["speed", "--archs=3/4"], "--archs=3/4"), (["speed", "--examples=0"], "--examples"), (["speed", "--clients=0"], "--clients"),
                       (["speed", "--plot=x.txt"], "--plot"), (["speed", "--shape=n_layers=3"], "--shape"), (["flops", "--shape=n_enc=2"], "--archs=2/3"), (["flops", "--shape=n_enc=x"], "--shape"), (["flops", "--src=0"], "--src=0"), (["train", "--engine=x"], "--engine=x"),
                       (["speed", "--preset=1b", "--archs=dec", "--engine=torch", "--batch=4096", "--src=4096"], "would fit")]:
        status, _, err = call(bench.main, argv, monkeypatch, capsys)
        assert status == 2 and says in one_line(err), (argv, err)
