"""Distillation: losses against float64 loops, alignment by models that are one function, whole
runs from every kind of teacher."""

import glob
import json
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, TINY, TINY_DEC, call, log_rows, one_line
from safetensors.torch import load_file
from test_data import foreign_bpe
from to_hf import write_hf

import data.corpus
import distill
import train
from data.sets import Pairs
from data.tokenizer import Tokenizer, load_tokenizer
from distill import ForeignTeacher, OwnTeacher, Settings, both_losses, divergence
from lib.device import start
from model import Config, Transformer

RNG = random.Random(0)
LETTERS = ["".join(RNG.choices("abcd", k=RNG.randint(1, 5))) for _ in range(300)]
BASE = [word for word in TINY if not word.startswith(("--tokenizer", "--preset"))]
BASE += ["--student=tiny", "--max_iters=4", "--eval_interval=100", "--lr=1e-2"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A decoder-only run that has begun to learn to write letters in capitals."""
    folder = tmp_path_factory.mktemp("teacher")
    rows = (json.dumps(dict(source=t, target=t.upper())) for t in LETTERS)
    (folder / "rows.jsonl").write_text("\n".join(rows))
    more = [f"--data={folder}/rows.jsonl", "--objective=seq2seq", "--batch_size=16", "--lr=1e-2"]
    more += ["--max_iters=40", "--eval_interval=100", "--embed_lr=1e-2", f"--out={folder}/run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *TINY_DEC, *more])
        train.main()
    return folder


@pytest.fixture
def run(monkeypatch, capsys, teacher):
    """distill.py on the letters: run(words ..., status=0) -> what it says."""

    def run(*words, base=BASE, status=0):
        data = [f"--teacher={teacher}/run", f"--data={teacher}/rows.jsonl"] if base else []
        found, _, err = call(distill.main, [*base, *data, *words], monkeypatch, capsys)
        assert found == status, err
        return err

    return run


# --- divergences


def test_divergence_against_float64():
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 11, dtype=torch.float64) * 3
    p, q = a.softmax(-1).numpy(), b.softmax(-1).numpy()  # student, teacher
    for kl in ("reverse", "forward"):
        pairs = zip(p, q) if kl == "reverse" else zip(q, p)
        wanted = [sum(x * np.log(x / y) for x, y in zip(u, v)) for u, v in pairs]
        found = divergence(a.float().log_softmax(-1), b.float().log_softmax(-1), kl)
        assert np.allclose(found, wanted, atol=1e-5) and min(wanted) > 0
        assert divergence(a.log_softmax(-1), a.log_softmax(-1), kl).abs().max() < 1e-12


# --- alignment: what is the same function gives the same distribution at every position

TEXTS = [("a", "XYZ"), ("abcdefgh", "Q"), ("ab", "Q" * 9), ("r", "Z" * 20), ("x" * 20, "Z" * 15)]
BYTES = Tokenizer("bytes")
END = BYTES.eos
ANSWERS = [[65, 66, END], [END], [67], [*range(60, 75)], [65] * 9 + [END]]


def some_model(seed=1, **changes):
    torch.manual_seed(seed)
    ids = dict(vocab_size=BYTES.vocab_size, pad_id=BYTES.pad, bos_id=BYTES.bos, eos_id=END)
    shape = dict(n_enc=0, n_dec=2, n_embd=32, n_head=2, n_kv_head=1, head_dim=16, n_hidden=48)
    shape |= ids | dict(src_len=0, tgt_len=80, qk_norm=False)
    model = Transformer(Config(**shape | changes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim < 2), std=0.2)
    return model


def own(model):
    teacher = object.__new__(OwnTeacher)
    teacher.model, teacher.tokenizer, teacher.n_ids = model, BYTES, model.config.vocab_size
    return teacher, 0


def foreign(model):
    """The same function as a model of `transformers`. x is padded on the left and y on the right.
    Its prompts begin as our models do by themselves."""
    teacher = object.__new__(ForeignTeacher)
    model.save("run")
    BYTES.save("run")
    write_hf("run", "hf")
    teacher.model = transformers.AutoModelForCausalLM.from_pretrained("hf").eval()
    teacher.n_ids = model.config.vocab_size
    return teacher, 1


def pairs_of(texts, tokenizer=BYTES, dec=False):
    rows = [dict(source=source, target=target) for source, target in texts]
    return Pairs(rows, tokenizer, 40, 40, dec)


def losses(model, teacher, bos, answers=None, shift=0):
    """Sums of both losses on a batch of TEXTS."""
    cfg = Settings(sequences="teacher" if answers else "data")
    pairs, every = pairs_of(TEXTS, dec=model.config.n_enc == 0), range(len(TEXTS))
    said = answers or [target.tolist() for target in pairs.targets]
    prompts = [[BYTES.bos] * bos + [*source, BYTES.sep] for source in pairs.sources]
    heard = teacher.read(prompts, said).roll(shift, 0)
    ce, kd = both_losses(model, pairs.batch(every), pairs.batch(every, None, said), heard, cfg)
    return ce.item(), kd.item()


@pytest.mark.parametrize("answers", [None, ANSWERS])
@pytest.mark.parametrize("kind", [own, foreign])
def test_a_model_does_not_diverge_from_itself(kind, answers):
    """Decoder-only, every mix of lengths, the padding on either side."""
    model = some_model()
    teacher = kind(model)
    ce, kd = losses(model, *teacher, answers)
    assert abs(kd) < 1e-3 and ce > 10
    assert losses(some_model(seed=2), *teacher, answers)[1] > 1  # another one does
    assert losses(model, *teacher, answers, shift=1)[1] > 1  # and so does a shift by one


def test_a_students_answer_follows_from_seed_step_and_row():
    model, every = some_model(n_enc=1, src_len=40, tgt_len=40), range(len(TEXTS))
    train_set = SimpleNamespace(pairs=pairs_of(TEXTS), rows=lambda step: every)

    def answers(rows, step=3, seed=7):
        return distill.student_answers(model, train_set, rows, step, BYTES.vocab_size, seed)

    together = answers(every)
    assert all(answers([row]) == {row: together[row]} for row in every)
    assert together not in (answers(every, step=4), answers(every, seed=8))


@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_the_loss_of_a_step_is_the_papers(run, monkeypatch, teacher, kl):
    """Through main, against a loop over single rows in float64."""
    run("--out=first", "--max_iters=2")
    real, seen, tau = distill.student_answers, [], 1.7

    def spy(model, train_set, *args):
        seen.append((train_set, real(model, train_set, *args)))
        return seen[-1][1]

    monkeypatch.setattr(distill, "student_answers", spy)
    words = ["--alpha=0.3", "--tau=1.7", "--grad_accum=2", "--max_iters=1", "--out=s"]
    words += [f"--kl={kl}"]
    run("--student=first", *words)
    folders, [(train_set, answers)] = ("first", f"{teacher}/run"), seen
    student, expert = (Transformer.load(name).eval().double() for name in folders)
    pairs, CE, D = train_set.pairs, [], []
    for row in train_set.rows(0):
        source, target, said = pairs.sources[row], pairs.targets[row].tolist(), answers[row]
        encoded = student.encode(torch.tensor(source)[None])
        inputs = (torch.tensor([[BYTES.bos, *y[:-1]]]) for y in (target, said))
        at_target, at_said = (student.logits(student.decode(ids, encoded))[0] for ids in inputs)
        CE.append(F.cross_entropy(at_target, torch.tensor(target), reduction="none"))
        x = [BYTES.bos, *source, BYTES.sep]
        heard = expert.logits(expert.decode(torch.tensor([[*x, *said[:-1]]])))[0, len(x) - 1 :]
        p, q = (at_said / tau).softmax(-1), (heard / tau).softmax(-1)
        p, q = (p, q) if kl == "reverse" else (q, p)
        D.append((p * (p / q).log()).sum(-1))
    ([logged], D, CE) = log_rows("s"), torch.cat(D), torch.cat(CE)
    assert len(D) != len(CE) and logged["kd"] == pytest.approx(D.mean().item(), rel=1e-4)
    wanted = 0.3 * tau**2 * D.mean() + 0.7 * CE.mean()
    assert logged["loss"] == pytest.approx(wanted.item(), rel=1e-4)


# --- whole runs


@pytest.mark.parametrize("words", ["--dtype=float16", "--alpha=0", "--arch=prefix"])
def test_every_way_runs(words, run):
    run(*words.split(), "--out=s", "--max_iters=2")
    losses = [(row["loss"], row["kd"]) for row in log_rows("s")]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert all((kd == 0) == (words == "--alpha=0") for _, kd in losses)


def test_a_student_learns_from_the_teacher_alone(run, monkeypatch):
    """No reference counts, with divergence alone or with cross-entropy on the teacher's answers."""
    words = ["--alpha=1", "--max_iters=24", "--batch_size=16", "--embed_lr=1e-2"]
    run(*words, "--out=s")
    log, evals = log_rows("s"), log_rows("s", "val_loss")
    assert log[-1]["kd"] < 0.5 * log[0]["kd"] and evals[-1]["val_loss"] < 2.5
    monkeypatch.setattr(distill, "teacher_answers", lambda _, x, *__: [[BYTES.eos]] * len(x))
    run(*words[1:], "--alpha=0", "--sequences=teacher", "--out=t")
    assert log_rows("t")[-1]["loss"] < 0.1


def test_the_teachers_answers_are_kept_in_parts(run):
    words = ["--sequences=teacher", "--tau=2", "--max_iters=2"]
    run(*words, "--out=a")
    parts = sorted(glob.glob(f"{data.corpus.CACHE}/answers-*/*"))
    assert len(parts) == 5
    os.remove(parts.pop(2))  # as if it had been cut off there
    times = [os.path.getmtime(part) for part in parts]
    run(*words, "--out=b")
    found = glob.glob(f"{data.corpus.CACHE}/answers-*/*")
    assert len(found) == 5 and log_rows("a") == log_rows("b")
    assert times == [os.path.getmtime(part) for part in parts]


def test_every_prompt_has_its_own_answer():
    writer = SimpleNamespace(write=lambda prompts, n, seed: prompts)  # says what it is asked
    cfg, prompts = Settings(src_len=1, tgt_len=1, device="cpu"), [[i] for i in range(150)]
    about = SimpleNamespace(hash="x"), cfg, start(cfg)
    assert distill.teacher_answers(writer, prompts, *about) == prompts


def test_accumulation_and_two_processes_equal_a_larger_batch(run, teacher, monkeypatch):
    run("--batch_size=4", "--out=a", "--max_iters=3")
    monkeypatch.setattr("lib.device.CHUNK", 3 * 2 * BYTES.vocab_size)  # logits of three positions
    run("--batch_size=1", "--grad_accum=4", "--out=b", "--max_iters=3")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [f"{ROOT}/distill.py", *BASE, f"--teacher={teacher}/run", "--batch_size=2"]
    command += [f"--data={teacher}/rows.jsonl", "--threads=1", "--out=c", "--max_iters=3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for rows in zip(*map(log_rows, "abc")):
        a, b, c = ([row[key] for key in ("loss", "kd", "tokens")] for row in rows)
        assert a == pytest.approx(b, rel=1e-3) and a == pytest.approx(c, rel=1e-3)


def test_resuming_equals_not_stopping_bit_for_bit(run, monkeypatch):
    words = ["--max_iters=5", "--grad_accum=2", "--dropout=0.2"]
    run(*words, "--out=whole")
    run(*words[:2], "--out=plain")

    def stop_at_step_2(step, cfg):
        if step == 2:
            os.kill(os.getpid(), 15)
        return train.lr_share(step, cfg)

    monkeypatch.setattr(distill, "lr_share", stop_at_step_2)
    run(*words, "--out=part", status=128 + 15)
    assert len(log_rows("part")) == 3
    run("--init_from=resume", "--out=part", base=[])
    a, b = (load_file(f"{name}/model.safetensors") for name in ("whole", "part"))
    assert all((a[name] == b[name]).all() for name in a) and log_rows("whole") == log_rows("part")
    assert log_rows("plain")[1]["loss"] != log_rows("whole")[1]["loss"]  # dropout has an effect


# --- teachers behind hf:


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A tiny random Llama, with more rows in its embedding than its tokenizer has ids."""
    folder = str(tmp_path_factory.mktemp("hf"))
    ends = dict(tokenizer_object=foreign_bpe(LETTERS), bos_token="<s>", eos_token="</s>")
    text = transformers.PreTrainedTokenizerFast(**ends)
    text.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}[A]"
    text.save_pretrained(folder)
    sizes = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    model = transformers.LlamaForCausalLM(config)
    model.lm_head.weight.data *= 20  # or its logits could not grow
    model.save_pretrained(folder)
    return folder


def load(folder, **more):
    cfg = Settings(teacher=f"hf:{folder}", device="cpu", dtype="float32", **more)
    return ForeignTeacher(cfg, start(cfg))


def test_a_foreign_teacher_reads_rows_padded_as_alone(hf):
    teacher = load(hf, template="Q: {source} A:")
    texts = [("ab" * 99, "x"), ("dd", "x"), ("a", "x")]
    prompts = teacher.prompts(pairs_of(texts, teacher.tokenizer))
    shown = [teacher.tokenizer.decode(ids) for ids in prompts]
    assert shown[1] == "Q: dd A:" and len(shown[0]) < 140  # cut where the student's source is
    answers = [[20, 21, 22], [23], [24, 25, 26, 27, 28]]
    found = teacher.read(prompts, answers).split([3, 1, 5])
    for prompt, answer, logits in zip(prompts, answers, found):
        whole = teacher.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        assert torch.allclose(logits, whole[:, : teacher.n_ids], atol=1e-5)
    for answer in teacher.write(prompts, 5, 0):
        assert len(answer) <= 5 and max(answer) < teacher.n_ids and 1 not in answer[:-1]


def test_a_foreign_teacher_is_finetuned_and_then_distilled(hf, run):
    words = [f"--teacher=hf:{hf}", "--finetune_teacher", "--max_iters=20", "--batch_size=16"]
    run(*words, "--out=tuned")
    assert {"adapter_config.json", "tokenizer.json"} < set(os.listdir("tuned"))
    raw, tuned = load(hf), load("tuned")
    pairs = pairs_of([("abc", "ABC")], raw.tokenizer)
    nll, target = [], torch.tensor(pairs.targets[0])
    for teacher in (raw, tuned):
        logits = teacher.read(teacher.prompts(pairs), [target.tolist()])
        nll.append(F.cross_entropy(logits, target).item())
    assert nll[1] < nll[0] - 0.5 and raw.identity != tuned.identity
    assert " reads '<|user|>" in run("--teacher=hf:tuned", "--out=s", "--max_iters=2")
    mine, theirs = load_tokenizer("s"), transformers.AutoTokenizer.from_pretrained(hf)
    assert mine.encode("abc dcba") == theirs("abc dcba", add_special_tokens=False)["input_ids"]
    assert mine.eos == theirs.eos_token_id and mine.sep >= len(theirs)


# --- bad input

BAD = {"--alpha=nan": "--alpha=nan", "--template=x": "{source}", "--student=nowhere": "nowhere"}
BAD |= {"--teacher=nowhere": "nowhere", "--teacher=": "takes TEXT"}
BAD |= {"--teacher=hf:./nowhere": "--teacher=hf:./nowhere cannot be used"}
BAD |= {"--finetune_teacher": "hf: teachers", "--arch=dec --cross_rope": "--cross_rope"}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(words, run):
    assert BAD[words] in one_line(run(*words.split(), "--out=bad", status=2))
    assert not os.path.exists("bad")


def test_bad_teachers(hf, run, monkeypatch):
    def error(*words, **more):
        return one_line(run(*words, status=2, **more))

    run("--out=student", "--max_iters=2")
    assert "is no run of train.py --arch=dec" in error("--teacher=student", "--out=bad")
    other = [f"--teacher=hf:{hf}", "--out=bad"]
    assert "another vocabulary" in error(*other, "--student=student")
    monkeypatch.setattr(distill, "identity", lambda model: "another")
    assert not os.path.exists("bad")
    assert "has changed" in error("--init_from=resume", "--out=student", base=[])
