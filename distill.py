"""Distills a decoder-only teacher of any size into a small encoder-decoder student, on a task.

    python distill.py --teacher=RUN --data=docstring       RUN: of train.py --arch=dec, on that task
    python distill.py --teacher=hf:FOLDER_OR_ID --data=squad --student=330m
    python distill.py --teacher=hf:FOLDER_OR_ID --data=squad --finetune_teacher --out=out/tuned

The paper's section 3.2 and Algorithm 1, after GKD (Agarwal et al., 2024). The task gives a source x
and a reference y*. The divergence is taken on an answer y: one that the student has just written
itself (--sequences=student, on-policy), one that the teacher wrote before training, or y* (data).
At each token of y, both models say what they expect there, each given x and what is before it in y:

    teacher, hf:    pad^n x y pad^m          answers begin in one column, behind the longest prompt
    teacher, ours   bos x sep y pad^m
    student         x pad^n | bos y pad^m    decoder-only: bos x sep y pad^m

What predicts the first token of y stands one place before it: in the student's decoder that is
bos, in a teacher the last token of its prompt. Logits of real tokens, row after row, are (N, V) for
both: that is the alignment.

    loss = alpha tau^2 D(student, teacher) on y  +  (1 - alpha) cross-entropy on y*

Each is a mean over the targets of the whole step. D is KL(student || teacher), reverse, or
KL(teacher || student), forward, of distributions that the temperature tau softens. --alpha=0 is
cross-entropy alone; with --sequences=teacher on the teacher's answers, in the place of y*.

`diff train.py distill.py` shows, from `def main` on, what distillation adds. --finetune_teacher
trains a LoRA adapter of an hf: teacher and nothing else; its folder is a teacher, too.
"""

import hashlib
import math
import os
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import data.corpus
import train
from data.objectives import count_tokens, make_batch
from data.sets import evenly, open_data
from data.tokenizer import load_tokenizer
from lib.device import catch_signals, compile_parts, in_chunks, start, to_device
from lib.runs import Log, new_run, read_run, restore, save_best, save_checkpoint, write_json
from lib.settings import UserError, given, read_json, read_settings, script, setting
from lib.weights import weight_files
from model import PRESETS, Transformer, read_config, shift_right
from train import TIMED, evaluate, lr_share, make_model, make_optimizers, steps_that_fit


@dataclass
class Settings:
    teacher: str = setting("", "a decoder-only run on the task, or hf:FOLDER_OR_ID")
    student: str = setting(None, "a preset or a run to go on with [--preset]")
    alpha: float = setting(0.5, "share of the divergence in the loss", high=1)
    tau: float = setting(1.0, "temperature that softens both distributions", low=1e-3, high=1e3)
    kl: str = setting("reverse", "KL(student || teacher), or the other way", ("reverse", "forward"))
    sequences: str = setting("student", "who answers", ("student", "teacher", "data"))
    template: str = setting(None, "hf: prompt, with {source} [its chat template, if it has one]")
    finetune_teacher: bool = setting(False, "hf: only train a LoRA adapter of the teacher")
    arch: str = setting("encdec", "or decoder-only: causal, prefix LM", ("encdec", "dec", "prefix"))
    preset: str = setting("nano", "of a new student, with --arch and --split", tuple(PRESETS))
    split: str = setting("2/3", "the encoder's share of the layers", ("1/3", "1/2", "2/3"))
    cross_rope: bool = setting(None, "RoPE in cross-attention [on]")
    objective: str = setting("seq2seq", "a task, always", ("seq2seq",))
    data: str = setting("docstring", "a task, a path, a Hub id; see data/tasks.py")
    source_col: str = setting(None, "column of the source [the task's, or source]")
    target_col: str = setting(None, "column of the target [the task's, or target]")
    src_len: int = setting(None, "source tokens a row [the preset's]", high=2**20)
    tgt_len: int = setting(None, "target tokens a row", low=1, high=2**20)
    init_from: str = setting("scratch", "resume: the run in --out; a run: as --student")
    out: str = setting(None, "run folder [a new one in out/]")
    max_iters: int = setting(None, "optimizer steps [as fit into --max_minutes]", low=1)
    max_minutes: float = setting(None, "training time, 41 steps or more [the preset's]", low=1e-3)
    batch_size: int = setting(None, "rows a forward pass", low=1, high=2**16)
    grad_accum: int = setting(1, "forward passes a step, on each device", low=1, high=2**16)
    optimizer: str = setting("muon", "of the matrices; the rest has AdamW", ("muon", "adamw"))
    lr: float = setting(None, "peak learning rate of the matrices", high=100)
    embed_lr: float = setting(None, "of embeddings, gains and biases", high=100)
    weight_decay: float = setting(0.1, "of the matrices, times the learning rate", high=100)
    warmup_iters: int = setting(None, "steps of linear warm-up, at most a tenth")
    schedule: str = setting(None, "after it, down to zero", ("cosine", "linear"))
    dropout: float = setting(0.0, "of what each part of a block adds", high=0.99)
    word_dropout: float = setting(0.0, "share of the tokens hidden in training", high=0.99)
    label_smoothing: float = setting(0.0, "share of a target that all words get", high=0.99)
    eval_interval: int = setting(None, "steps [an eighth of the run]", low=1)
    eval_rows: int = setting(256, "held-out rows an evaluation; 0 is all", high=2**20)
    seed: int = setting(1337, "of weights, rows and the student's answers")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = setting("auto", "of matrix products", ("auto", "float32", "bfloat16", "float16"))
    compile: str = setting("auto", "torch.compile", ("auto", "true", "false"))
    threads: int = setting(0, "CPU threads; 0 is torch's choice", high=4096)
    deterministic: bool = setting(False, "CUDA: the same bits again, but slower; a CPU gives them")
    # Not keys: told by the preset, --split or the teacher.
    checkpoint_blocks, vocab_size, n_enc, n_dec, tokenizer = None, None, None, None, "bpe"


def resolve(cfg):
    """Fills in what the student decides, and refuses what cannot work."""
    if cfg.init_from == "resume":
        return train.resolve(cfg)
    if not cfg.teacher:
        raise UserError("--teacher is missing: a run of train.py --arch=dec, or hf:FOLDER_OR_ID")
    if cfg.finetune_teacher and not (cfg.teacher.startswith("hf:") and cfg.max_iters):
        raise UserError("--finetune_teacher is for hf: teachers and needs --max_iters")
    if "{source}" not in (cfg.template or "{source}"):
        raise UserError(f"--template={cfg.template} must hold {{source}}")
    cfg.lr = cfg.lr or (2e-4 if cfg.finetune_teacher else None)
    setattr(cfg, "preset" if cfg.student in PRESETS else "init_from", cfg.student or cfg.init_from)
    return train.resolve(cfg)


# ----------------------------------------------------------------------------------------------
# Divergences


def divergence(student, teacher, kl):
    """Divergence in nats at each position, (N,), of log-probabilities (N, V). `reverse` is
    KL(student || teacher), `forward` is KL(teacher || student)."""
    p, q = (student, teacher) if kl == "reverse" else (teacher, student)
    return (p.exp() * (p - q)).sum(-1)


def states_at(model, sources, *targets):
    """The student's states (B, T, C) that predict each of several targets (B, T); an encoder reads
    the source once, it is the same for all."""
    if not model.config.n_enc:
        return [model.states(*pair) for pair in zip(sources, targets)]
    src_mask = sources[0] != model.config.pad_id
    encoded, bos = model.encode(sources[0], src_mask), model.config.bos_id
    return [model.decode(shift_right(tgt, bos), encoded, src_mask) for tgt in targets]


def both_losses(model, references, answered, teacher_logits, cfg):
    """Sums of cross-entropy on the references and of the divergence on the answers. Both are
    batches (src, tgt, loss_mask) of the same sources. teacher_logits (N, n_ids) of the answers' N
    targets; None: there is no divergence."""

    def cross_entropy(states, targets):
        logits, share = model.logits(states).float(), model.label_smoothing
        return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=share)

    def softened(states, teacher_logits):  # over the ids that both models have
        student_logits = model.logits(states)[:, : teacher_logits.size(1)]
        both = (x.float() / cfg.tau for x in (student_logits, teacher_logits))
        return divergence(*(x.log_softmax(-1) for x in both), cfg.kl).sum()

    # A mask as an index would make a GPU wait: it does not know how many rows come out.
    batches = [(src, tgt, mask.ravel().nonzero()[0]) for src, tgt, mask in (references, answered)]
    batches = (to_device(batch, model.embed.weight.device) for batch in batches)
    (src, tgt, at), (prompt, said, said_at) = batches
    # Where the answers are the references, one reading of the student serves both losses.
    same, n_words = teacher_logits is None or cfg.sequences == "data", 2 * model.config.vocab_size
    states = states_at(model, (src, prompt), *([tgt] if same else [tgt, said]))
    ce = in_chunks(cross_entropy, n_words, states[0].flatten(0, 1)[at], tgt.flatten()[at])
    if teacher_logits is None:
        return ce, torch.zeros_like(ce)
    return ce, in_chunks(softened, n_words, states[-1].flatten(0, 1)[said_at], teacher_logits)


# ----------------------------------------------------------------------------------------------
# Teachers. Each has: tokenizer, and the folder of it; n_ids, how many ids it knows; identity; and
#   prompts(pairs)             what it reads before an answer, for every row: lists of ids
#   read(prompts, answers)     its logits (N, n_ids) at each of the N tokens of the answers
#   write(prompts, n, seed)    answers of at most n tokens


class OwnTeacher:
    """A decoder-only run on the task."""

    def __init__(self, cfg, world):
        self.folder = folder = cfg.teacher
        if read_config(folder).n_enc or read_run(folder)["settings"]["objective"] != "seq2seq":
            raise UserError(f"--teacher={folder} is no run of train.py --arch=dec --data=TASK")
        model = Transformer.load(folder, device=world.device, dtype=world.dtype)
        self.model = world.place(model).eval().requires_grad_(False)
        self.tokenizer, self.identity = load_tokenizer(f"{folder}/"), identity(self.model)
        self.n_ids = min(model.config.vocab_size, self.tokenizer.vocab_size)

    def prompts(self, pairs):
        return [[*source.tolist(), self.tokenizer.sep] for source in pairs.sources]

    def read(self, prompts, answers):
        x, y, answer = make_batch([p[:-1] for p in prompts], answers, self.tokenizer, "prefix")
        batch = x, y, answer.ravel().nonzero()[0]
        prompt, ids, at = to_device(batch, self.model.embed.weight.device)
        states = self.model.states(prompt, ids).flatten(0, 1)[at]
        return self.model.logits(states)[:, : self.n_ids]

    def write(self, prompts, n, seed):
        return drawn(self.model, prompts, n, seed, self.n_ids)


def check_teacher(folder):
    """UserError for a local folder with which `transformers` would go elsewhere, or never end."""
    path = os.path.join(folder, "config.json")
    if os.path.exists(path):  # an adapter has none
        weight_files(folder)
        layers = [x for key, x in read_json(path).items() if "layer" in key and type(x) is int]
        if max([0, *layers]) > 999:
            raise UserError(f"{path} tells of thousands of layers")


class ForeignTeacher:
    """A causal language model that `transformers` loads, or a LoRA adapter of one."""

    def __init__(self, cfg, world):
        name = cfg.teacher.removeprefix("hf:")
        try:
            import transformers

            check_teacher(name)
            load = transformers.AutoModelForCausalLM.from_pretrained
            model = load(name, dtype=world.dtype, use_safetensors=True).to(world.device)
            self.model = model.eval().requires_grad_(False)
            if cfg.finetune_teacher:
                import peft

                model.gradient_checkpointing_enable(dict(use_reentrant=False))
                # As the paper's released code has it; Hu et al., 2021.
                about = dict(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
                self.model = peft.get_peft_model(model, peft.LoraConfig(**about))
            self.text = transformers.AutoTokenizer.from_pretrained(name)
            self.folder = os.path.dirname(transformers.utils.cached_file(name, "tokenizer.json"))
        except Exception as error:  # the libraries raise many kinds
            why = f"{str(error)[:200]}; it takes safetensors and pip install 'nanoencdec[teacher]'"
            raise UserError(f"--teacher={cfg.teacher} cannot be used: {why}") from None
        self.model.generation_config = transformers.GenerationConfig()  # no penalties
        self.tokenizer = load_tokenizer(self.folder)
        self.n_ids = self.tokenizer.n_text  # its embedding may have more rows, which mean nothing
        if self.tokenizer.eos >= self.n_ids:
            raise UserError(f"--teacher=hf:{name} has a tokenizer without an end of sequence")
        self.template = cfg.template or ("" if self.text.chat_template else "{source}\n")
        self.identity = identity(self.model, self.template)

    def prompts(self, pairs):
        """What is longer than the student reads is cut at the same place."""
        texts = [self.tokenizer.decode(source[:-1].tolist()) for source in pairs.sources]
        if self.template:
            filled = [self.template.replace("{source}", text) for text in texts]
        else:  # its own chat template, which writes begin-of-sequence itself
            chats, kind = [[dict(role="user", content=t)] for t in texts], dict(tokenize=False)
            filled = self.text.apply_chat_template(chats, add_generation_prompt=True, **kind)
        found = self.text(filled, add_special_tokens=bool(self.template))["input_ids"]
        return [ids[:-1] if ids[-1:] == [self.tokenizer.eos] else ids for ids in found]

    def read(self, prompts, answers):
        (x, real_x), (y, real_y) = self.padded(prompts, "left"), self.padded(answers, "right")
        ids, real, T = torch.cat((x, y), 1), torch.cat((real_x, real_y), 1), y.size(1)
        places = dict(attention_mask=real.long(), position_ids=(real.cumsum(1) - 1).clamp(min=0))
        found = self.model(input_ids=ids, **places, use_cache=False, logits_to_keep=T + 1)
        return found.logits[:, :-1][real_y][:, : self.n_ids]  # of (B, T, V), where answers are

    def write(self, prompts, n, seed):
        torch.manual_seed(seed)
        (ids, real), eos = self.padded(prompts, "left"), self.tokenizer.eos
        more = dict(do_sample=True, top_k=0, max_new_tokens=n, pad_token_id=eos, eos_token_id=eos)
        rows = self.model.generate(input_ids=ids, attention_mask=real.long(), **more)
        return [ended(row, self.n_ids, eos) for row in rows[:, ids.size(1) :].tolist()]

    def padded(self, rows, side):
        """Lists of ids -> ids (B, T) and a mask, True at real ones."""
        ids = pad_sequence([torch.tensor(row) for row in rows], True, -1, side)
        return ids.clamp(min=0).to(self.model.device), (ids >= 0).to(self.model.device)

    def save(self, folder, weights, **metadata):
        """As lib.runs.save_best calls it: the adapter that `finetune` trains."""
        self.model.save_pretrained(folder)
        self.text.save_pretrained(folder)


def identity(model, more=""):
    """A digest of some of a model's numbers, which tells it from others."""
    some = [p.flatten()[::4099].bfloat16().tolist() for p in model.parameters()]
    return hashlib.sha256(repr((some, more)).encode()).hexdigest()[:12]


# ----------------------------------------------------------------------------------------------
# Answers, drawn at temperature 1


def ended(ids, n_ids, eos):
    """An answer up to its end: end-of-sequence, or an id that the teacher does not know."""
    end = next((t for t, id in enumerate(ids) if id == eos or id >= n_ids), len(ids))
    return ids[:end] + [eos] * (end < len(ids))


def drawn(model, prompts, n, seed, n_ids):
    """Answers of a Transformer, one batch with the KV cache: lists of at most n ids."""
    steps, eos = list(model.generate(prompts, n, 1.0, seed=seed)), model.config.eos_id
    answers = [[new[b] for new in steps if new[b] is not None] for b in range(len(prompts))]
    return [ended(ids + [eos] * (len(ids) < n), n_ids, eos) for ids in answers]


def student_answers(model, train_set, rows, step, n_ids, seed):
    """{row: ids} that the student answers to these rows now: a function of seed, step, row and
    weights."""
    pairs = train_set.pairs
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # lengths differ from step to step
        prompts = [pairs.prompt(row) for row in rows]
        seeds = [((seed * 1_000_003 + step) * 1_000_003 + int(row)) % 2**63 for row in rows]
        answers = drawn(model, prompts, pairs.tgt_len, seeds, n_ids)
    model.train()
    return dict(zip(rows, answers))


def teacher_answers(teacher, prompts, train_set, cfg, world):
    """The teacher's answers to all rows, lists of ids, written once. The cache keeps them in parts,
    so that a run which is stopped here goes on where it was."""
    name = f"answers-{train_set.hash}-{cfg.arch}-{cfg.src_len}-{cfg.tgt_len}-{world.dtype}"
    folder = os.path.join(data.corpus.CACHE, name)
    os.makedirs(folder, exist_ok=True)
    paths = {i: os.path.join(folder, f"{i:07d}.json") for i in range(0, len(prompts), 64)}
    missing = world.agree([i for i, path in paths.items() if not os.path.exists(path)])
    for i in world.progress(missing[world.rank :: world.size], "the teacher writes"):
        write_json(paths[i], teacher.write(prompts[i : i + 64], cfg.tgt_len, i))
    world.agree(None)  # all are there
    return [ids for path in paths.values() for ids in read_json(path, list)]


# ----------------------------------------------------------------------------------------------
# A teacher that learns the task first


def answers_loss(teacher, pairs, prompts, rows, world):
    """Cross-entropy, in nats, summed over the targets of these rows, and how many those are."""
    targets = [pairs.targets[row].tolist() for row in rows]
    with world.autocast():
        logits = teacher.read([prompts[row] for row in rows], targets).float()
    ids = torch.tensor([id for target in targets for id in target], device=world.device)
    return F.cross_entropy(logits, ids, reduction="sum"), len(ids)


def finetune(cfg, world, teacher, train_set, valid_set):
    """Trains the adapter of an hf: teacher, and keeps the last one. A run that was stopped cannot
    go on: it begins again in a new folder."""
    model = teacher.model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, cfg.lr, betas=(0.9, 0.95), weight_decay=0.0)
    cfg.out = new_run(f"teacher-{train_set.name}", cfg, world, train_set, valid_set)
    train_rows, held_out = ((s.pairs, teacher.prompts(s.pairs)) for s in (train_set, valid_set))
    own_rows = evenly(len(held_out[1]), cfg.eval_rows)[world.rank :: world.size]
    log, begin, tokens = Log(cfg.out, 0, world), time.perf_counter(), 0
    interval = cfg.eval_interval or math.ceil(cfg.max_iters / 8)
    world.say(f"LoRA: {sum(p.numel() for p in params):,} parameters; {world.describe()}")
    for step in world.progress(range(cfg.max_iters), unit="step"):
        # One step.
        optimizer.param_groups[0]["lr"] = cfg.lr * lr_share(step, cfg)
        torch.manual_seed((cfg.seed * 1_000_003 + step) * world.size + world.rank)
        loss_sum, targets = 0.0, 0
        for micro in range(cfg.grad_accum):
            rows, real = train_set.share(step, world.rows(micro, cfg.batch_size))
            loss, n = answers_loss(teacher, *train_rows, rows[: max(1, real)], world)
            loss, n = loss * (real > 0), n * (real > 0)  # without a real row, nothing counts
            loss.backward()
            loss_sum, targets = loss_sum + loss.item(), targets + n
        loss_sum, targets = world.sum(loss_sum, targets)
        world.sum_gradients(params)
        torch._foreach_div_([p.grad for p in params], targets)
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0).item()
        if world.usable(loss_sum / targets, norm, step, cfg):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += int(targets)
        about = dict(time_s=time.perf_counter() - begin, tokens=tokens)
        log.add(dict(step=step, **about, loss=loss_sum / targets))

        # Evaluation, and the adapter.
        if (step + 1) % interval == 0 or step + 1 == cfg.max_iters:
            model.eval()
            with torch.no_grad():
                found = [answers_loss(teacher, *held_out, [row], world) for row in own_rows]
            nll, n = world.sum(sum(loss.item() for loss, _ in found), sum(n for _, n in found))
            model.train()
            world.say(f"step {step + 1}: val_loss {nll / n:.4f}")
            log.add(dict(step=step + 1, **about, val_loss=nll / n))
            save_best(cfg.out, teacher, step + 1, world)
    world.say(f"distill it: python distill.py --teacher=hf:{cfg.out} --data={cfg.data}")
    world.stop()


# ----------------------------------------------------------------------------------------------


def main():
    cfg = resolve(read_settings(Settings, __doc__))
    world = start(cfg)

    # Teacher, data, model, optimizers, run folder.
    rows_a_step = cfg.batch_size * cfg.grad_accum * world.size
    teacher = (ForeignTeacher if cfg.teacher.startswith("hf:") else OwnTeacher)(cfg, world)
    folders = dict(scratch=teacher.folder, resume=cfg.out)
    cfg.tokenizer = f"{folders.get(cfg.init_from, cfg.init_from)}/"
    train_set, valid_set = open_data(cfg, world.say, rows_a_step)
    pairs = train_set.pairs
    own, theirs = train_set.tokenizer, teacher.tokenizer
    if (own.ranks, own.eos) != (theirs.ranks, theirs.eos):
        message = f"--teacher={cfg.teacher} has another vocabulary than the student: train it with"
        raise UserError(f"{message} --tokenizer={teacher.folder}")
    if cfg.finetune_teacher:
        return finetune(cfg, world, teacher, train_set, valid_set)
    train_set.hash += "-" + teacher.identity  # neither may change before a run is resumed
    prompts, answers = teacher.prompts(pairs), pairs.targets
    if cfg.sequences == "teacher":
        answers = teacher_answers(teacher, prompts, train_set, cfg, world)
        if cfg.alpha == 0:  # cross-entropy on what the teacher wrote (Kim and Rush, 2016)
            pairs.targets = answers
    torch.manual_seed(cfg.seed)
    model = world.place(make_model(cfg, train_set.tokenizer))
    optimizers = make_optimizers(model, cfg, world)
    params = [p for p in model.parameters() if p.requires_grad]
    state = dict(step=0, time_s=0.0, tokens=0, max_iters=cfg.max_iters, best=None, last=None)
    if cfg.init_from == "resume":
        state |= restore(cfg.out, model, optimizers, train_set, valid_set, world)
        cfg.max_iters = cfg.max_iters if "max_iters" in given() else state["max_iters"]
    else:
        name = f"distilled-{cfg.arch}-{cfg.preset}-{os.path.basename(cfg.data.rstrip('/'))}"
        cfg.out = new_run(name, cfg, world, train_set, valid_set)
    pad, metric = train_set.tokenizer.pad, train_set.metric  # metric: chooses the best checkpoint
    if world.compile:
        rows = world.rows(0, cfg.batch_size)
        compile_parts(model, [train_set.batch(step, rows) for step in range(16)], world)
    log = Log(cfg.out, state["step"], world)
    world.say(f"{model.num_params():,} parameters; {rows_a_step} rows a step; {world.describe()}")
    world.say(f"the teacher reads {teacher.tokenizer.show(prompts[0])[-160:]!r}")

    stop, seconds, step = catch_signals(), [], state["step"]
    bar = world.progress(total=cfg.max_iters, initial=step, unit="step")
    while True:
        # Evaluation and checkpoint.
        last = step >= (cfg.max_iters or math.inf)
        stopping = world.sum(len(stop))[0] > 0
        interval = cfg.eval_interval or math.ceil((cfg.max_iters or 1e9) / 8)
        if (last or step % interval == 0) and not stopping and state["last"] != step:
            # Held-out shapes would be compiled one by one.
            with torch.compiler.set_stance("force_eager"):
                metrics = evaluate(model, valid_set, cfg, world, step)
            shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            world.say(f"step {step}: {shown}")
            log.add(dict(step=step, time_s=state["time_s"], tokens=state["tokens"], **metrics))
            log.plot(metric)
            if metric in metrics and train.is_better(metrics, state["best"], metric):
                state["best"] = dict(metrics, step=step)
                save_best(cfg.out, model, step, world)
            state |= dict(last=step, metrics=metrics)
        if last or stopping or state["last"] == step:
            state |= dict(step=step, max_iters=cfg.max_iters)
            save_checkpoint(cfg.out, model, optimizers, state, world)
        if last or stopping:
            break

        # Whose answers: the student's are written here, with the weights of this moment.
        begin, share = time.perf_counter(), lr_share(step, cfg)
        micros = [world.rows(micro, cfg.batch_size) for micro in range(cfg.grad_accum)]
        shares = [train_set.share(step, numbers) for numbers in micros]
        if cfg.sequences == "student" and cfg.alpha > 0:
            every = [row for rows, _ in shares for row in rows]
            answers = student_answers(model, train_set, every, step, teacher.n_ids, cfg.seed)
        counted = [row for rows, real in shares for row in rows[:real]]
        n, m = (sum(len(texts[row]) for row in counted) for texts in (pairs.targets, answers))
        n, m = map(float, world.sum(n, m))  # targets of the whole step

        # One step: losses are summed over micro-batches and processes, then divided by targets.
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * share
        # Dropout's draws, too, are a function of seed and step.
        torch.manual_seed((cfg.seed * 1_000_003 + step) * world.size + world.rank)
        loss_sum, kd_sum, tokens = 0.0, 0.0, 0
        for numbers, (rows, real) in zip(micros, shares):
            batch = train_set.batch(step, numbers)
            said, teacher_logits = [answers[row] for row in rows], None
            answered = pairs.batch(rows, targets=said)
            answered[2][real:] = False
            if cfg.alpha > 0:  # the teacher reads; its logits of rows that do not count are dropped
                teacher_logits = teacher.read([prompts[r] for r in rows], said)
                teacher_logits = teacher_logits[: sum(map(len, said[:real]))]
            with world.autocast():
                ce, kd = both_losses(model, batch, answered, teacher_logits, cfg)
                loss = (1 - cfg.alpha) * ce / n + cfg.alpha * cfg.tau**2 * kd / m
            (loss * n * world.scale).backward()  # as large as a sum, for float16
            loss_sum, kd_sum = loss_sum + loss.detach(), kd_sum + kd.detach() / m
            tokens += count_tokens(batch, pad)
        world.sum_gradients(params)
        torch._foreach_div_([p.grad for p in params if p.grad is not None], n * world.scale)
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        loss, kd, norm = torch.stack((loss_sum, kd_sum, norm)).tolist()  # a step waits for its GPU
        loss, kd, tokens = map(float, world.sum(loss, kd, tokens))
        if world.usable(loss, norm, step, cfg):
            for optimizer in optimizers:
                optimizer.step()
        model.zero_grad(set_to_none=True)

        # What it took.
        seconds.append(time.perf_counter() - begin)
        row = dict(step=step, time_s=state["time_s"], tokens=state["tokens"], lr=cfg.lr * share)
        log.add(row | dict(loss=loss, kd=kd))
        step += 1
        state["time_s"] += seconds[-1]
        state["tokens"] += int(tokens)
        speed = {"tok/s": f"{tokens / seconds[-1]:.0f}"}
        bar.set_postfix(loss=f"{loss:.3f}", lr=f"{cfg.lr * share:.1e}", refresh=False, **speed)
        bar.update()
        if cfg.max_iters is None and len(seconds) == TIMED[1]:
            fit = steps_that_fit(seconds, step, state["time_s"], cfg)
            cfg.max_iters = bar.total = world.agree(fit)
            world.say(f"{fit} steps fit into {cfg.max_minutes:g} minutes")
    bar.close()
    if stopping:
        world.say(f"step {step} is saved; go on with --init_from=resume --out={cfg.out}")
        return 128 + stop[0] if stop else 143
    best = state["best"] or state["metrics"]
    world.say(
        f"trained {state['time_s']:.0f} s, {state['tokens']:,} tokens; the best: "
        + ", ".join(f"{name} {value:.4g}" for name, value in best.items())
        + f"\nsee {cfg.out}/loss.png, and talk to it: python sample.py --run={cfg.out}"
    )
    world.stop()


if __name__ == "__main__":
    script(main)
