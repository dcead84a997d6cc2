"""Distillation: losses against float64 loops, alignment by models that are one function, whole
runs from every kind of teacher."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, TINY, TINY_DEC, call, one_line
from safetensors.torch import load_file

import data.corpus
import distill
import lib.runs
import train
from data.sets import Pairs
from data.tokenizer import Tokenizer, load_tokenizer
from distill import ForeignTeacher, OwnTeacher, Settings, both_losses, divergence
from lib.device import start
from model import Config, Transformer

RNG = random.Random(0)
LETTERS = ["".join(RNG.choices("abcd", k=RNG.randint(1, 5))) for _ in range(300)]
BASE = [word for word in TINY if not word.startswith(("--tokenizer", "--preset"))]
BASE += ["--student=tiny", "--split=1/2", "--max_iters=4", "--eval_interval=100", "--lr=1e-2"]
GOING_ON = [word for word in BASE if not word.startswith("--split")]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A decoder-only run that has begun to learn to write letters in capitals."""
    folder = tmp_path_factory.mktemp("teacher")
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(dict(source=t, target=t.upper())) + "\n" for t in LETTERS)
    more = [f"--data={folder}/rows.jsonl", "--objective=seq2seq", "--batch_size=16", "--lr=1e-2"]
    more += ["--max_iters=40", "--eval_interval=100", "--embed_lr=1e-2", f"--out={folder}/run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *TINY_DEC, *more])
        train.main()
    return folder


@pytest.fixture
def run(monkeypatch, capsys, teacher):
    """distill.py on the letters: run(words ...) -> (status, out, err)."""

    def run(*words, base=BASE):
        data = [f"--teacher={teacher}/run", f"--data={teacher}/rows.jsonl"] if base else []
        return call(distill.main, [*base, *data, *words], monkeypatch, capsys)

    return run


def steps(folder, key="loss"):
    with open(f"{folder}/log.jsonl", encoding="utf-8") as file:
        return [row | dict(time_s=0) for row in map(json.loads, file) if key in row]


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

TEXTS = [("a", "XYZ"), ("abcdefgh", "Q"), ("ab", "QQQQQQQQQ"), ("abcdefghijklmno", "XYZXYZXYZ")]
TEXTS += [("q", "Q"), ("rst", "XY"), ("r", "Z" * 20), ("x" * 20, "Z" * 15)]
BYTES = Tokenizer("bytes")
END = BYTES.eos
ANSWERS = [[65, 66, END], [END], [67], [*range(60, 75)], [65] * 9 + [END], [END]]
ANSWERS += [[66, 66], [70] * 9]


def some_model(seed=1, **changes):
    torch.manual_seed(seed)
    ids = dict(vocab_size=BYTES.vocab_size, pad_id=BYTES.pad, bos_id=BYTES.bos, eos_id=END)
    shape = dict(n_enc=0, n_dec=2, n_embd=32, n_head=2, n_kv_head=1, head_dim=16, n_hidden=48)
    shape |= ids | dict(src_len=0, tgt_len=80, qk_norm=False)
    model = Transformer(Config(**shape | changes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim < 2), std=0.2)
    model.embed_scale.fill_(1)  # a Llama has none
    return model


def as_llama(model):
    """The same function as a Llama of `transformers`."""
    cfg = model.config
    sizes = dict(vocab_size=cfg.vocab_size, hidden_size=cfg.n_embd, rms_norm_eps=cfg.norm_eps)
    sizes |= dict(intermediate_size=cfg.n_hidden, num_hidden_layers=cfg.n_dec)
    sizes |= dict(num_attention_heads=cfg.n_head, num_key_value_heads=cfg.n_kv_head)
    sizes |= dict(head_dim=cfg.head_dim, attention_bias=True, tie_word_embeddings=True)
    sizes |= dict(rope_parameters=dict(rope_theta=cfg.rope_theta, rope_type="default"))
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    names = dict(attn_norm="input_layernorm", mlp_norm="post_attention_layernorm")
    names |= {f"attn.w{x}": f"self_attn.{x}_proj" for x in "qkvo"}
    names |= {f"mlp.{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    weights = {"model.embed_tokens.weight": model.embed.weight}
    weights["model.norm.weight"] = model.dec_norm.weight
    for i, block in enumerate(model.dec):
        for ours, theirs in names.items():
            for kind, tensor in block.get_submodule(ours).state_dict().items():
                weights[f"model.layers.{i}.{theirs}.{kind}"] = tensor
    assert not llama.load_state_dict(weights, strict=False).unexpected_keys
    return llama


def own(model):
    teacher = object.__new__(OwnTeacher)
    teacher.model, teacher.tokenizer, teacher.n_ids = model, BYTES, model.config.vocab_size
    return teacher, 0


def foreign(model):
    """x is padded on the left and y on the right. Its prompts begin as our models do by
    themselves."""
    teacher = object.__new__(ForeignTeacher)
    teacher.model, teacher.n_ids = as_llama(model), model.config.vocab_size
    return teacher, 1


def losses(model, teacher, bos, answers=None, shift=0, **more):
    """Sums of both losses, and the positions of the divergence, on a batch of TEXTS."""
    cfg = Settings(sequences="teacher" if answers else "data", **more)
    rows = [dict(source=s, target=t) for s, t in TEXTS]
    pairs = Pairs(rows, BYTES, 40, 40, model.config.n_enc == 0)
    said = answers or [target.tolist() for target in pairs.targets]
    prompts = [[BYTES.bos] * bos + [*source, BYTES.sep] for source in pairs.sources]
    heard = teacher.read(prompts, said).roll(shift, 0)
    every = range(len(rows))
    ce, kd = both_losses(model, pairs.batch(every), pairs.batch(every, None, said), heard, cfg)
    return ce.item(), kd.item(), sum(map(len, said))


@pytest.mark.parametrize("answers", [None, ANSWERS])
@pytest.mark.parametrize("kind", [own, foreign])
def test_a_model_does_not_diverge_from_itself(kind, answers):
    """Decoder-only, every mix of lengths, the padding on either side."""
    model = some_model()
    ce, kd, n = losses(model, *kind(model), answers)
    assert abs(kd) < 1e-3 and ce > 10
    assert losses(some_model(seed=2), *kind(model), answers)[1] > n * 0.01  # another one does
    assert losses(model, *kind(model), answers, shift=1)[1] > 1  # and so does a shift by one


@pytest.mark.parametrize("answers", [None, ANSWERS])
def test_encoder_decoder_and_decoder_only_align(answers):
    """Both look at nothing but the token before, and their separator and begin are equal: then they
    are one function, although one reads two sequences and the other one."""
    teacher, student = some_model(), some_model(n_enc=1, src_len=40, tgt_len=40)
    with torch.no_grad():
        student.embed.weight.copy_(teacher.embed.weight)
        student.dec_norm.weight.copy_(teacher.dec_norm.weight)
        for model in (teacher, student):
            model.embed.weight[BYTES.bos] = model.embed.weight[BYTES.sep]
            for name, p in model.named_parameters():
                if name.startswith("dec.") and name.endswith(("wo.weight", "down.weight")):
                    p.zero_()
    assert abs(losses(student, *own(teacher), answers)[1]) < 1e-3
    assert losses(student, *own(teacher), answers, shift=1)[1] > 1


def test_the_loss_of_a_step_is_the_papers(run, monkeypatch, teacher):
    """Through main, against a loop over single rows in float64."""
    assert run("--out=first", "--max_iters=2")[0] == 0
    real, seen = distill.student_answers, []

    def spy(model, train_set, *args):
        answers = real(model, train_set, *args)
        seen.append((train_set, answers))
        return answers

    monkeypatch.setattr(distill, "student_answers", spy)
    words = ["--alpha=0.3", "--tau=1.7", "--grad_accum=2", "--max_iters=1", "--out=s"]
    status, _, err = run("--student=first", *words, base=GOING_ON)
    assert status == 0, err
    [(train_set, answers)], tau = seen, 1.7
    student, expert = (
        Transformer.load(name).eval().double() for name in ("first", f"{teacher}/run")
    )
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
        D.append((p * (p / q).log()).sum(-1))
    ([logged], D, CE) = steps("s"), torch.cat(D), torch.cat(CE)
    assert len(D) != len(CE) and logged["kd"] == pytest.approx(D.mean().item(), rel=1e-4)
    wanted = 0.3 * tau**2 * D.mean() + 0.7 * CE.mean()
    assert logged["loss"] == pytest.approx(wanted.item(), rel=1e-4)


# --- whole runs


@pytest.mark.parametrize(
    "words",
    [
        ["--sequences=student", "--kl=forward"],
        ["--sequences=teacher", "--alpha=1"],
        ["--sequences=data", "--tau=2"],
        ["--alpha=0"],
        ["--arch=dec"],
    ],
)
def test_every_way_runs(words, run):
    status, _, err = run(*words, "--out=s")
    assert status == 0, err
    log = steps("s")
    assert len(log) == 4 and all(np.isfinite(row["loss"]) for row in log)
    assert all((row["kd"] == 0) == (words == ["--alpha=0"]) for row in log)
    assert Transformer.load("s").config.vocab_size == load_tokenizer("s").vocab_size
    assert os.path.exists("s/loss.png") and lib.runs.read_run("s")["settings"]["preset"] == "tiny"


def test_a_student_learns_from_divergence_alone(run):
    """No reference counts: what it knows, it has from the teacher."""
    words = ["--alpha=1", "--max_iters=32", "--batch_size=16", "--embed_lr=1e-2"]
    assert run(*words, "--out=s")[0] == 0
    log, evals = steps("s"), steps("s", "val_loss")
    assert log[-1]["kd"] < 0.5 * log[0]["kd"] and evals[-1]["val_loss"] < 2.5


def test_the_teachers_answers_are_kept_in_parts(run):
    words = ["--sequences=teacher", "--tau=2"]
    assert run(*words, "--out=a")[0] == 0
    [name] = [name for name in os.listdir(data.corpus.CACHE) if name.startswith("answers-")]
    folder = os.path.join(data.corpus.CACHE, name)
    parts = sorted(os.listdir(folder))
    assert len(parts) == 5
    os.remove(f"{folder}/{parts[2]}")  # as if it had been cut off there
    times = {part: os.path.getmtime(f"{folder}/{part}") for part in parts if part != parts[2]}
    assert run(*words, "--out=b")[0] == 0
    assert sorted(os.listdir(folder)) == parts and steps("a") == steps("b")
    assert all(os.path.getmtime(f"{folder}/{part}") == time for part, time in times.items())


def test_accumulation_and_two_processes_equal_a_larger_batch(run, teacher, monkeypatch):
    assert run("--batch_size=4", "--out=a")[0] == 0
    monkeypatch.setattr(distill, "CHUNK", 3 * 2 * BYTES.vocab_size)  # logits of three positions
    assert run("--batch_size=1", "--grad_accum=4", "--out=b")[0] == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [f"{ROOT}/distill.py", *BASE, f"--teacher={teacher}/run", "--batch_size=2"]
    command += [f"--data={teacher}/rows.jsonl", "--threads=1", "--out=c"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    for one, *others in zip(*map(steps, "abc")):
        for key, other in ((key, other) for other in others for key in ("loss", "kd", "tokens")):
            assert one[key] == pytest.approx(other[key], rel=1e-3)


def test_resuming_equals_not_stopping_bit_for_bit(run, monkeypatch):
    words = ["--max_iters=7", "--grad_accum=2", "--dropout=0.2"]
    assert run(*words, "--out=whole")[0] == 0
    real, calls = distill.both_losses, []

    def interrupts(*args):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(distill, "both_losses", interrupts)
    assert run(*words, "--out=part")[0] == 128 + signal.SIGTERM and len(steps("part")) == 3
    status, _, err = run("--init_from=resume", "--out=part", base=[])
    assert status == 0, err
    a, b = (load_file(f"{name}/model.safetensors") for name in ("whole", "part"))
    assert all((a[name] == b[name]).all() for name in a) and steps("whole") == steps("part")


# --- teachers behind hf:


def hf_folder(folder, kind="Llama", chat=False):
    """A tiny random model, with more rows in its embedding than its tokenizer has ids."""
    byte_level, bpe = tokenizers.pre_tokenizers.ByteLevel, tokenizers.models.BPE()
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = dict(special_tokens=["<s>", "<|end|>"], initial_alphabet=byte_level.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, **special)
    tokenizer.train_from_iterator(LETTERS, trainer)
    ends = dict(bos_token="<s>", eos_token="<|end|>")
    text = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)
    if chat:
        text.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}[A]"
    text.save_pretrained(folder)
    sizes = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256)
    sizes |= dict(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    torch.manual_seed(0)
    about = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}ForCausalLM")(about)
    model.lm_head.weight.data *= 20  # or its logits could not grow
    model.save_pretrained(folder)
    return str(folder)


def load(folder, **more):
    cfg = Settings(teacher=f"hf:{folder}", device="cpu", dtype="float32", **more)
    return ForeignTeacher(cfg, start(cfg))


@pytest.mark.parametrize("kind, sequences", [("Phi3", "teacher"), ("Qwen2", "student")])
def test_foreign_teachers(kind, sequences, run):
    folder = hf_folder("hf", kind, chat=kind == "Phi3")
    status, _, err = run(f"--teacher=hf:{folder}", f"--sequences={sequences}", "--out=s")
    assert status == 0 and (" reads '<|user|>" in err) == (kind == "Phi3"), err
    mine, theirs = load_tokenizer("s"), transformers.AutoTokenizer.from_pretrained(folder)
    assert mine.encode("abc dcba") == theirs("abc dcba", add_special_tokens=False)["input_ids"]
    assert mine.eos == theirs.eos_token_id and mine.sep >= len(theirs)


def test_a_foreign_teacher_reads_rows_padded_as_alone():
    teacher = load(hf_folder("hf", "Qwen2"), template="Q: {source} A:")
    rows = [dict(source=text, target="x") for text in ("ab" * 30, "dd", "a")]
    pairs = Pairs(rows, teacher.tokenizer, 8, 8, False)
    prompts = teacher.prompts(pairs)
    shown = [teacher.tokenizer.decode(ids) for ids in prompts]
    assert shown[1] == "Q: dd A:" and len(shown[0]) < 40  # cut where the student's source is
    answers = [[20, 21, 22], [23], [24, 25, 26, 27, 28]]
    found = teacher.read(prompts, answers).split([3, 1, 5])
    for prompt, answer, logits in zip(prompts, answers, found):
        whole = teacher.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        assert torch.allclose(logits, whole[:, : teacher.n_ids], atol=1e-5)
    for answer in teacher.write(prompts, 5, 0):
        assert len(answer) <= 5 and max(answer) < teacher.n_ids and 1 not in answer[:-1]


def test_finetuning_a_foreign_teacher(run):
    folder = hf_folder("hf", "Phi3")
    words = [f"--teacher=hf:{folder}", "--finetune_teacher", "--max_iters=20", "--batch_size=16"]
    status, _, err = run(*words, "--out=tuned", "--lr=1e-2")
    assert status == 0 and "--teacher=hf:tuned" in err, err
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir("tuned"))
    raw, tuned = load(folder), load("tuned")
    assert raw.identity != tuned.identity
    pairs = Pairs([dict(source="abc", target="ABC")], raw.tokenizer, 30, 30, False)
    nll = []
    for teacher in (raw, tuned):
        logits = teacher.read(teacher.prompts(pairs), [pairs.targets[0].tolist()])
        nll.append(F.cross_entropy(logits, torch.tensor(pairs.targets[0])).item())
    assert nll[1] < nll[0] - 0.5 and steps("tuned")[-1]["loss"] < 0.8 * steps("tuned")[0]["loss"]
    assert run("--teacher=hf:tuned", "--out=student", "--max_iters=1")[0] == 0


# --- bad input


@pytest.mark.parametrize(
    "words, says",
    [
        (["--alpha=1.5"], "--alpha=1.5"),
        (["--alpha=nan"], "--alpha=nan"),
        (["--tau=0"], "--tau=0"),
        (["--kl=jsd"], "--kl"),
        (["--template=x"], "{source}"),
        (["--student=nowhere"], "nowhere"),
        (["--teacher=nowhere"], "nowhere"),
        (["--teacher="], "--teacher is missing"),
        (["--teacher=hf:./nowhere"], "--teacher=hf:./nowhere cannot be used"),
        (["--objective=span"], "--objective"),
        (["--data=nowhere.jsonl"], "no such file"),
        (["--finetune_teacher"], "hf: teachers"),
        (["--arch=dec", "--cross_rope"], "--cross_rope"),
        (["--init_from=elsewhere"], "--init_from"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(words, says, run):
    status, _, err = run(*words, "--out=bad")
    assert status == 2 and says in one_line(err), err
    assert not os.path.exists("bad")


def test_bad_teachers(run, monkeypatch, capsys, teacher):
    def error(*words):
        status, _, err = run(*words, "--out=bad", base=GOING_ON)
        assert status == 2 and not os.path.exists("bad"), err
        return one_line(err)

    shutil.copytree(f"{teacher}/run", "t")
    assert run("--teacher=t", "--out=student", "--max_iters=2")[0] == 0
    assert "is no run of train.py --arch=dec" in error("--teacher=student")
    folder = hf_folder("hf")
    assert "other vocabulary" in error(f"--teacher=hf:{folder}", "--student=student")
    os.remove(f"{folder}/model.safetensors")
    assert "cannot be used" in error(f"--teacher=hf:{folder}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "nanoencdec[teacher]" in error(f"--teacher=hf:{folder}")
    model = Transformer.load("t")
    torch.nn.init.zeros_(model.embed.weight)
    model.save("t", "model.safetensors")
    model.save("t", "best.safetensors")
    status, _, err = run("--init_from=resume", "--out=student", "--max_iters=3", base=[])
    assert status == 2 and "has changed" in one_line(err)
