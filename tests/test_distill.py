"""Distillation: divergences against float64, alignment by models that are the same function, and whole runs from every kind of teacher."""
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, TINY, TINY_DEC, call, one_line
from tokenizers import Tokenizer as Foreign
from tokenizers import decoders, models, pre_tokenizers, trainers

import data.corpus
import distill
import train
from lib.settings import parse
from data.pairs import Pairs
from data.tokenizer import Tokenizer, load_tokenizer
from distill import Distillation, ForeignTeacher, Kept, OwnTeacher, Settings, divergence, in_chunks, with_rest
from model import Config, Transformer
from train import World

RNG = np.random.default_rng(0)
LETTERS = [("".join(RNG.choice(list("abcd"), RNG.integers(1, 6)))) for _ in range(300)]


def rows_file(folder):
    path = os.path.join(folder, "rows.jsonl")
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(dict(source=text, target=text.upper())) + "\n" for text in LETTERS)
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A decoder-only run that has learnt to write letters in capitals."""
    folder = tmp_path_factory.mktemp("teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.corpus, "CACHE", str(folder / "cache"))
        patch.setattr(sys, "argv", ["train.py", *TINY_DEC, f"--data={rows_file(folder)}", "--objective=seq2seq", "--n_embd=64", "--batch_size=16", "--max_iters=120",
                                    "--lr=1e-2", "--embed_lr=1e-2", f"--out={folder}/run"])
        train.main()
    return f"{folder}/run"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, teacher):
    """distill.py on the letters: run(words ...) -> (status, out, err)."""
    base = [word for word in TINY if not word.startswith("--tokenizer")]
    base += ["--n_enc=1", "--n_dec=1", f"--data={rows_file(tmp_path)}", "--max_iters=4", "--eval_interval=100", "--lr=1e-2"]

    def run(*words, base=base, teacher=teacher):
        return call(distill.main, [*base, *([f"--teacher={teacher}"] if teacher else []), *words], monkeypatch, capsys)
    return run


def steps(folder):
    return [row for row in map(json.loads, open(f"{folder}/log.jsonl")) if "loss" in row]


# --- divergences

@pytest.mark.parametrize("kl, beta", [("reverse", 0.5), ("forward", 0.5), ("jsd", 0.5), ("jsd", 0.1)])
def test_divergence_against_float64(kl, beta):
    torch.manual_seed(0)
    a, b = torch.randn(5, 11, dtype=torch.float64) * 3, torch.randn(5, 11, dtype=torch.float64) * 3
    p, q = a.softmax(-1).numpy(), b.softmax(-1).numpy()  # student, teacher
    wanted = []
    for s, t in zip(p, q):
        m = beta * t + (1 - beta) * s
        pairs = {"reverse": [(1, s, t)], "forward": [(1, t, s)], "jsd": [(beta, t, m), (1 - beta, s, m)]}[kl]
        wanted.append(sum(weight * sum(x * np.log(x / y) for x, y in zip(u, v)) for weight, u, v in pairs))
    found = divergence(a.float().log_softmax(-1), b.float().log_softmax(-1), kl, beta)
    assert np.allclose(found, wanted, atol=1e-5) and min(wanted) > 0
    assert divergence(a.log_softmax(-1), a.log_softmax(-1), kl, beta).abs().max() < 1e-12


def test_the_likeliest_and_the_rest_together():
    torch.manual_seed(0)
    logits, other = torch.randn(2, 7, 20) * 3
    logp, other_logp = logits.log_softmax(-1), other.log_softmax(-1)
    ids = logits.topk(4).indices
    found = with_rest(logits, ids).exp()
    assert torch.allclose(found.sum(-1), torch.ones(7), atol=1e-5)
    assert torch.allclose(found[:, :4], logp.exp().topk(4).values, atol=1e-5)
    for kl in ("reverse", "forward", "jsd"):
        whole = divergence(logp, other_logp, kl)
        assert (divergence(with_rest(logits, ids), with_rest(other, ids), kl) <= whole + 1e-5).all()  # merging outcomes hides differences
        most = logits.topk(19).indices  # the rest is one id
        assert torch.allclose(divergence(with_rest(logits, most), with_rest(other, most), kl), whole, rtol=1e-2, atol=1e-3)
    certain = torch.tensor([[100.0, 0, 0, 0]], requires_grad=True)
    divergence(with_rest(certain, torch.tensor([[0]])), torch.tensor([[-1e-6, -13.8]]), "reverse").sum().backward()
    assert certain.grad.isfinite().all()


def test_chunks_change_nothing(monkeypatch):
    torch.manual_seed(0)
    head, states, other = torch.nn.Linear(8, 50), torch.randn(23, 8, requires_grad=True), torch.randn(23, 50).log_softmax(-1)
    sizes = []

    def loss(part, teacher):
        sizes.append(len(part))
        return divergence(head(part).log_softmax(-1), teacher, "reverse").sum()
    found = []
    for chunk in (2 ** 24, 50 * 7):
        monkeypatch.setattr(distill, "CHUNK", chunk)
        value = in_chunks(loss, 50, states, other)
        found.append((value.detach(), *torch.autograd.grad(value, [states, head.weight])))
    assert max(sizes[1:]) == 7
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*found))


# --- alignment: what is the same function gives the same distribution at every position

def some_model(seed=1, **changes):
    torch.manual_seed(seed)
    tokenizer = Tokenizer("bytes")
    shape = dict(vocab_size=tokenizer.vocab_size, n_enc=0, n_dec=2, n_embd=32, n_head=2, n_kv_head=1, head_dim=16, n_hidden=48, src_len=0, tgt_len=80, qk_norm=False,
                 pad_id=tokenizer.pad, bos_id=tokenizer.bos, eos_id=tokenizer.eos) | changes
    model = Transformer(Config(**shape)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2) if p.ndim > 1 else torch.nn.init.normal_(p, mean=1.0, std=0.2)
    return model


def as_llama(model):
    """The same function as a Llama of `transformers`."""
    cfg = model.config
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.n_embd, intermediate_size=cfg.n_hidden, num_hidden_layers=cfg.n_dec, num_attention_heads=cfg.n_head,
        num_key_value_heads=cfg.n_kv_head, head_dim=cfg.head_dim, rms_norm_eps=cfg.norm_eps, tie_word_embeddings=True, max_position_embeddings=256,
        rope_parameters=dict(rope_theta=cfg.rope_theta, rope_type="default"))).eval()
    names = {"attn_norm": "input_layernorm", "attn.wq": "self_attn.q_proj", "attn.wk": "self_attn.k_proj", "attn.wv": "self_attn.v_proj", "attn.wo": "self_attn.o_proj",
             "mlp_norm": "post_attention_layernorm", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}
    weights = {"model.embed_tokens.weight": model.embed.weight * cfg.embed_scale, "model.norm.weight": model.dec_norm.weight}
    for i, block in enumerate(model.dec):
        for ours, theirs in names.items():
            weights[f"model.layers.{i}.{theirs}.weight"] = block.get_submodule(ours).weight
    llama.load_state_dict(weights, strict=False)
    return llama


def some_job(model, teacher, answers=None, **settings):
    """A Distillation of letters without its files: rows 0 .. 7, of every mix of lengths, are one batch."""
    texts = [("a", "XYZ"), ("abcdefgh", "Q"), ("ab", "QQQQQQQQQ"), ("abcdefghijklmno", "XYZXYZXYZ"), ("q", "Q"), ("rst", "XY"), ("r", "Z" * 20), ("x" * 20, "Z" * 15)]
    tokenizer, job = Tokenizer("bytes"), object.__new__(Distillation)
    job.cfg = Settings(**dict(alpha=1.0, sequences="data", top=0) | settings)
    job.model, job.tokenizer, job.teacher, job.kept, job.carry, job.writing = model, tokenizer, teacher, None, dict(skipped=0), 0.0
    job.world = World(SimpleNamespace(threads=0, device="cpu", dtype="float32", max_minutes=0, max_iters=1, compile="false"))
    job.pairs = {"train": Pairs([dict(source=s, target=t) for s, t in texts], tokenizer, 40, 40, model.config.n_enc == 0)}
    job.prompts = teacher.prompts([s for s, _ in texts], job.pairs["train"])
    references = [None if part is None else torch.from_numpy(part) for part in job.pairs["train"].batch(range(8))]
    return job, distill.Batch(references, np.arange(8), np.arange(8), np.arange(8), answers and [job.usable(answer) for answer in answers], 1.0, None, 0)


def own(model):
    teacher = object.__new__(OwnTeacher)
    teacher.model, teacher.tokenizer, teacher.n_ids = model, Tokenizer("bytes"), model.config.vocab_size
    return teacher


def foreign(model, by_states=True):
    """Behind hf:, where x is padded on the left and y on the right. Its prompt has the begin that our models put there themselves."""
    class Teacher(ForeignTeacher):
        def prompts(self, texts, pairs):
            return [np.array([self.tokenizer.bos, *source, self.tokenizer.sep]) for source in pairs.sources]
    teacher = object.__new__(Teacher)
    teacher.model, teacher.tokenizer, teacher.n_ids, teacher.device = as_llama(model), Tokenizer("bytes"), model.config.vocab_size, torch.device("cpu")
    teacher.by_states = by_states
    return teacher


ANSWERS = [[65, 66, 258], [258], [67], list(range(60, 75)), [65] * 9 + [258], [258], [66, 66], [70] * 12]  # 258 is the end


@pytest.mark.parametrize("answers", [None, ANSWERS])
@pytest.mark.parametrize("kind", [own, foreign, lambda model: foreign(model, by_states=False)])
def test_a_model_does_not_diverge_from_itself(kind, answers):
    """Decoder-only, every mix of lengths, the padding on either side."""
    model = some_model()
    job, batch = some_job(model, kind(model), answers)
    loss, _, log = job.loss_of(model, batch)
    positions = sum(len(a) for a in ANSWERS if a != [258]) if answers else int(batch.references[3].sum())
    assert log["divergence"][1] == positions and abs(loss.item()) < 1e-3
    other = some_model(seed=2)  # another function does
    assert job.loss_of(other, batch)[0].item() > positions * 0.01


@pytest.mark.parametrize("kind", [own, foreign, lambda model: foreign(model, by_states=False)])
def test_a_shift_by_one_is_caught(kind):
    model = some_model()
    teacher = kind(model)
    job, batch = some_job(model, teacher)
    true = teacher.read
    teacher.read = lambda prompts, answers: torch.roll(true(prompts, answers), 1, 0)
    assert job.loss_of(model, batch)[0].item() > 1


def test_encoder_decoder_and_decoder_only_align():
    """Both made to look at nothing but the token before, the separator and the begin made equal: then they are one function, and
    their positions must match although one reads two sequences and the other one."""
    teacher, student = some_model(), some_model(n_enc=1, src_len=40, tgt_len=40)
    with torch.no_grad():
        student.embed.weight.copy_(teacher.embed.weight)
        student.dec_norm.weight.copy_(teacher.dec_norm.weight)
        for model in (teacher, student):
            model.embed.weight[model.config.bos_id] = model.embed.weight[Tokenizer("bytes").sep]
            for block in model.dec:
                block.attn.wo.weight.zero_(), block.mlp.down.weight.zero_()
                if block.cross is not None:
                    block.cross.wo.weight.zero_()
    for answers in (None, ANSWERS):
        job, batch = some_job(student, own(teacher), answers)
        loss, _, log = job.loss_of(student, batch)
        assert abs(loss.item()) < 1e-3 and log["divergence"][1] > 40


def test_rows_do_not_depend_on_their_neighbours_or_on_filler():
    student, teacher = some_model(n_enc=1, src_len=40, tgt_len=40), own(some_model(seed=2))
    job, batch = some_job(student, teacher, ANSWERS, alpha=0.7, tau=2.0)
    whole = job.loss_of(student, batch)
    alone = []
    for row in range(8):
        references = [None if p is None else torch.from_numpy(p) for p in job.pairs["train"].batch([row, 3])]  # the second without a loss
        references[3][1:] = False
        alone.append(job.loss_of(student, distill.Batch(references, np.array([row, 3]), np.array([row]), np.array([0]), [job.usable(ANSWERS[row])], 1.0, None, 0)))
    for name in ("divergence", "cross_entropy"):
        assert sum(float(part[2][name][0]) for part in alone) == pytest.approx(float(whole[2][name][0]), rel=1e-4)
        assert sum(part[2][name][1] for part in alone) == whole[2][name][1]
    assert sum(part[0].item() for part in alone) == pytest.approx(whole[0].item(), rel=1e-4)


def test_the_loss_is_the_papers():
    """alpha tau^2 mean(D) + (1 - alpha) mean(cross-entropy), each over its own positions, from logits by hand in float64."""
    student, model = some_model(n_enc=1, src_len=40, tgt_len=40), some_model(seed=2)
    job, batch = some_job(student, own(model), ANSWERS, alpha=0.3, tau=1.7)
    job.cfg.sequences = "teacher"
    batch, = job.prepare(0, [batch])
    loss, n, _ = job.loss_of(student, batch)
    D, CE = [], []
    tokenizer = job.tokenizer
    for row, answer in enumerate(ANSWERS):
        source, target = job.pairs["train"].sources[row], job.pairs["train"].targets[row]
        encoded = student.encode(torch.from_numpy(source)[None])
        for sequence, into in ((target.tolist(), CE), (answer, D)):
            if sequence == [tokenizer.eos]:
                continue
            logits = student.logits(student.decode(torch.tensor([[tokenizer.bos, *sequence[:-1]]]), encoded))[0].double()
            if into is CE:
                CE += [-logits.log_softmax(-1)[t, id].item() for t, id in enumerate(sequence)]
                continue
            prompt = [tokenizer.bos, *source, tokenizer.sep]
            other = model.logits(model.decode(torch.tensor([[*prompt, *sequence[:-1]]])))[0, len(prompt) - 1:].double()
            p, q = (logits / 1.7).softmax(-1), (other / 1.7).softmax(-1)
            D += (p * (p / q).log()).sum(-1).tolist()
    assert len(CE) == n
    assert loss.item() / n == pytest.approx(0.3 * 1.7 ** 2 * np.mean(D) + 0.7 * np.mean(CE), rel=1e-4)
    assert job.carry["skipped"] == 2


# --- whole runs

@pytest.mark.parametrize("words", [["--sequences=student"], ["--sequences=student", "--mix=0.5", "--refresh=3", "--kl=jsd"], ["--sequences=teacher", "--alpha=1"],
                                   ["--sequences=data", "--kl=forward"], ["--sequences=data", "--top=0", "--tau=2"], ["--alpha=0"],
                                   ["--arch=dec", "--n_enc=0", "--n_dec=2", "--sequences=student"]])
def test_every_way_runs(words, run):
    words = [*words[:1], *(word for word in words[1:] if word != "--n_enc=0")]
    base = None
    if "--arch=dec" in words:
        base = [word for word in TINY if not word.startswith("--tokenizer")] + [f"--data={rows_file('.')}", "--max_iters=4"]
    status, _, err = run(*words, "--out=s", **(dict(base=base) if base else {}))
    assert status == 0, err
    log = steps("s")
    assert len(log) == 4 and all(np.isfinite(row["loss"]) for row in log)
    settings = parse(Settings, "", words)
    for row in log:
        wanted = 0
        if settings.alpha < 1:
            wanted += (1 - settings.alpha) * row["cross_entropy"]
        if settings.alpha > 0:
            wanted += settings.alpha * settings.tau ** 2 * row["divergence"]
        assert row["loss"] == pytest.approx(wanted, rel=1e-3)
        assert ("writing_s" in row) == ("student" in words[0] or "--arch=dec" in words)
    assert Transformer.load("s").config.vocab_size == load_tokenizer("s").vocab_size and os.path.exists("s/loss.png")


def test_a_student_learns_from_divergence_alone(run):
    """No reference is seen: what it knows, it has from the teacher."""
    status, _, err = run("--sequences=student", "--alpha=1", "--out=s", "--max_iters=70", "--n_embd=64", "--batch_size=16", "--eval_rows=32", "--embed_lr=1e-2")
    assert status == 0, err
    log = steps("s")
    assert log[-1]["divergence"] < 0.5 * log[0]["divergence"]
    last = [row for row in map(json.loads, open("s/log.jsonl")) if "val_loss" in row][-1]
    assert last["val_loss"] < 2.5 and last["shuffled_loss"] > last["val_loss"] + 0.1


@pytest.mark.parametrize("sequences", ["student", "teacher"])
def test_accumulation_equals_a_larger_batch(sequences, run):
    fixed = ["--top=8"] * (sequences == "teacher") + [f"--sequences={sequences}", "--max_iters=6"]
    for name, words in (("a", ["--batch_size=4"]), ("b", ["--batch_size=2", "--grad_accum=2"])):
        status, _, err = run(*fixed, *words, f"--out={name}")
        assert status == 0, err
    for x, y in zip(steps("a"), steps("b")):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4) and x["divergence"] == pytest.approx(y["divergence"], rel=1e-4)


def test_two_processes_equal_one(run, tmp_path, teacher):
    words = ["--sequences=student", "--refresh=2", "--max_iters=4"]
    assert run(*words, "--batch_size=4", "--out=one")[0] == 0
    base = [word for word in TINY if not word.startswith("--tokenizer")] + ["--n_enc=1", "--n_dec=1", f"--data={tmp_path}/rows.jsonl", "--eval_interval=100", "--lr=1e-2"]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", os.path.join(ROOT, "distill.py"), *base, f"--teacher={teacher}",
                           *words, "--batch_size=2", "--out=two", "--threads=1"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    for x, y in zip(steps("one"), steps("two")):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4) and x["divergence"] == pytest.approx(y["divergence"], rel=1e-4)


def test_resumes_exactly_between_two_rounds_of_writing(run, monkeypatch):
    words = ["--sequences=student", "--refresh=4", "--max_iters=11", "--batch_size=40"]  # eight steps an epoch: a round reaches into the next
    run(*words, "--out=whole")
    real, calls = Distillation.loss_of, []

    def interrupts(self, *args):
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), 15)
        return real(self, *args)
    monkeypatch.setattr(Distillation, "loss_of", interrupts)
    assert run(*words, "--out=cut")[0] == 143
    monkeypatch.setattr(Distillation, "loss_of", real)
    assert len(steps("cut")) == 7
    status, _, err = run("--init_from=resume", "--out=cut", base=[], teacher=None)
    assert status == 0, err
    a, b = (Transformer.load(name, "model.safetensors").state_dict() for name in ("whole", "cut"))
    assert all((a[name] == b[name]).all() for name in a)


def test_going_on_with_a_student_and_scoring_it(run, monkeypatch, capsys):
    import bench
    import sample
    assert run("--alpha=0", "--out=first")[0] == 0
    status, _, err = run("--student=first", "--out=second", base=[f"--data={rows_file('.')}", "--max_iters=2", "--eval_rows=8", "--compile=false", "--device=cpu", "--dtype=float32"])
    assert status == 0, err
    first, second = (Transformer.load(name) for name in ("first", "second"))
    assert first.num_params() == second.num_params() and second.config.n_embd == 32 and second.config.src_len == 512
    status, out, err = call(bench.main, ["quality", "--run=second"], monkeypatch, capsys)
    assert status == 0, err
    assert call(sample.main, ["--run=second", "--prompt=abc"], monkeypatch, capsys)[0] == 0
    status, _, err = call(train.main, ["--init_from=resume", "--out=second"], monkeypatch, capsys)
    assert status == 2 and "resume it with the script that began it" in one_line(err)


# --- what is kept on disk

def test_kept_answers_are_found_again_and_only_for_their_teacher(run, monkeypatch):
    monkeypatch.setattr(Kept, "PART", 64)
    words = ["--sequences=teacher", "--kept=k", "--top=517"]  # all but one of the 517 ids: the whole distribution
    assert run(*words, "--out=a")[0] == 0
    parts = sorted(name for name in os.listdir("k") if name.endswith(".npz"))
    assert len(parts) == 5
    os.remove("k/" + parts[2])  # as if it had been cut off
    times = {name: os.path.getmtime(f"k/{name}") for name in parts if os.path.exists(f"k/{name}")}
    status, _, err = run(*words, "--out=b")
    assert status == 0 and "made 1 parts" in err and all(os.path.getmtime(f"k/{name}") == times[name] for name in times)
    assert [row["loss"] for row in steps("a")] == [row["loss"] for row in steps("b")]
    for other in (["--tau=2"], ["--temperature=0.5"], ["--tgt_len=12"]):
        status, _, err = run(*words, *other, "--out=c")
        assert status == 2 and "--kept=k is of another" in one_line(err)
    assert not os.path.exists("c")


def test_kept_is_the_same_as_reading_at_every_step(run):
    for name, words in (("live", ["--top=0"]), ("kept", ["--top=516"])):
        status, _, err = run("--sequences=data", "--kl=forward", *words, f"--out={name}")
        assert status == 0, err
    for x, y in zip(steps("live"), steps("kept")):
        assert x["divergence"] == pytest.approx(y["divergence"], rel=2e-3)  # kept in 16 bits


# --- teachers behind hf:

def hf_folder(kind, folder, texts):
    tokenizer = Foreign(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    text = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>")
    if kind == "phi3":
        text.chat_template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}<|assistant|>\n"
    text.save_pretrained(folder)
    shape = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
                 bos_token_id=0, eos_token_id=1, pad_token_id=1)  # a padded embedding: more rows than the tokenizer has ids
    torch.manual_seed(0)
    model = dict(phi3=lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**shape)), llama=lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)),
                 qwen=lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape)))[kind]()
    with torch.no_grad():
        model.lm_head.weight *= 20  # or its logits could not grow
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["phi3", "llama", "qwen"])
def test_foreign_teachers(kind, tmp_path, run):
    folder = hf_folder(kind, tmp_path / kind, LETTERS)
    for sequences in ("student", "teacher") if kind == "phi3" else ("student",):
        status, _, err = run(f"--sequences={sequences}", f"--teacher=hf:{folder}", f"--out={sequences}", teacher=None)
        assert status == 0, err
    assert ("<|assistant|>" in err) == (kind == "phi3")
    mine, theirs = load_tokenizer("student"), transformers.AutoTokenizer.from_pretrained(folder)
    assert mine.encode("abc dcba") == theirs("abc dcba", add_special_tokens=False)["input_ids"]
    assert mine.eos == theirs.eos_token_id and mine.sep >= len(theirs)
    assert Transformer.load("student").config.vocab_size == len(theirs) + 261


def test_finetuning_a_foreign_teacher(tmp_path, run):
    folder = hf_folder("phi3", tmp_path / "phi3", LETTERS)
    base = [f"--data={tmp_path}/rows.jsonl", f"--teacher=hf:{folder}", "--finetune_teacher", "--out=tuned", "--lr=1e-2", "--batch_size=16", "--src_len=32", "--tgt_len=16",
            "--eval_rows=8", "--device=cpu", "--dtype=float32", "--warmup_iters=2"]
    status, _, err = run("--max_iters=30", base=base, teacher=None)
    assert status == 0 and "--teacher=hf:tuned" in err, err
    log = steps("tuned")
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir("tuned"))
    world = World(SimpleNamespace(threads=0, device="cpu", dtype="float32", max_minutes=0, max_iters=1, compile="false"))
    raw, tuned = ForeignTeacher(folder, None, world), ForeignTeacher("tuned", None, world)
    prompts = raw.prompts(["abc", "d"], SimpleNamespace(sources=[[1] * 4, [1] * 2], room=30))
    assert raw.identity != tuned.identity
    answers = [raw.tokenizer.encode("ABC") + [1], raw.tokenizer.encode("D") + [1]]
    ids = torch.tensor([id for answer in answers for id in answer])
    before, after = (torch.nn.functional.cross_entropy(t.head(t.read(prompts, answers)), ids).item() for t in (raw, tuned))
    assert after < before - 0.5  # the merged adapter knows the task
    assert run("--init_from=resume", "--out=tuned", "--max_iters=32", base=[], teacher=None)[0] == 0 and len(steps("tuned")) == 32
    assert run("--teacher=hf:tuned", "--out=student", teacher=None)[0] == 0


def test_the_prompt_is_what_the_template_says(tmp_path):
    folder = hf_folder("llama", tmp_path / "llama", LETTERS)
    world = World(SimpleNamespace(threads=0, device="cpu", dtype="float32", max_minutes=0, max_iters=1, compile="false"))
    teacher = ForeignTeacher(folder, "Q: {source}\nA:", world)
    pairs = Pairs([dict(source="ab" * 30, target="x"), dict(source="dd", target="x")], teacher.tokenizer, 8, 8, False)
    long, short = (teacher.tokenizer.decode(ids) for ids in teacher.prompts(["ab" * 30, "dd"], pairs))
    assert short == "Q: dd\nA:" and long == f"Q: {teacher.tokenizer.decode(pairs.sources[0][:-1])}\nA:" and len(long) < 40


def test_one_and_the_same_answer_padded_or_alone(tmp_path):
    """A foreign teacher's logits, by its own call on one row at a time."""
    folder = hf_folder("qwen", tmp_path / "qwen", LETTERS)
    world = World(SimpleNamespace(threads=0, device="cpu", dtype="float32", max_minutes=0, max_iters=1, compile="false"))
    teacher = ForeignTeacher(folder, None, world)
    prompts, answers = [np.array(ids) for ids in ([5], [6, 7, 8, 9, 10], [11, 12])], [[20, 21, 22], [23], [24, 25, 26, 27, 28]]
    found = teacher.head(teacher.read(prompts, answers)).split([3, 1, 5])
    for prompt, answer, logits in zip(prompts, answers, found):
        whole = teacher.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1:-1, :teacher.n_ids]
        assert torch.allclose(logits, whole, atol=1e-5) and logits.shape == (len(answer), len(teacher.text))


# --- bad input

@pytest.mark.parametrize("words, says", [
    (["--alpha=1.5"], "--alpha=1.5 must be from 0 to 1"), (["--alpha=nan"], "--alpha=nan"), (["--tau=0"], "--tau=0.0 must be above 0"), (["--tau=-1"], "--tau"), (["--mix=2"], "--mix"),
    (["--kl=jsd", "--beta=0"], "--beta"), (["--refresh=0"], "--refresh"), (["--sequences=teacher", "--top=0"], "--top"), (["--template=x"], "{source}"),
    (["--student=nowhere"], "nowhere"), (["--teacher=nowhere"], "nowhere"), (["--teacher=hf:./nowhere"], "no such folder"), (["--objective=span"], "unknown key --objective"),
    (["--finetune_teacher"], "hf: teachers"), (["--template={source}"], "--template would change nothing"), (["--sequences=data", "--mix=0.5"], "--mix would"), (["--beta=0.3"], "--beta would"),
    (["--student=nanoo"], "nano, mini"), (["--plan", "--alpha=0", "--teacher="], "--teacher is missing"), (["--tokenizer=gpt3"], "gpt3"), (["--temperature=-1"], "--temperature")])
def test_bad_input_is_one_line_and_leaves_nothing(words, says, run):
    status, _, err = run(*words, "--out=bad")
    assert status == 2 and says in one_line(err), err
    assert not os.path.exists("bad")


def test_bad_teachers(run, tmp_path, monkeypatch, capsys, teacher):
    def error(name, **more):
        status, _, err = run(f"--teacher={name}", "--out=bad", teacher=None, **more)
        assert status == 2 and not os.path.exists("bad"), err
        return one_line(err)
    assert run("--alpha=0", "--out=student")[0] == 0
    assert "is an encoder-decoder" in error("student")
    assert "rows.jsonl/config.json" in error("rows.jsonl")
    status, _, _ = call(train.main, [*TINY_DEC, f"--data={os.path.join(ROOT, 'README.md')}", "--max_iters=1", "--out=text"], monkeypatch, capsys)
    assert status == 0 and "was not trained on a task" in error("text")
    folder = hf_folder("llama", tmp_path / "llama", LETTERS)
    assert "other ids than the student" in error(f"hf:{folder}", base=[f"--data={tmp_path}/rows.jsonl", "--student=student", "--max_iters=2"])
    os.remove(f"{folder}/model.safetensors")
    assert "cannot be loaded" in error(f"hf:{folder}")
    hf_folder("llama", tmp_path / "two", LETTERS)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        os.remove(tmp_path / "two" / name)
    assert f"hf:{tmp_path}/two" in error(f"hf:{tmp_path}/two")
    transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(tmp_path / "t5")
    assert "is an encoder-decoder" in error(f"hf:{tmp_path}/t5")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "nanoencdec[teacher]" in error(f"hf:{folder}")
    assert "--teacher=hf:" in error(folder)


def test_a_teacher_that_has_changed_cannot_be_resumed_with(run, teacher, tmp_path):
    import shutil
    shutil.copytree(teacher, "t")
    assert run("--teacher=t", "--out=s", teacher=None)[0] == 0
    model = Transformer.load("t")
    model.save("t", "best.safetensors")
    with torch.no_grad():
        model.embed.weight[0] += 1
    model.save("t", "best.safetensors")
    status, _, err = run("--init_from=resume", "--out=s", "--max_iters=6", base=[], teacher=None)
    assert status == 2 and "the data or the teacher has changed" in one_line(err)


@pytest.mark.parametrize("answers", [None, []])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_a_pass_without_rows(answers, alpha):
    """A batch may have fewer rows than there are passes or processes: then one of them has filler alone."""
    model = some_model(n_enc=1, src_len=40, tgt_len=40)
    job, batch = some_job(model, own(some_model(seed=2)), alpha=alpha)
    batch.references[3][:] = False
    loss, n, log = job.loss_of(model, batch._replace(rows=np.array([], dtype=int), answers=answers))
    loss.backward()
    assert loss.item() == 0 and n == 0 and log["divergence"] == (0.0, 0)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_student_that_has_nothing_to_say(run, monkeypatch):
    monkeypatch.setattr(distill, "written", lambda model, prompts, *_: [[model.config.eos_id]] * len(prompts))
    status, _, err = run("--alpha=1", "--out=mute", "--max_iters=2")
    assert status == 0 and " answers were empty and skipped" in err, err
    assert all(row["divergence"] == 0 for row in steps("mute"))


def test_a_student_pretrained_for_a_foreign_teacher(tmp_path, run, monkeypatch, capsys):
    """train.py takes the tokenizer.json as it is; transformers writes it in its own way; the ids are the same."""
    folder = hf_folder("qwen", tmp_path / "qwen", LETTERS)
    base = [word for word in [*TINY, "--arch=encdec", "--n_enc=1", "--n_dec=1"] if not word.startswith("--tokenizer")]
    status, _, err = call(train.main, [*base, f"--tokenizer={folder}/tokenizer.json", f"--data={ROOT}/README.md", "--max_iters=1", "--out=pre"], monkeypatch, capsys)
    assert status == 0, err
    status, _, err = run("--student=pre", f"--teacher=hf:{folder}", "--out=s", base=[f"--data={tmp_path}/rows.jsonl", "--max_iters=2", "--eval_rows=8", "--compile=false"], teacher=None)
    assert status == 0, err


def test_plan(tmp_path, run):
    folder = hf_folder("phi3", tmp_path / "phi3", LETTERS)
    os.remove(f"{folder}/model.safetensors")
    status, out, err = run("--plan", f"--teacher=hf:{folder}", "--out=none", teacher=None)
    parts = [float(line.split()[0]) for line in out.strip().splitlines()]
    assert status == 0 and len(parts) == 7 and abs(sum(parts[:-1]) - parts[-1]) < 0.05 and not os.path.exists("none"), err


@pytest.mark.slow
@pytest.mark.parametrize("sequences", ["student", "teacher", "data"])
def test_compiled(sequences, run):
    for name in ("true", "false"):
        assert run(f"--sequences={sequences}", f"--compile={name}", f"--out={name}")[0] == 0
    for x, y in zip(steps("true"), steps("false")):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-3)
