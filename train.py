"""Trains a language model: encoder-decoder or decoder-only, on a laptop or, with torchrun, on many GPUs.

    python train.py --arch=encdec                      five minutes on two cores, on the Python source of this machine
    python train.py --arch=dec                         its decoder-only rival: same size, same budget
    python train.py --data=my.txt --preset=mini        your own text: a file, a folder, or a Hub data set
    python train.py --data=docstring                   a task, source to target: data/tasks.py lists those built in
    python train.py --data=my.jsonl --objective=seq2seq --source_col=question --target_col=answer
    python train.py --init_from=resume --out=out/NAME  goes on where a run stopped
    torchrun --nproc_per_node=8 train.py --preset=330m --data=HuggingFaceFW/fineweb-edu

The file reads top to bottom: settings, Muon, the machine (`World`), the files of a run, the one loop (`run`), what it trains on (`Pretraining`, `Finetuning`: each a `Job`),
and `launch`, which puts them together.
"""
import contextlib
import ctypes
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from typing import ClassVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from lib.settings import UserError, given, parse, script, setting
from data.corpus import prepare
from lib.weights import PREFIXES
from data.metrics import score
from data.objectives import Objective, fill_spans, uniforms
from data.pairs import ByLength, Pairs, train_pair_tokenizer
from lib.runs import Log, free_folder, read_record, record
from data.tasks import evaluation_texts, is_task, load_task
from data.tokenizer import load_tokenizer
from model import PRESETS, Block, Transformer, has_bf16, make_config, read_config, read_metadata


@dataclass
class Settings:
    arch: str = setting("encdec", "encoder-decoder, or decoder-only", ("encdec", "dec"))
    preset: str = setting("nano", "size, and the defaults that were tuned for it", tuple(PRESETS))
    split: str = setting("2/3", "the encoder's share of the layers", ("1/3", "1/2", "2/3"))
    n_enc: int = setting(None, "encoder layers, instead of --split", type=int)
    n_dec: int = setting(None, "decoder layers, instead of --split", type=int)
    n_embd: int = setting(None, "width, instead of the preset's", type=int)
    n_head: int = setting(None, "query heads, instead of the preset's", type=int)
    n_kv_head: int = setting(None, "key-value heads, instead of the preset's", type=int)
    head_dim: int = setting(None, "width of a head, instead of the preset's", type=int)
    n_hidden: int = setting(None, "width of the MLP; by default solved so that all of a preset have one size", type=int)
    cross_rope: bool = setting(None, "RoPE in cross-attention: for answers that follow the order of their source. Default: on for seq2seq, off for "
                               "pretraining, and as the run has it with --init_from", type=bool)
    objective: str = setting(None, "what is learnt; default: seq2seq for a task, else span for encdec, causal for dec",
                             ("span", "prefix", "causal", "ul2", "seq2seq"))
    noise: float = setting(0.15, "span corruption: share of the text that is hidden")
    mean_span: float = setting(3.0, "span corruption: tokens a hidden span has on average")
    data: str = setting("pycode", "pycode, pycode-full, a path (.txt, .jsonl, .csv, .parquet, a folder) or a Hub id. Tasks: docstring, names "
                        "(both also -full), squad, xsum, codexglue, ielts from the Hub or as TASK:PATH, translate:FOLDER")
    source_col: str = setting(None, "seq2seq: column of the source, or the extension of its line-aligned files; default: the task's, or source")
    target_col: str = setting(None, "seq2seq: column of the target; default: the task's, or target")
    skip_bad: bool = setting(False, "seq2seq: leave out rows that cannot be used, and count them, instead of stopping")
    text_col: str = setting("text", "column of the text in .jsonl, .csv, .parquet and Hub data")
    max_tokens: int = setting(0, "stop tokenizing the training text here (a Hub corpus may be far larger); 0 is all of it")
    decontaminate: str = setting(None, "tasks, separated by commas: drop each training document that holds over half of one of their held-out "
                                 "sources or targets, by 8-grams")
    tokenizer: str = setting("bpe", "bpe (trained on the data), gpt2, bytes, or the file or folder of one: a run's, or a Hugging Face model's")
    vocab_size: int = setting(None, "size of the trained vocabulary, special ids included; default: the preset's", type=int)
    src_len: int = setting(None, "source tokens a row; decoder-only rows hold src_len + tgt_len; default: the preset's", type=int)
    tgt_len: int = setting(None, "target tokens a row; default: the preset's", type=int)
    init_from: str = setting("scratch", "scratch, resume (the run in --out), a run folder to start from its weights, or weights of others: "
                             "hf:FOLDER_OR_ID (Llama family) or mu:FILE (the paper's). With --arch=encdec, a decoder-only model becomes an encoder-decoder")
    out: str = setting(None, "run folder; default: a new one in out/")
    max_iters: int = setting(None, "optimizer steps; default: as many as fit into --max_minutes", type=int)
    max_minutes: float = setting(None, "training time; the first steps are timed, then the number of steps is fixed. Compiling "
                                 "and evaluating come on top. Default: the preset's", type=float)
    batch_size: int = setting(None, "rows a forward pass on each device; seq2seq: as many rows of like length as take no more positions than "
                              "this number of the longest ones would. Default: the preset's", type=int)
    grad_accum: int = setting(1, "forward passes a step on each device")
    optimizer: str = setting("muon", "muon (matrices; the rest goes to AdamW), or adamw for everything", ("muon", "adamw"))
    lr: float = setting(None, "peak learning rate of the matrices. Muon's is scaled by match_rms_adamw, 0.2 sqrt(max(rows, columns)), "
                        "so that it is an AdamW-like one; in the `original` convention the same step has a rate 2 to 6 "
                        "times larger. Default: the preset's", type=float)
    embed_lr: float = setting(None, "peak learning rate of embeddings, gains and biases (AdamW); default: the preset's", type=float)
    weight_decay: float = setting(0.1, "of the matrices, decoupled, times the learning rate")
    warmup_iters: int = setting(None, "steps of linear warm-up; default: the preset's", type=int)
    schedule: str = setting(None, "after the warm-up: cosine to zero, or linear to zero; default: the preset's",
                            ("cosine", "linear"))
    dropout: float = setting(0.0, "of what each part of a layer adds; for data sets that are seen many times")
    word_dropout: float = setting(0.0, "share of the tokens, of the source and of the answer so far, that are hidden in training; for the same")
    label_smoothing: float = setting(0.0, "share of each target's probability that goes to all words; for the same. Not in held-out losses")
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0 is off")
    eval_interval: int = setting(None, "steps between evaluations, each with a checkpoint; default: an eighth of the run", type=int)
    eval_rows: int = setting(256, "held-out rows an evaluation, evenly spaced; 0 is all of them (of a text: side by side)")
    patience: int = setting(0, "seq2seq: stop after so many evaluations without a better metric; 0 never does. The best checkpoint is kept anyway")
    seed: int = setting(1337, "of weights and rows")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = setting("auto", "of the matrix products (weights stay float32)", ("auto", "float32", "bfloat16"))
    compile: str = setting("auto", "torch.compile of each kind of layer; auto: on CUDA, and on a CPU with a C++ compiler for runs of minutes", ("auto", "true", "false"))
    threads: int = setting(0, "CPU threads; 0 is torch's own choice")
    own: ClassVar = None  # where run.json has the keys that only another script knows


DEFAULTS = {
    "nano": dict(src_len=256, tgt_len=64, batch_size=16, lr=1e-2, embed_lr=4e-3, warmup_iters=50, schedule="linear", max_minutes=5),
    "mini": dict(src_len=256, tgt_len=64, batch_size=16, lr=8e-3, embed_lr=4e-3, warmup_iters=50, schedule="linear", max_minutes=20),
    "small": dict(src_len=512, tgt_len=128, batch_size=64, lr=5e-3, embed_lr=3e-3, warmup_iters=100, schedule="linear", max_minutes=10),
} | {size: dict(src_len=1024, tgt_len=256, batch_size=32, lr=3e-4, embed_lr=3e-4, warmup_iters=2000, schedule="cosine", max_minutes=600)
     for size in ("330m", "500m", "800m", "1b")}  # the paper's, section 3.3
TASK_LENGTHS = dict(src_len=512, tgt_len=256, batch_size=8)  # what rows of a task take at most, where the preset reads less than that
TIMED = (8, 40)  # the steps that --max_minutes measures (the first ones are slower), before the decay needs to know the end


def resolve(cfg):
    """Fills in what is left to the preset, and refuses what cannot work."""
    cfg.objective = cfg.objective or ("seq2seq" if is_task(cfg.data) else "span" if cfg.arch == "encdec" else "causal")
    defaults = DEFAULTS[cfg.preset]
    if cfg.objective == "seq2seq" and defaults["src_len"] < TASK_LENGTHS["src_len"]:
        defaults = defaults | TASK_LENGTHS
    for name, value in defaults.items():
        if getattr(cfg, name) is None and not (name == "max_minutes" and cfg.max_iters):
            setattr(cfg, name, value)
    for field in fields(cfg):
        value = getattr(cfg, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{field.name}={value} must be a finite number")
    cfg.vocab_size = cfg.vocab_size or PRESETS[cfg.preset]["vocab_size"]
    for name in ("batch_size", "grad_accum", "tgt_len", "max_iters", "max_minutes", "warmup_iters", "eval_interval", "n_enc", "n_dec",
                 "n_embd", "n_head", "n_kv_head", "head_dim", "n_hidden", "noise", "vocab_size"):
        if getattr(cfg, name) is not None and getattr(cfg, name) <= 0:
            raise UserError(f"--{name}={getattr(cfg, name)} must be positive")
    for name in ("src_len", "lr", "embed_lr", "weight_decay", "grad_clip", "eval_rows", "threads", "seed", "max_tokens", "patience"):
        if not getattr(cfg, name) >= 0:
            raise UserError(f"--{name}={getattr(cfg, name)} must not be negative")
    for name in ("dropout", "word_dropout", "label_smoothing"):
        if not 0 <= getattr(cfg, name) < 1:
            raise UserError(f"--{name}={getattr(cfg, name)} must be at least 0 and below 1")
    if cfg.noise >= 1 or cfg.mean_span < 1:
        raise UserError(f"--noise={cfg.noise} must be below 1 and --mean_span={cfg.mean_span} at least 1")
    if cfg.arch == "dec" and cfg.cross_rope:
        raise UserError("--cross_rope=true is for --arch=encdec: a decoder-only model has no cross-attention")
    if cfg.cross_rope is None:
        cfg.cross_rope = cfg.arch == "encdec" and cfg.objective == "seq2seq"
    if cfg.arch == "dec" and cfg.n_enc:
        raise UserError(f"--n_enc={cfg.n_enc} is for --arch=encdec: a decoder-only model has no encoder")
    if is_task(cfg.data) and cfg.objective != "seq2seq":
        raise UserError(f"--data={cfg.data} is a task: --objective={cfg.objective} cannot train on it; leave --objective out")
    if cfg.objective == "seq2seq" and cfg.data in ("pycode", "pycode-full"):
        raise UserError(f"--data={cfg.data} is text without sources and targets; --data=docstring and --data=names make tasks of it")
    if cfg.objective == "seq2seq" and cfg.decontaminate:
        raise UserError("--decontaminate is for pretraining text; the splits of a task are its own")
    return cfg


# ---------------------------------------------------------------------------------------------------------------------
# Muon

@torch.no_grad()
def orthogonalize(G, dtype):
    """The nearest semi-orthogonal matrix to each of G (K, m, n), m <= n, roughly: five steps of a Newton-Schulz iteration
    whose quintic brings every singular value to about 0.7 .. 1.2 (Jordan et al., 2024). A zero matrix stays zero."""
    X = G.to(dtype)
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315) @ X
    return X.to(G.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized by Newton-Schulz, for the matrices of hidden layers (Jordan et al., 2024; the paper's
    optimizer, section 3.3). Not for embeddings, gains and biases. Query, key and value projections are separate
    matrices in this model, so each is orthogonalized by itself.

    Matrices of equal shape, a transposed one included, are stacked and iterated on at once, up to STACK numbers: what
    the iteration needs besides is a few times that, whatever the model's size. The learning rate follows
    `match_rms_adamw` (Liu et al., 2025): times 0.2 sqrt(max(rows, columns)), which gives the update the size of AdamW's."""

    STACK = 2**26

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.1, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            stacks = {}
            for p in group["params"]:
                if p.grad is not None:
                    stacks.setdefault((min(p.shape), max(p.shape)), []).append(p)
            for shape, params in stacks.items():
                at_once = max(1, self.STACK // (shape[0] * shape[1]))
                for i in range(0, len(params), at_once):
                    self.update(params[i:i + at_once], shape, group)

    def update(self, params, shape, group):
        lr, momentum = group["lr"], group["momentum"]
        grads = [p.grad for p in params]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        nesterov = torch._foreach_lerp(grads, buffers, momentum)
        wide = [u if u.size(0) <= u.size(1) else u.mT for u in nesterov]
        updates = orthogonalize(torch.stack(wide), self.dtype).unbind()
        updates = [u if p.size(0) <= p.size(1) else u.mT for u, p in zip(updates, params)]
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, updates, alpha=-lr * 0.2 * shape[1] ** 0.5)


def make_optimizers(model, cfg, dtype, log):
    """Routes every parameter by its name: the matrices inside the blocks to Muon, all else to AdamW; prints the table."""
    matrices, embeddings, vectors = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        kind = vectors if p.ndim < 2 else embeddings if name.startswith("head") or ".embed" in f".{name}" else matrices
        kind.append((name, p))
    device = next(model.parameters()).device
    groups = [dict(params=[p for _, p in embeddings], lr=cfg.embed_lr, weight_decay=0.0),
              dict(params=[p for _, p in vectors], lr=cfg.embed_lr, weight_decay=0.0)]
    optimizers = []
    if cfg.optimizer == "adamw":
        groups.append(dict(params=[p for _, p in matrices], lr=cfg.lr, weight_decay=cfg.weight_decay))
    else:
        optimizers.append(Muon([p for _, p in matrices], cfg.lr, weight_decay=cfg.weight_decay, dtype=dtype))
    optimizers.append(torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=device.type in ("cuda", "cpu")))
    for title, members in ((cfg.optimizer, matrices), ("adamw", embeddings + vectors)):
        kinds = sorted({".".join("*" if part.isdigit() else part for part in name.split(".")) for name, _ in members})
        log(f"{title}: {len(members)} tensors, {sum(p.numel() for _, p in members):,} parameters: {', '.join(kinds)}")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def lr_share(step, cfg):
    """Share of the peak learning rate at a step: linear warm-up, then cosine or linear decay to zero."""
    if step < cfg.warmup_iters or cfg.max_iters is None:
        return min(1.0, (step + 1) / cfg.warmup_iters)
    done = (step - cfg.warmup_iters) / max(1, cfg.max_iters - cfg.warmup_iters)
    return 1 - done if cfg.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


# ---------------------------------------------------------------------------------------------------------------------
# Machine

def keep_memory():
    """Tells glibc to keep freed memory for the next tensor. By default it hands large blocks back to the system, which
    zeroes their pages when they are wanted again, at every step: 7% of the training time of 30 M parameters on a CPU."""
    with contextlib.suppress(OSError, AttributeError):  # another libc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)            # M_MMAP_MAX: no block of its own for a large tensor
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: keep what is free


class World:
    """This process among all: rank, size, device, and the precision of its matrix products."""

    def __init__(self, cfg):
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local, kind = int(os.environ.get("LOCAL_RANK", 0)), cfg.device
        if kind == "auto":
            kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        try:
            self.device = torch.device(kind)
            if self.device.type == "cuda" and self.device.index is None:
                self.device = torch.device("cuda", local)
            if self.device.type not in ("cpu", "cuda", "mps"):
                raise RuntimeError
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError, NotImplementedError):
            raise UserError(f"--device={cfg.device} cannot be used here (torch {torch.__version__}, CUDA available: "
                            f"{torch.cuda.is_available()}); use --device=cpu or auto") from None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if self.size > 1 and not dist.is_initialized():
            # The others wait while the first process tokenizes, which can take hours.
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=timedelta(days=2))
        fast = has_bf16(self.device)
        self.dtype = {"auto": torch.bfloat16 if fast else torch.float32}.get(cfg.dtype) or getattr(torch, cfg.dtype)
        # Measured on two cores: layers compiled one by one take half a minute once, and train 1.4 times as fast after that.
        minutes = cfg.max_minutes if cfg.max_iters is None else 0
        pays = self.device.type == "cuda" or (self.device.type == "cpu" and minutes > 2 and shutil.which("g++") is not None)
        self.compile = cfg.compile == "true" or (cfg.compile == "auto" and pays)

    def precision(self):
        """Around every forward and backward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def sum(self, *values):
        """Sums of numbers over all processes."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device="cpu" if self.device.type == "cpu" else self.device)
        dist.all_reduce(total)
        return tuple(total.tolist())

    def agree(self, value):
        """The first process's value, for all."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def gather(self, value):
        """Every process's value, in a list."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def sum_gradients(self, params):
        """Sums the gradients over all processes, in one message: simpler than overlapping it with the backward pass, and
        with accumulation it is paid once a step."""
        if self.size == 1:
            return
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in params]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for p, part in zip(params, flat.split([g.numel() for g in grads])):
            p.grad = part.view_as(p)


@functools.cache
def matmul_rate(device, dtype):
    """What the device's matrix products reach, FLOP/s: the makers' figure for known GPUs, else measured here."""
    known = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12, "A6000": 155e12}
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        if found := [rate for part, rate in known.items() if part in name]:
            return found[0]
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * 2048 ** 3 / best


# ---------------------------------------------------------------------------------------------------------------------
# The files of a run

def sync_file(path):
    with open(path, "rb+") as f:
        os.fsync(f.fileno())


def save(folder, model, optimizers, state):
    """Writes a checkpoint so that a kill at any moment leaves the old one or the new one, whole: both files are written
    under new names, then train_state.pt is renamed, which is the moment that counts, then the weights. `settle`
    finishes a rename that was cut off. A full disk leaves the old checkpoint and says so."""
    weights, states = os.path.join(folder, "model.safetensors"), os.path.join(folder, "train_state.pt")
    committed = False
    try:
        model.save(folder, "model.safetensors.new", step=str(state["step"]))
        torch.save(state | dict(optimizers=[o.state_dict() for o in optimizers]), states + ".new")
        sync_file(weights + ".new")
        sync_file(states + ".new")
        os.replace(states + ".new", states)
        committed = True
        os.replace(weights + ".new", weights)
    except Exception as error:  # OSError, or what torch and safetensors make of one
        for path in () if committed else (weights + ".new", states + ".new"):
            with contextlib.suppress(OSError):
                os.remove(path)
        raise UserError(f"saving step {state['step']} to {folder} failed ({str(error).splitlines()[0]}): free some space, then "
                        "go on from the last checkpoint with --init_from=resume") from None


def save_best(folder, model, step):
    """Writes best.safetensors, whole or not at all."""
    path = os.path.join(folder, "best.safetensors")
    try:
        model.save(folder, "best.safetensors.new", step=str(step))
        sync_file(path + ".new")
        os.replace(path + ".new", path)
    except Exception as error:  # OSError, or what safetensors makes of one
        with contextlib.suppress(OSError):
            os.remove(path + ".new")
        raise UserError(f"saving the best weights, of step {step}, to {folder} failed ({str(error).splitlines()[0]}): free some space, then "
                        "go on from the last checkpoint with --init_from=resume") from None


def settle(folder):
    """The state of a run folder's checkpoint, after finishing what a kill cut off. UserError if there is none."""
    weights, states = os.path.join(folder, "model.safetensors"), os.path.join(folder, "train_state.pt")
    if not os.path.isfile(states):
        raise UserError(f"{folder} has no checkpoint to resume from (train_state.pt is missing)")
    try:
        state = torch.load(states, map_location="cpu", weights_only=True)
        step = state["step"]
    except Exception:
        raise UserError(f"{states} cannot be read: it is truncated or was altered") from None
    if os.path.exists(weights + ".new") and read_metadata(weights + ".new").get("step") == str(step):
        os.replace(weights + ".new", weights)
    if read_metadata(weights).get("step") != str(step):
        raise UserError(f"{weights} and {states} are not from the same step: the run cannot be resumed exactly")
    return state


# ---------------------------------------------------------------------------------------------------------------------
# The loop

@contextlib.contextmanager
def catch_signals():
    """Ctrl-C and SIGTERM are collected in a list, for the loop to see between steps; a second one stops at once."""
    caught = []

    def note(number, frame):
        if caught:
            sys.exit(128 + number)
        caught.append(number)
    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def run(model, batch_at, loss_of, evaluate, cfg, world, flops_per_token, best=None, prepare=None, carry=None):
    """Trains `model` in cfg.out until cfg.max_iters, and returns the last evaluation, or the best (below).

    batch_at(step, rows) makes the rows with these global numbers: a pure function, on which resuming, accumulation and
    several processes rest; a batch is a tuple that ends with its number of real tokens. loss_of(model, batch) gives the
    summed loss of a batch and its number of target tokens; a step's loss is its sum over all micro-batches and processes
    divided by all their target tokens. A third value, {name: (sum, count)}, is what else the log should have the mean of.
    evaluate(step) returns a dict with val_loss. `best` names one of its metrics, the
    higher the better: the weights that did best lie in best.safetensors, which is what `Transformer.load` prefers, and are
    what is returned. Raises UserError when the loss or the gradient is not finite, or a checkpoint cannot be written.

    prepare(step, batches) returns a step's batches with what only the weights of that moment can give (answers that the model
    itself has written); `carry`, a dict of plain values, is what it keeps between steps: saved and resumed with the weights."""
    say = functools.partial(tqdm.write, file=sys.stderr) if world.rank == 0 else lambda text: None
    model.to(world.device)
    optimizers = make_optimizers(model, cfg, world.dtype, say)
    state = dict(step=0, time_s=0.0, tokens=0, max_iters=cfg.max_iters, best=None, last=None, carry={})
    carry = {} if carry is None else carry
    if cfg.init_from == "resume":
        state = dict(best=None, last=None, carry={}) | settle(cfg.out)
        carry.update(state["carry"])
        for optimizer, saved in zip(optimizers, state.pop("optimizers")):
            optimizer.load_state_dict(saved)
        cfg.max_iters = cfg.max_iters or state["max_iters"]
    say(f"{model.num_params():,} parameters, {flops_per_token / 1e6:.2f} MFLOPs forward a token; "
        f"{cfg.batch_size * cfg.grad_accum * world.size} rows a step; {world.device}, {str(world.dtype)[6:]}, "
        f"{'compiled' if world.compile else 'eager'}, {torch.get_num_threads()} threads")
    for module in model.modules():
        if isinstance(module, Block):
            module.dropout = cfg.dropout
    model.loss.label_smoothing, model.word_dropout = cfg.label_smoothing, cfg.word_dropout
    if world.compile and model.compiled_parts():
        say("compiling, a minute or so")
        for module in model.compiled_parts():
            module.compile(dynamic=cfg.objective == "seq2seq")  # whose batches all differ in their shapes ...
        with world.precision():
            for step in range(16 if cfg.objective == "seq2seq" else 1):  # ... and large and small ones in their code
                loss_of(model, batch_at(step, np.arange(cfg.batch_size)))[0].backward()
        model.zero_grad(set_to_none=True)
    log = Log(cfg.out, state["step"]) if world.rank == 0 else None
    params, rate = [p for p in model.parameters() if p.requires_grad], matmul_rate(world.device, world.dtype)

    def batches(step):
        first = np.arange(cfg.grad_accum) * world.size + world.rank
        return [batch_at(step, np.arange(i * cfg.batch_size, (i + 1) * cfg.batch_size)) for i in first]

    def checkpoint(step):
        state.update(step=step, max_iters=cfg.max_iters, carry={key: value for part in world.gather(carry) for key, value in part.items()})
        if world.rank == 0:
            save(cfg.out, model, optimizers, state)
        if world.size > 1:
            dist.barrier()

    def interval():
        return cfg.eval_interval or math.ceil((cfg.max_iters or 10 ** 9) / 8)

    timed = []
    # A batch of rare shape runs as it is: compiling for it in mid-training takes as long as thirty steps.
    stance = torch.compiler.set_stance("eager_on_recompile") if world.compile else contextlib.nullcontext()
    with catch_signals() as stop_signal, stance, ThreadPoolExecutor(1) as ahead, \
            tqdm(total=cfg.max_iters, initial=state["step"], unit="step", dynamic_ncols=True, disable=world.rank > 0) as bar:
        step, coming = state["step"], ahead.submit(batches, state["step"])
        while True:
            done = cfg.max_iters is not None and step >= cfg.max_iters
            interrupted = world.sum(len(stop_signal))[0] > 0
            due = (done or step % interval() == 0) and (state["last"] or {}).get("step") != step
            if interrupted or due:
                if due and not interrupted:
                    with torch.compiler.set_stance("force_eager"):  # its shapes differ from step to step
                        metrics = {name: float(value) for name, value in evaluate(step).items()}
                    say(f"step {step}: " + ", ".join(f"{key} {value:.4f}" for key, value in metrics.items()))
                    if log:
                        log.add(dict(step=step, time_s=state["time_s"], tokens=state["tokens"], **metrics))
                        log.plot(best)
                    if best in metrics and (state["best"] is None or metrics[best] > state["best"][best]):
                        state["best"] = dict(metrics, step=step)
                        if world.rank == 0:
                            save_best(cfg.out, model, step)
                    state["last"] = dict(metrics, step=step)
                checkpoint(step)
                if not interrupted and cfg.patience and state["best"] and step - state["best"]["step"] >= cfg.patience * interval():
                    say(f"stopped: no better {best} in {cfg.patience} evaluations")
                    break
            if interrupted or done:
                break

            start = time.perf_counter()
            share = lr_share(step, cfg)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * share
            micro, coming = coming.result(), ahead.submit(batches, step + 1)
            micro = prepare(step, micro) if prepare else micro
            loss_sum, targets, seen, parts = 0.0, 0, 0, {}
            torch.manual_seed((cfg.seed * 1_000_003 + step) * world.size + world.rank)  # dropout's draws, too, are the step's own
            for batch in micro:
                with world.precision():
                    loss, n, *more = loss_of(model, batch)
                    loss.backward()
                for name, (value, count) in (more[0].items() if more else ()):
                    parts[name] = (parts.get(name, (0.0, 0))[0] + float(value), parts.get(name, (0.0, 0))[1] + count)
                loss_sum, targets, seen = loss_sum + loss.detach(), targets + n, seen + batch[-1]
            loss_sum, targets, seen = world.sum(float(loss_sum), int(targets), seen)
            sums = world.sum(*(number for name in sorted(parts) for number in parts[name]))
            parts = {name: value / max(count, 1) for name, value, count in zip(sorted(parts), sums[::2], sums[1::2])}
            world.sum_gradients(params)
            loss = loss_sum / max(1, targets)
            grads = [p.grad for p in params if p.grad is not None]
            if grads:
                torch._foreach_div_(grads, max(1.0, targets))
            norm = torch.nn.utils.clip_grad_norm_(params, cfg.grad_clip or math.inf)
            for what, value in (("loss", loss), ("norm of the gradient", norm.item())):
                if not math.isfinite(value):  # before it reaches a weight
                    raise UserError(f"the {what} is {value} at step {step}; the checkpoint of step {state['step']} in {cfg.out} is kept. "
                                    f"Lower --lr (now {cfg.lr}) or raise --warmup_iters (now {cfg.warmup_iters})")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start

            if log:
                log.add(dict(step=step, time_s=state["time_s"], tokens=state["tokens"], lr=cfg.lr * share, loss=loss, **parts))
            step += 1
            state["time_s"] += seconds
            state["tokens"] += int(seen)
            mfu = 3 * flops_per_token * seen / world.size / seconds / rate
            bar.set_postfix(loss=f"{loss:.3f}", lr=f"{cfg.lr * share:.1e}", **{"tok/s": f"{seen / seconds:.0f}", "mfu": f"{mfu:.0%}"})
            bar.update()
            timed.append(seconds)
            if cfg.max_iters is None and len(timed) >= TIMED[1]:
                slow = 2 if prepare is None else 0  # may have compiled something; but what prepare does may be in rare steps alone
                typical = float(np.mean(sorted(timed[TIMED[0]:])[:len(timed) - TIMED[0] - slow]))
                left = cfg.max_minutes * 60 - state["time_s"]
                fits = step + int(max(1, left / typical))
                cfg.max_iters = world.agree(fits)
                bar.total = cfg.max_iters
                say(f"{typical:.3f} s a step: {cfg.max_iters} steps fit into {cfg.max_minutes:g} minutes")
    if interrupted:
        say(f"interrupted; step {step} is saved. Go on with: python {sys.argv[0]} --init_from=resume --out={cfg.out}")
        sys.exit(128 + (stop_signal or [signal.SIGTERM])[0])
    say(f"trained {state['time_s']:.0f} s, {state['tokens']:,} tokens, {state['tokens'] / max(state['time_s'], 1e-9):,.0f} tokens/s; {cfg.out}")
    return state["best"] or state["last"]


# ---------------------------------------------------------------------------------------------------------------------
# Pretraining

def to_device(batch, device):
    return [None if part is None else torch.from_numpy(part).to(device) for part in batch]


def loss_of(model, batch):
    """Summed cross-entropy of a (src, src_mask, tgt, loss_mask, tokens) batch, and its number of targets."""
    *tensors, _ = batch
    return model(*tensors, reduction="sum")[1], int(tensors[-1].sum())


def count_tokens(batch, pad):
    """Real tokens of a batch, source and target."""
    return sum(int((ids != pad).sum()) for ids in (batch[0], batch[2]) if ids is not None)


def eval_starts(length, window, rows, causal):
    """Where the held-out windows begin: `rows` of them, evenly spaced, or, with 0, side by side over all of the text
    (the last one reaches back). Causal windows overlap by one token, which the next one needs to be predicted from."""
    if length < window:
        raise UserError(f"the held-out text has {length} tokens, and a row of this run needs {window}: a longer text is needed")
    if rows:
        return np.linspace(0, length - window, rows).astype(int)
    stride = window - (1 if causal else 0)
    return np.append(np.arange(0, length - window, stride), length - window)


@torch.no_grad()
def held_out(model, tokens, objective, cfg, world):
    """Held-out losses: val_loss, over all targets; text_loss, over those that are text; unigram, the entropy of those
    tokens' own frequencies, which is what a model that ignores all context could reach; bits per byte of the text."""
    tokenizer, causal = objective.tokenizer, objective.name == "causal"
    starts = eval_starts(len(tokens), objective.window, cfg.eval_rows, causal)
    length = np.array([len(token) for token in tokenizer.ranks] + [0] * (tokenizer.vocab_size - tokenizer.n_text))
    counts, sums = np.zeros(tokenizer.vocab_size), np.zeros(5)
    groups = np.array_split(np.arange(len(starts)), max(1, math.ceil(len(starts) / cfg.batch_size)))
    model.eval()
    for rows in groups[world.rank::world.size]:
        # A seed of its own, so that no held-out row shares its noise with a training row.
        batch = objective.batch(tokens.windows(starts[rows], objective.window), uniforms(cfg.seed + 1, 0, rows, objective.n_random))
        if causal and not cfg.eval_rows:  # every token counts once: what the window before has scored is context
            scored = np.where(rows > 0, starts[rows - 1] + objective.window - starts[rows], 1)
            batch[3][:] = np.arange(objective.window)[None] >= scored[:, None]
        src, src_mask, tgt, loss_mask = to_device(batch, world.device)
        with world.precision():
            logits, _ = model(src, src_mask, tgt, loss_mask)
        nll = F.cross_entropy(logits.flatten(0, 1).float(), tgt.flatten(), reduction="none").view_as(tgt)
        text = loss_mask & (tgt < tokenizer.n_text) & (tgt != tokenizer.eos)  # a foreign tokenizer's eos is among its text ids
        ids = tgt[text].cpu().numpy()
        nll, loss_mask, text = nll.cpu().double(), loss_mask.cpu(), text.cpu()
        sums += [nll[loss_mask].sum().item(), loss_mask.sum().item(), nll[text].sum().item(), len(ids), length[ids].sum()]
        counts += np.bincount(ids, minlength=len(counts))
    model.train()
    totals = world.sum(*sums, *counts)
    (all_nll, n_all, text_nll, n_text, n_bytes), counts = totals[:5], np.array(totals[5:])
    share = counts[counts > 0] / max(1, n_text)
    return dict(val_loss=all_nll / max(1, n_all), text_loss=text_nll / max(1, n_text), unigram=float(-(share * np.log(share)).sum()),
                bits_per_byte=text_nll / max(1, n_bytes) / math.log(2))


def show_sample(model, tokens, objective, world, say):
    """Prints what the model makes of one held-out text."""
    tokenizer, window = objective.tokenizer, objective.window
    ids = tokens.windows([len(tokens) // 2], window)
    src, _, tgt, loss_mask = objective.batch(ids, uniforms(0, 0, [0], objective.n_random))
    if src is None:  # decoder-only: what is before the first target is the prompt; all of it, for a causal model
        start = int(loss_mask[0].argmax()) or window // 2
        prompt = tgt[0, :start].tolist()
    else:
        prompt = src[0][src[0] != tokenizer.pad].tolist()
    model.eval()
    with world.precision():
        steps = list(model.generate([prompt], min(64, objective.tgt_len)))
    model.train()
    answer = [step[0] for step in steps]
    if any(id >= tokenizer.first_sentinel for id in prompt):
        pieces = fill_spans(prompt, answer, tokenizer)
        say("--- a held-out text, its holes [[filled]]:\n" +
            "".join(f"[[{tokenizer.show(ids)}]]" if filled else tokenizer.show(ids) for ids, filled in pieces))
    else:
        say("--- " + tokenizer.show(prompt[-64:]) + " >>> " + tokenizer.decode(answer))
    say("---")


def load_run(cfg):
    """The settings of the run in --out, with what the command line may change on resuming: how long, where, how often."""
    if not cfg.out:
        raise UserError("--init_from=resume needs --out=FOLDER of the run")
    old, kind = read_record(cfg.out), type(cfg)
    own = next((key for key in ("distill", "vision") if key in old), None)
    values = old["settings"] | old.get(own, {})
    if kind.own != own:
        raise UserError(f"{cfg.out} is not a run of {os.path.basename(sys.argv[0])}: resume it with the script that began it, as {cfg.out}/run.json says")
    try:
        settings = Settings(**values) if kind is Settings else kind(**{field.name: values[field.name] for field in fields(kind)})
        for name in {field.name for field in fields(Settings)} - {field.name for field in fields(kind)}:  # no keys of the other script
            setattr(settings, name, values[name])
    except (TypeError, KeyError) as error:
        raise UserError(f"{cfg.out}/run.json is of another version of this project ({error}); {cfg.out}/source has that one") from None
    if settings.tokenizer not in ("bpe", "gpt2", "bytes"):
        settings.tokenizer = cfg.out  # its copy: the file it came from may be gone
    free = {"init_from", "out", "patience", "max_iters", "eval_interval", "eval_rows", "device", "threads", "compile", "dtype"}
    for name in given():
        value = getattr(cfg, name)
        if name not in free and value != getattr(settings, name):
            raise UserError(f"--{name}={value} differs from the {getattr(settings, name)} that {cfg.out} was begun with; drop it, or "
                            f"begin a new run from its weights with --init_from={cfg.out}")
        setattr(settings, name, value)
    return settings


class Job:
    """What `launch` asks of a kind of training beside its data: these are the plain answers."""
    best = prepare = carry = None
    what = "the data"  # of which `hash` tells whether it is still the same

    def make_model(self):
        return make_model(self.cfg, self.tokenizer)

    def start(self, model):
        """Called once, before the run folder is made: for work on the data that may take long."""

    def about(self):
        """More entries for run.json."""
        return {}

    def loss_of(self, model, batch):
        return loss_of(model, batch)


class Pretraining(Job):
    """Windows of a corpus, made into sources and targets by an objective."""

    def __init__(self, cfg, world, say):
        self.cfg, self.world = cfg, world
        avoid = evaluation_texts(cfg.decontaminate) if cfg.decontaminate else ()
        self.corpus = prepare(cfg.data, cfg.tokenizer, cfg.vocab_size, cfg.text_col, cfg.max_tokens, avoid, say)
        self.hash, self.tokenizer = self.corpus.hash, self.corpus.tokenizer
        self.objective = Objective(cfg.objective, self.tokenizer, cfg.src_len, cfg.tgt_len, cfg.arch == "dec", cfg.noise, cfg.mean_span)
        for split, tokens in self.corpus.splits.items():
            if len(tokens) < self.objective.window:
                raise UserError(f"--data={cfg.data}: the {split} text has {len(tokens)} tokens, but one row takes {self.objective.window}: "
                                "give more text, or lower --src_len and --tgt_len")
        example = self.objective.batch(self.corpus.splits["val"].windows([0], self.objective.window), uniforms(0, 0, [0], self.objective.n_random))
        self.lengths = 0 if example[0] is None else example[0].shape[1], example[2].shape[1]
        say(self.corpus.describe())
        say(self.objective.describe())

    def batch_at(self, step, rows):
        train, window = self.corpus.splits["train"], self.objective.window
        u = uniforms(self.cfg.seed, step, rows, self.objective.n_random + 1)
        starts = (u[:, 0] * (len(train) - window + 1)).astype(np.int64)
        batch = self.objective.batch(train.windows(starts, window), u[:, 1:])
        return (*to_device(batch, self.world.device), count_tokens(batch, self.tokenizer.pad))

    def evaluate(self, model, step, say):
        val = self.corpus.splits["val"]
        metrics = held_out(model, val, self.objective, self.cfg, self.world)
        if self.world.rank == 0:
            show_sample(model, val, self.objective, self.world, say)
        return metrics

    def summary(self, metrics):
        under = 1 - metrics["text_loss"] / metrics["unigram"]
        return (f"held-out text loss {metrics['text_loss']:.3f} nats a token, {under:.0%} under the unigram entropy of {metrics['unigram']:.3f}; "
                f"{metrics['bits_per_byte']:.3f} bits a byte")


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning: rows of source and target

@torch.no_grad()
def answers(model, pairs, rows, max_new_tokens, batch_rows, world):
    """Greedy answers to the sources of these rows, as texts. Sources of like length are read together; the processes share
    the work. In the weights' own type: autocast would cast all of them at every step, which takes longer than the step."""
    order = sorted(rows, key=lambda row: len(pairs.sources[row]), reverse=True)
    groups = [order[i:i + batch_rows] for i in range(0, len(order), batch_rows)]
    found = {}
    for group in tqdm(groups[world.rank::world.size], desc="answering", unit="batch", leave=False, disable=world.rank > 0 or len(groups) < 3):
        steps = list(model.generate([pairs.prompt(row) for row in group], max_new_tokens, **pairs.shown(model, group)))
        for b, row in enumerate(group):
            found[row] = pairs.tokenizer.decode([step[b] for step in steps if step[b] is not None])
    found = {row: text for part in world.gather(found) for row, text in part.items()}
    return [found[row] for row in rows]


@torch.no_grad()
def pair_losses(model, pairs, rows, batch_rows, world):
    """Held-out loss in nats a target token of these rows, and shuffled_loss, where each target stands beside the source of
    another row: a model that does not look at its source has the same loss in both."""
    order = sorted(rows, key=lambda row: pairs.lengths[row].sum())
    others = dict(zip(order, np.roll(order, len(order) // 2)))
    sums = np.zeros(3)
    groups = [order[i:i + batch_rows] for i in range(0, len(order), batch_rows)]
    for group in groups[world.rank::world.size]:
        for k, sources in enumerate((None, [others[row] for row in group])):
            batch = to_device(pairs.batch(group, sources), world.device)
            with world.precision():
                sums[k] += model(*batch, reduction="sum", **pairs.shown(model, sources or group))[1].item()
        sums[2] += int(batch[3].sum())
    true, shuffled, n = world.sum(*sums)
    return dict(val_loss=true / n, shuffled_loss=shuffled / n)


def evenly(n, k):
    """k numbers of 0 .. n - 1, evenly spaced; all of them for k = 0 or k >= n."""
    return list(range(n)) if k == 0 or k >= n else np.linspace(0, n - 1, k).astype(int).tolist()


class Finetuning(Job):
    """The rows of a task, batched by length. Scratch or pretrained: the sources go to the encoder, or, decoder-only, before
    the target."""

    def __init__(self, cfg, world, say):
        self.cfg, self.world = cfg, world
        self.task = self.load_task(say)
        rows = self.task.splits
        self.tokenizer = self.make_tokenizer(rows["train"])
        self.pairs = {split: self.make_pairs(rows[split]) for split in ("train", "val")}
        digest = hashlib.sha256(json.dumps([rows["train"], rows["val"], self.tokenizer.hash()], default=repr).encode())
        self.hash, self.lengths = digest.hexdigest()[:12], self.pairs["train"].lengths.mean(0).round().astype(int)
        if cfg.arch == "dec":
            self.lengths = np.array([0, self.lengths.sum() + 1])
        self.n_rows = cfg.batch_size * cfg.grad_accum * world.size
        self.order = ByLength(self.pairs["train"], self.n_rows * (cfg.src_len + cfg.tgt_len), cfg.seed)
        for split, pairs in self.pairs.items():
            say(f"{self.task.name}, {split}: {pairs.describe()}")
        say(f"{len(self.order.plan(0)):,} steps an epoch; {self.order.padding():.1%} of the computed positions are padding")
        self.best = next(iter(score(self.task, ["x"], rows["val"][:1])))  # the task's own metric comes first

    def load_task(self, say):
        return load_task(self.cfg.data, self.cfg.source_col, self.cfg.target_col, self.cfg.skip_bad, say)

    def make_pairs(self, rows):
        return Pairs(rows, self.tokenizer, self.cfg.src_len, self.cfg.tgt_len, self.cfg.arch == "dec")

    def make_tokenizer(self, rows):
        return train_pair_tokenizer(rows, self.cfg.vocab_size) if self.cfg.tokenizer == "bpe" else load_tokenizer(self.cfg.tokenizer)

    def share(self, step, rows):
        """The row numbers that these numbers of 0 .. n_rows - 1 stand for at a step, and how many of them count."""
        chosen = self.order.rows(step)
        share = chosen[len(chosen) * rows[0] // self.n_rows:len(chosen) * (rows[-1] + 1) // self.n_rows]
        # At least two rows, the added ones without a loss: torch.compile makes code of its own for a size of 1, and there may be
        # fewer rows than forward passes.
        return np.append(share, np.repeat(chosen[:1], max(0, 2 - len(share)))), len(share)

    def batch_at(self, step, rows):
        rows, real = self.share(step, rows)
        src, src_mask, tgt, loss_mask = self.pairs["train"].batch(rows)
        loss_mask[real:] = False
        return (*to_device((src, src_mask, tgt, loss_mask), self.world.device), int(self.pairs["train"].lengths[rows[:real]].sum()))

    def evaluate(self, model, step, say):
        model.eval()
        pairs, rows = self.pairs["val"], evenly(len(self.pairs["val"]), self.cfg.eval_rows)
        metrics = pair_losses(model, pairs, rows, 32, self.world)
        if step:  # before that, answers are noise that takes long to make
            texts = answers(model, pairs, rows, self.cfg.tgt_len, 128, self.world)
            held_out = [pairs.rows[row] for row in rows]
            metrics |= score(self.task, texts, held_out)
            source, target = (held_out[0][side] for side in ("source", "target"))
            say(f"--- source: {source[:300]}\n>>> {texts[0][:300]}\n=== {target[:300]}\n---")
        model.train()
        return metrics

    def summary(self, metrics):
        names = ", ".join(f"{name} {value:.2f}" for name, value in metrics.items() if name not in ("step", "val_loss", "shuffled_loss"))
        return (f"{self.task.name}, {len(evenly(len(self.pairs['val']), self.cfg.eval_rows))} held-out rows, step {metrics['step']}, the best: {names}; loss "
                f"{metrics['val_loss']:.3f}, with the sources shuffled among the rows {metrics['shuffled_loss']:.3f}")


SIZES = ("n_enc", "n_dec", "n_embd", "n_head", "n_kv_head", "head_dim", "n_hidden")


def adopt(cfg, key="init_from"):
    """Takes over from the run (or the weights of others) in --init_from what its weights decide: sizes, vocabulary, and lengths for going on as before."""
    foreign = cfg.init_from.startswith(PREFIXES)
    if foreign:
        from export import foreign_config, preset_of, tokenizer_of  # which imports this file
        if os.path.isdir(cfg.init_from.removeprefix("mu:")):
            raise UserError(f"--{key}={cfg.init_from} has pictures: make it a run first, python export.py --run={cfg.init_from} --format=run --out=RUN")
        parent, folder = foreign_config(cfg.init_from)
        old = dict(preset=cfg.preset if "preset" in given() else preset_of(parent), split=cfg.split) | {name: getattr(parent, name) or None for name in SIZES}
    else:
        parent, folder, old = read_config(cfg.init_from), cfg.init_from, read_record(cfg.init_from)["settings"]
    if "arch" not in given():
        cfg.arch = "encdec" if parent.n_enc else "dec"
    if parent.n_enc and cfg.arch == "dec":
        raise UserError(f"--{key}={cfg.init_from} is an encoder-decoder, not --arch=dec")
    adapts = cfg.arch == "encdec" and not parent.n_enc
    if adapts and (parent.image_id >= 0 or "split" in given()):
        raise UserError(f"--{key}={cfg.init_from} has pictures: only models of text become encoder-decoders" if parent.image_id >= 0 else
                        f"--split={cfg.split} is for a new model: --n_enc and --n_dec say how many layers of {cfg.init_from} each stack takes")
    if adapts:  # a decoder-only model becomes an encoder-decoder, of as many of its layers as one likes
        old = old | dict(n_enc=cfg.n_enc or parent.n_dec, n_dec=cfg.n_dec or parent.n_dec, n_hidden=parent.n_hidden)
    for name in ("preset", "split", *SIZES):
        if name in given() and getattr(cfg, name) != old.get(name):
            raise UserError(f"--{name}={getattr(cfg, name)} cannot be chosen with --{key}={cfg.init_from}, which has its sizes already")
        setattr(cfg, name, old.get(name))  # the preset has the defaults of training, too
    if cfg.cross_rope is None and not adapts:
        cfg.cross_rope = parent.cross_rope
    if cfg.tokenizer in (None, "bpe"):
        cfg.tokenizer = None if foreign else folder
    if foreign:
        cfg.tokenizer = tokenizer_of(cfg.init_from, folder, cfg.tokenizer)
        return  # rows as long as the preset's: what it was trained for may be a hundred thousand tokens
    if cfg.objective != "seq2seq" and not is_task(cfg.data):  # the lengths of a task's rows have nothing to do with the run's
        cfg.src_len = cfg.src_len or parent.src_len or parent.tgt_len * 4 // 5
        cfg.tgt_len = cfg.tgt_len or (parent.tgt_len if parent.n_enc else parent.tgt_len - cfg.src_len)


def make_model(cfg, tokenizer):
    """The Transformer that --init_from asks for: a new one, or the weights of a run, or of the run that is resumed."""
    if cfg.init_from == "resume":
        return Transformer.load(cfg.out, "model.safetensors")
    if cfg.init_from != "scratch":
        return parent_model(cfg, tokenizer)
    return Transformer(new_config(cfg, tokenizer))


def parent_model(cfg, tokenizer, load=Transformer.load):
    """The model that --init_from names, a run or weights of others, with the lengths of this run. A decoder-only one becomes an encoder-decoder for --arch=encdec."""
    src_len, tgt_len = (cfg.src_len, cfg.tgt_len) if cfg.arch == "encdec" else (0, cfg.src_len + cfg.tgt_len)
    if cfg.init_from.startswith(PREFIXES):
        from export import fit_vocabulary, load_foreign
        model = fit_vocabulary(load_foreign(cfg.init_from), tokenizer, cfg.init_from).float()
    else:
        model = load(cfg.init_from)
        if load_tokenizer(cfg.init_from).hash() != tokenizer.hash():
            raise UserError(f"--tokenizer={cfg.tokenizer} is not the one that {cfg.init_from} was trained with: leave it out")
    if cfg.arch == "encdec" and not model.config.n_enc:
        from export import to_encdec
        model = to_encdec(model, cfg.n_enc, cfg.n_dec)
    if origin(cfg):  # what it was trained for stays: others paid for it
        length = model.config.tgt_len
        src_len, tgt_len = max(src_len, model.config.src_len) if model.config.n_enc else 0, max(tgt_len, length)
    model.config = replace(model.config, src_len=src_len, tgt_len=tgt_len, cross_rope=cfg.cross_rope)
    return model


def origin(cfg):
    """Whose weights a run begins with, of which it is the run or a run's run; None for those of this project."""
    return None if cfg.init_from == "scratch" else cfg.init_from if cfg.init_from.startswith(PREFIXES) else read_record(cfg.init_from).get("weights_of")


def new_config(cfg, tokenizer):
    """The Config of a new model, from the preset and the keys that change it."""
    chosen = {name: getattr(cfg, name) for name in ("n_embd", "n_head", "n_kv_head", "head_dim", "n_hidden", "cross_rope")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    return make_config(cfg.preset, cfg.arch, cfg.split, cfg.n_enc, cfg.n_dec, cfg.src_len, cfg.tgt_len, vocab_size=tokenizer.vocab_size,
                       pad_id=tokenizer.pad, bos_id=tokenizer.bos, eos_id=tokenizer.eos, **chosen)


def launch(cfg, make_job, name):
    """From settings to a finished run: the job (data, loss, evaluation), its model, the run folder, the loop. `name` is that of
    a new folder in out/."""
    world = World(cfg)
    keep_memory()
    say = functools.partial(print, file=sys.stderr) if world.rank == 0 else lambda text: None
    if world.size > 1 and world.rank > 0:
        dist.barrier()  # the first process tokenizes
    job = make_job(cfg, world, say)
    if world.size > 1 and world.rank == 0:
        dist.barrier()

    torch.manual_seed(cfg.seed)
    if cfg.init_from == "resume":
        if job.hash != read_record(cfg.out).get("corpus"):
            raise UserError(f"{job.what} has changed since {cfg.out} was begun (or lies on another machine): it cannot be resumed exactly")
        if world.rank == 0:
            settle(cfg.out)  # before the others look at the files
        world.agree(None)
    model = job.make_model().to(world.device)

    chosen = cfg.out

    def folder():
        return world.agree(free_folder(chosen or os.path.join("out", name), chosen is not None) if world.rank == 0 else None)
    if cfg.init_from != "resume":
        cfg.out = folder()
    job.start(model)  # may take hours, in which another run may take the name
    if cfg.init_from != "resume":
        cfg.out = chosen or folder()
        if world.rank == 0:
            os.makedirs(cfg.out, exist_ok=True)
            settings = {field.name: getattr(cfg, field.name) for field in fields(Settings)}
            record(cfg.out, settings, dict(torch=torch.__version__, numpy=np.__version__), corpus=job.hash, weights_of=origin(cfg), **job.about())
            job.tokenizer.save(cfg.out)

    def evaluate(step):
        return job.evaluate(model, step, functools.partial(tqdm.write, file=sys.stderr) if world.rank == 0 else lambda text: None)

    flops = model.flops(*job.lengths) / sum(job.lengths)
    metrics = run(model, job.batch_at, job.loss_of, evaluate, cfg, world, flops, job.best, job.prepare, job.carry)
    say(job.summary(metrics))
    if world.size > 1:
        dist.destroy_process_group()


def read_settings(kind, about):
    """The command line's settings, with what the run in --init_from or --out decides."""
    cfg = parse(kind, about)
    if cfg.init_from == "resume":
        return load_run(cfg)
    if cfg.init_from != "scratch":
        adopt(cfg)
    return cfg


def main():
    cfg = resolve(read_settings(Settings, __doc__))
    if cfg.tokenizer not in ("bpe", "gpt2"):
        load_tokenizer(cfg.tokenizer)
    data = os.path.splitext(os.path.basename(cfg.data.rstrip("/")))[0]
    launch(cfg, Finetuning if cfg.objective == "seq2seq" else Pretraining, f"{cfg.arch}-{cfg.preset}-{data}")
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"see {os.path.join(cfg.out, 'loss.png')}, and talk to it: python sample.py --run={cfg.out}", file=sys.stderr)


if __name__ == "__main__":
    script(main)
