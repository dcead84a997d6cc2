"""bench.py: every command end to end on tiny models, the bootstrap against its formula, the rule of
compare, and a sweep that is cut off."""

import json
import math
import os
import sys

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_DEC, TINY_ENC, call, one_line
from torch.utils.flop_counter import FlopCounterMode

import bench
import train
from data.tasks import TASKS
from lib.settings import UserError
from model import Transformer

RNG = np.random.default_rng(0)
COST = ["--preset=tiny", "--repeats=1", "--device=cpu", "--dtype=float32"]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run(words ...) -> (status, what it said, rows of --json) of bench.py, in this process.
    run.calls: the commands that it gave to train.py. data/: rows to train on."""

    def trained(words):
        run.calls.append(words)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words)
            train.main()

    def run(word, *words):
        status, out, err = call(bench.main, [word, "--json=x.json", *words], monkeypatch, capsys)
        return status, one_line(err) if status else out, status or json.load(open("x.json"))["rows"]

    run.calls, run.trained = [], trained
    monkeypatch.setattr(bench, "call", trained)
    monkeypatch.setattr(bench, "apart", lambda function, *args: function(*args))
    (tmp_path / "data").mkdir()
    for split, n in (("train", 60), ("val", 12), ("test", 9)):
        rows = [dict(source=x, target=x[::-1]) for x in map(str, RNG.integers(10**6, size=n))]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return run


# ----------------------------------------------------------------------------------------------
# Costs


def test_speed(run):
    engines = "--engine=torch,onnx-int8,nocache,t5"
    status, out, rows = run("speed", *COST, engines, "--src=8,16", "--new=3", "--plot=s.png")
    assert status == 0 and "tok_s/dec" in out and os.path.getsize("s.png") > 1000, out
    assert len(rows) == 2 * (3 * 2 + 1)  # lengths; engines with and without a decoder-only model
    assert all(row["first_ms"] > 0 and row["tok_s"] > 0 for row in rows)
    dec, _, encdec, _ = rows[:4]
    assert encdec["tok_s/dec"] == pytest.approx(encdec["tok_s"] / dec["tok_s"], abs=1e-3)


@pytest.mark.parametrize("arch", ["dec", "1/2"])
def test_generation_without_a_cache_says_the_same(arch):
    model, prompts = Transformer(bench.config_of("tiny", arch, 16, 8)), [[5, 6, 7], [9, 8, 7]]
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.config.eos_id = -1
    assert list(bench.generate_without_cache(model, prompts, 5)) == list(model.generate(prompts, 5))


@pytest.mark.parametrize("arch", bench.ARCHS)
def test_flops_are_those_that_torch_counts(arch):
    """Of a pass whose logits are those of the answer."""
    config = bench.config_of("mini", arch, 300, 50)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model, source = Transformer(config), torch.zeros(1, 300, dtype=torch.long)
        encoded = model.encode(source) if config.n_enc else None
        inputs = source[:, :50] if config.n_enc else torch.zeros(1, 350, dtype=torch.long)
        model.logits(model.decode(inputs, encoded)[:, -50:])
    assert bench.flops(config, 300, 50) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_flops_and_memory(run):
    assert 0 < run("flops", *COST, "--archs=2/3,dec")[2][0]["gflop/dec"] < 1
    # 3 layers of 128 keys and values, 1 beside an encoder.
    status, out, (dec, encdec) = run("memory", *COST, "--src=300", "--new=100", "--batch=40")
    assert status == 0 and dec["cache_mb"] == round(40 * 2 * 3 * 128 * 400 * 4 / 1e6), out
    assert encdec["small_cache_mb"] == round(40 * (2 * 128 * 100 + 300 * 128) * 4 / 1e6)


def test_train_and_vision(run):
    status, out, rows = run("train", *COST, "--src=8", "--new=4", "--batch=2", "--grad_accum=2")
    engines = [("dec", "torch"), ("2/3", "torch"), ("2/3", "t5")]
    assert status == 0 and [(row["split"], row["engine"]) for row in rows] == engines, out
    assert all(row["tok_s"] > 0 and row["rows"] == 4 for row in rows)
    status, out, (every, some) = run("vision", *COST, "--tower=tiny", "--grid=2", "--archs=2/3")
    assert status == 0 and some["n_tokens"] < every["n_tokens"] and some["first_ms"] > 0, out


def test_a_process_of_its_own():
    assert bench.apart(os.getpid) != os.getpid()
    for function, says in ((math.sqrt, "ValueError"), (os._exit, "was killed")):
        with pytest.raises(UserError, match=says):
            bench.apart(function, -1)


# ----------------------------------------------------------------------------------------------
# Quality


def test_quality_writes_answers_and_no_file_of_others(run):
    more = ["--data=data", "--objective=seq2seq", "--max_iters=2", "--out=run"]
    run.trained(["train.py", *TINY_ENC, *more])
    os.symlink("../data/val.jsonl", "run/predictions.jsonl")
    status, out, [row] = run("quality", "--run=run", "--eval_split=test")
    assert status == 0 and len(bench.read_results("data/val.jsonl")) == 12, out
    answers = bench.read_results("run/predictions.jsonl")
    assert len(answers) == row["rows"] == 9 and row["metric"] == "rouge_l" and row["exact"] >= 0
    assert {"user_input", "response"} < {*answers[0]} and "row_scores" not in row


@pytest.mark.parametrize("objective", ["span", "causal"])
def test_quality_of_text(run, text_file, objective):
    """Perplexity, and the loss of going on, against one window at a time."""
    more = [f"--data={text_file}", f"--objective={objective}", "--max_iters=2", "--out=run"]
    run.trained(["train.py", *(TINY_ENC if objective == "span" else TINY_DEC), *more])
    status, out, [row] = run("quality", "--run=run", "--eval_rows=3", "--dtype=float32")
    assert status == 0 and math.log(row["perplexity"]) == pytest.approx(row["val_loss"], abs=0.01)
    corpus, losses = bench.prepare(text_file, "run", log=str), []
    tok, text, model = corpus.tokenizer, corpus.splits["val"], Transformer.load("run").eval()
    for start in np.linspace(0, len(text) - 45, 3).astype(int):
        source, target = None, text.windows(np.array([start]), 45)[0].tolist()
        ids = target[30:]
        if objective == "span":
            source = torch.tensor([[*target[:30], tok.sentinel(0), tok.eos]])
            target = [tok.sentinel(0), *ids]
        logp = model.logits(model.states(source, torch.tensor([target]))).log_softmax(-1)[0, -15:]
        losses += [-logp[t, id].item() for t, id in enumerate(ids)]
    assert row["continuation_loss"] == pytest.approx(np.mean(losses), abs=1e-3)


# ----------------------------------------------------------------------------------------------
# The rule


@pytest.mark.parametrize("task", ["translate", "codexglue", "docstring"])
def test_row_scores_add_up_to_the_score(task):
    words = "int get ( ) { return x ; } a red car drives .".split()
    rows = [dict(source="", target=" ".join(RNG.choice(words, 12))) for _ in range(30)]
    texts = [row["target"].replace("red", "blue").replace("return", "") for row in rows]
    metric, wanted = next(iter(TASKS[task].score(texts, rows).items()))
    made = [bench.row_score(TASKS[task], row, text, metric) for row, text in zip(rows, texts)]
    assert bench.score_of(np.array([made]).sum(1), 30)[0] == pytest.approx(wanted, abs=1e-2)


def test_the_bootstrap_agrees_with_the_normal_case():
    """The difference has an effect of the seed and one of the row: its variance is that of seeds
    over their number plus that of rows over theirs. Few seeds know their variance badly."""
    common = RNG.normal(50, 20, (1, 400, 1))  # pairing takes it away
    shift, noise = RNG.normal(2, 4, (40, 1, 1)), RNG.normal(0, 8, (1, 400, 1))
    lead, low, high = bench.bootstrap(common + shift + noise, np.repeat(common, 40, 0))
    assert lead == pytest.approx(shift.mean() + noise.mean())
    expected = 1.99 * math.sqrt(shift.var(ddof=1) / 40 + noise.var() / 400)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.06)
    few = bench.bootstrap(common + [[[0.0]], [[1.0]]], np.repeat(common, 2, 0))
    assert (few[2] - few[1]) / 2 == pytest.approx(12.7 * 0.5, rel=0.15)  # t of one degree


def runs_with(scores, shuffled=1.3):
    more = dict(val_loss=1.0, shuffled_loss=shuffled, rows_hash="x", metric="exact", arch="dec")
    return [more | dict(seed=i, row_scores=[[x] for x in row]) for i, row in enumerate(scores)]


def test_a_lead_needs_readers_and_an_interval_without_zero():
    low, high = RNG.normal(10, 5, (3, 50)), RNG.normal(20, 5, (3, 50))
    near, blind = low + RNG.normal(0, 5, low.shape), runs_with(low, shuffled=1.29)
    cases = (high, low, "leads"), (low, high, "trails"), (low, near, "undecided")
    for ours, theirs, verdict in cases:
        assert bench.judge(runs_with(ours), runs_with(theirs))["verdict"] == verdict
        assert bench.judge(runs_with(ours[:1]), runs_with(theirs))["verdict"] == "undecided"
    for pair in ((runs_with(high), blind), (blind, runs_with(high))):
        assert bench.judge(*pair)["verdict"].startswith("invalid: dec, seed 0, has not learnt")
    assert bench.conclusion(["leads", "trails"]) == "undecided"
    assert bench.conclusion(["leads"]).startswith("no lead")
    with pytest.raises(UserError, match="different rows"):
        bench.judge(runs_with(high), [row | dict(rows_hash="y") for row in runs_with(low)])


def test_a_sweep_that_was_cut_off_goes_on(run, monkeypatch):
    """Finished runs stay, begun ones go on, none is made twice."""
    small = [word for word in TINY if not word.startswith(("--preset", "--device"))]
    argv = ["compare", "--data=data", "--preset=tiny", "--archs=dec,1/2", "--seeds=1"]
    argv += [f"--train={' '.join(small)}", "--max_iters=1", "--device=cpu", "--results=r.jsonl"]
    with monkeypatch.context() as patch:
        patch.setattr(bench, "score_run", None)  # it dies where the first run is scored
        with pytest.raises(TypeError):
            run(*argv)
    with open("r.jsonl", "w", encoding="utf-8") as file:
        file.write('{"cut off": ')
    status, out, _ = run(*argv)
    assert status == 0 and "invalid, not won" in out, out
    begun = ["--init_from=resume" in words for words in run.calls]
    assert begun == [False, True, False]  # decoder-only, the same again, 1/2
    assert [len(row["row_scores"]) for row in bench.read_results("r.jsonl")] == [12] * 2
    assert run(*argv)[0] == 0 and len(run.calls) == 3  # all are there
    assert run(*argv, "--eval_split=test")[0] == 0  # scored, not trained
    assert all("--init_from=resume" in words for words in run.calls[3:])


def test_equal_minutes_are_steps_of_one_sitting(run, monkeypatch):
    def train_fake(words):
        run.calls.append("--arch=dec" in words)
        seconds, folder = 0.5 if run.calls[-1] else 0.25, words[-3].removeprefix("--out=")
        os.makedirs(folder)
        for step in range(25):  # the first takes long
            row = dict(step=step, time_s=seconds * step + 9 * (step > 0))
            bench.add_result(f"{folder}/log.jsonl", row)

    monkeypatch.setattr(bench, "call", train_fake)
    monkeypatch.setattr(bench, "run_trial", made)
    argv = ["compare", "--archs=dec,1/2", "--max_minutes=2", "--max_iters=7", "--seeds=1"]
    for _ in range(2):
        status, out, rows = run(*argv)
        assert status == 0 and run.calls == [True, False] * 3, out  # in turns, and once
        assert [row["steps"] for row in rows if "steps" in row] == [7, 7, 240, 480]


def test_commands_of_a_sweep():
    assert bench.own_words("--a=1 2/3:--b='x y' dec:--c=2", "2/3") == "--a=1 '--b=x y'"
    trial = dict(data="docstring", preset="nano", seed=2, steps=9, train="--x={split}")
    trial |= dict(arch="2/3", distill=None, init_from="out/{arch}-{split}-{seed}")
    script, *words = bench.training(bench.Compare(), trial, "o")
    assert script == "train.py" and {"--init_from=out/encdec-23-2", "--x=23"} < {*words}
    assert not [word for word in words if word.startswith(("--arch", "--split", "--preset"))]
    trial |= dict(arch="dec", distill="", init_from=None)
    wanted = {"--student=nano", "--arch=dec", "--teacher=T", "--max_iters=9", "--seed=2", "--out=o"}
    assert wanted < {*bench.training(bench.Compare(teacher="T"), trial, "o")[1:]}


def made(cfg, trial):
    """In the place of bench.run_trial."""
    return runs_with(RNG.normal(10, 1, (1, 20)))[0] | trial | dict(tokens_m=1, exact=1, rows=20)


def test_distill_varies_one_thing_at_a_time(run, monkeypatch):
    monkeypatch.setattr(bench, "run_trial", made)
    argv = ["--teacher=T", "--max_iters=5", "--seeds=1", "--distill=--lr=1"]
    status, out, rows = run("distill", *argv)
    assert status == 0 and rows[0]["distill"] == "--lr=1 --alpha=0", out
    assert "2/3 (--tau=2) against 2/3 (--alpha=0)" in out


WRONG = """walk: first word| speed --engine=onnx-int3: onnx-int3| speed --new=0: --new=0| compare
: --max_iters| speed --archs=3/4: 3/4| speed --plot=x.txt: --plot| flops --src=1,2: --src=1,2|
flops --src=10000000000000: --src| flops --json=no/x.json: no such folder| quality --run=nowhere:
nowhere| compare --max_iters=3 --train=': --train| distill --max_iters=3: --teacher"""


@pytest.mark.parametrize("case", WRONG.split("|"))
def test_bad_input(run, case):
    words, _, says = case.rpartition(":")
    status, said, _ = run(*words.split())
    assert status == 2 and says.strip() in said and not os.path.exists("out")
