"""Trains a language model: encoder-decoder or decoder-only, on a laptop or on many GPUs.

    python train.py --arch=encdec                   five minutes on two cores, on Python source
    python train.py --data=my.txt --preset=mini     your own text: a file, a folder, a Hub data set
    python train.py --data=docstring                a task, source to target

It reads top to bottom: settings, Muon, the schedule, the model, and main, which is the whole story.
More ways to call it:

    python train.py --arch=dec                      the decoder-only rival: same size, same budget
    python train.py --data=my.jsonl --source_col=question --target_col=answer
    python train.py --init_from=resume --out=out/NAME
    torchrun --nproc_per_node=8 train.py --preset=330m --data=HuggingFaceFW/fineweb-edu
"""

import math
import os
import time
from dataclasses import dataclass, replace

import torch

from data.evaluate import show_text, task_metrics, text_metrics
from data.objectives import OBJECTIVES, count_tokens, examples
from data.sets import open_data
from data.tasks import is_task
from data.tokenizer import load_tokenizer
from lib.device import catch_signals, compile_parts, fit_memory, start, to_device
from lib.runs import Log, new_run, read_run, restore, resumed, save_best, save_checkpoint
from lib.settings import UserError, given, read_settings, script, setting
from model import PRESETS, Transformer, make_config


@dataclass
class Settings:
    arch: str = setting("encdec", "or decoder-only: causal, prefix LM", ("encdec", "dec", "prefix"))
    preset: str = setting("nano", "size, with the defaults tuned for it", tuple(PRESETS))
    split: str = setting("2/3", "the encoder's share of the layers", ("1/3", "1/2", "2/3"))
    n_enc: int = setting(None, "encoder layers, not --split", high=256)
    n_dec: int = setting(None, "decoder layers, not --split", low=1, high=256)
    cross_rope: bool = setting(None, "RoPE in cross-attention [as --init_from, else on for tasks]")
    objective: str = setting(None, "[span; causal for dec; prefix]", tuple(OBJECTIVES))
    data: str = setting(
        "pycode", "pycode, pycode-full, a task, a path, a Hub id; see data/tasks.py"
    )
    max_tokens: int = setting(None, "of a text: read no more [a Hub id: 2**30]", low=1, high=2**50)
    source_col: str = setting(None, "tasks: column of the source [the task's, or source]")
    target_col: str = setting(None, "tasks: column of the target [the task's, or target]")
    tokenizer: str = setting("bpe", "bpe (trained on the data), gpt2, bytes, or a file or folder")
    vocab_size: int = setting(None, "of a trained vocabulary [the preset's]", high=2**20)
    src_len: int = setting(None, "source tokens a row [the preset's]", high=2**20)
    tgt_len: int = setting(None, "target tokens a row", low=1, high=2**20)
    init_from: str = setting("scratch", "scratch, resume (the run in --out), or a run folder")
    out: str = setting(None, "run folder [a new one in out/]")
    max_iters: int = setting(None, "optimizer steps [as fit into --max_minutes]", low=1)
    max_minutes: float = setting(None, "training time, 41 steps or more [the preset's]", low=1e-3)
    batch_size: int = setting(None, "rows a forward pass", low=1, high=2**16)
    grad_accum: int = setting(1, "forward passes a step, on each device", low=1, high=2**16)
    optimizer: str = setting("muon", "of the matrices; adamw wants --lr=3e-3", ("muon", "adamw"))
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
    seed: int = setting(1337, "of weights and rows")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = setting("auto", "of matrix products", ("auto", "float32", "bfloat16", "float16"))
    compile: str = setting("auto", "torch.compile", ("auto", "true", "false"))
    checkpoint_blocks: bool = setting(None, "keep less for the backward pass [on from 330m]")
    threads: int = setting(0, "CPU threads; 0 is torch's choice", high=4096)
    deterministic: bool = setting(False, "CUDA: the same bits again, but slower; a CPU gives them")


TASK_ROWS = dict(src_len=512, tgt_len=256, batch_size=8)  # for presets that read less
REVERSE = dict(src_len=64, tgt_len=32, batch_size=16), 300  # rows and steps of a task of few words
FREE = "init_from out max_iters eval_interval eval_rows device threads compile dtype".split()
FREE += ["checkpoint_blocks"]
TIMED = (8, 40)  # the steps that --max_minutes measures; the first ones are slower


def resolve(cfg):
    """Fills in what a run or the preset decides, and refuses what cannot work."""
    if cfg.init_from == "resume":
        cfg = resumed(cfg, FREE)
    elif cfg.init_from != "scratch":
        # Loaded once more later: what is wrong with it is told before any data is read.
        parent, chosen = Transformer.load(cfg.init_from).config, given()
        for name in ("arch", "preset", "split", "n_enc", "n_dec", "vocab_size", "tokenizer"):
            if name in chosen:
                raise UserError(f"--{name} is decided by the run in --init_from: leave it out")
        cfg.arch = ("dec", "prefix", "encdec")[(parent.n_enc > 0) + (parent.src_len > 0)]
        preset = read_run(cfg.init_from)["settings"].get("preset")
        cfg.preset = preset if preset in [*PRESETS] else cfg.preset
        cfg.tokenizer = f"{cfg.init_from}/"  # a folder, whatever its name
        cfg.cross_rope = parent.cross_rope if cfg.cross_rope is None else cfg.cross_rope
    wants_task = is_task(cfg.data) or cfg.source_col or cfg.target_col
    text = dict(encdec="span", dec="causal", prefix="prefix")[cfg.arch]
    cfg.objective = cfg.objective or ("seq2seq" if wants_task else text)
    if wants_task and cfg.objective != "seq2seq":
        raise UserError(f"--data={cfg.data} is a task: leave --objective={cfg.objective} out")
    if cfg.objective == "seq2seq" and cfg.data in ("pycode", "pycode-full"):
        raise UserError(f"--data={cfg.data} is text without targets; docstring makes a task of it")
    if cfg.arch == "encdec" and cfg.n_enc == 0:
        raise UserError("--n_enc=0: a model without an encoder is --arch=dec")
    if cfg.arch != "encdec" and (cfg.n_enc or cfg.cross_rope):
        raise UserError("--n_enc and --cross_rope are for --arch=encdec")
    defaults = dict(PRESETS[cfg.preset]["train"], vocab_size=PRESETS[cfg.preset]["vocab_size"])
    if cfg.objective == "seq2seq" and defaults["src_len"] < TASK_ROWS["src_len"]:
        defaults |= TASK_ROWS
    if cfg.data == "reverse":
        defaults |= REVERSE[0]
        cfg.max_iters = cfg.max_iters or (None if cfg.max_minutes else REVERSE[1])
    if cfg.max_iters:
        defaults["max_minutes"] = None
    for name, value in defaults.items():
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)
    if cfg.cross_rope is None:
        cfg.cross_rope = cfg.arch == "encdec" and cfg.objective == "seq2seq"
    if cfg.tokenizer not in ("bpe", "gpt2"):
        load_tokenizer(cfg.tokenizer)  # an error in it is told before anything else is done
    return cfg


# ----------------------------------------------------------------------------------------------
# Muon


@torch.no_grad()
def orthogonalize(G, dtype):
    """The nearest semi-orthogonal matrix to each of G (K, m, n), m <= n, roughly: five steps of a
    Newton-Schulz iteration whose quintic brings every singular value to about 0.7 .. 1.2 (Jordan et
    al., 2024). A zero matrix stays zero."""
    X = (G / G.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315) @ X
    return X.to(G.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized by Newton-Schulz, for the matrices of hidden layers (Jordan et al.,
    2024; the paper's optimizer, section 3.3). Query, key and value projections are separate
    matrices in this model, so each is orthogonalized by itself.

    Matrices of equal shape, a transposed one included, are stacked and iterated on at once, up to
    STACK numbers, which bounds the memory. The learning rate follows match_rms_adamw (Liu et al.,
    2025): times 0.2 sqrt(max(rows, columns)), which gives the update the size of AdamW's."""

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
                    self.update(params[i : i + at_once], shape, group)

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


def make_optimizers(model, cfg, world):
    """Routes every parameter by its name: every matrix but embeddings and the output layer to Muon,
    all else to AdamW; prints the table."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            outside = p.ndim < 2 or name.startswith("head") or ".embed" in f".{name}"
            (others if outside else matrices).append((name, p))
    groups = [dict(params=[p for _, p in others], lr=cfg.embed_lr, weight_decay=0.0)]
    optimizers, hidden = [], [p for _, p in matrices]
    if cfg.optimizer == "adamw":
        groups.append(dict(params=hidden, lr=cfg.lr, weight_decay=cfg.weight_decay))
    else:
        muon = Muon(hidden, cfg.lr, weight_decay=cfg.weight_decay, dtype=world.dtype)
        optimizers.append(muon)
    optimizers.append(torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True))
    for title, members in ((type(optimizers[0]).__name__, matrices), ("AdamW", others)):
        kinds = {".".join("*" if x.isdigit() else x for x in n.split(".")) for n, _ in members}
        size = sum(p.numel() for _, p in members)
        world.say(f"{title}: {size:,} parameters in {len(members)}: {', '.join(sorted(kinds))}")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def lr_share(step, cfg):
    """Share of the peak learning rate at a step: linear warm-up over at most a tenth of the steps,
    then cosine or linear decay to zero. Before max_iters is known, there is no decay."""
    end = cfg.max_iters or 10**18
    warmup = min(cfg.warmup_iters, max(1, end // 10))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, end - warmup)
    return 1 - done if cfg.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def steps_that_fit(seconds, step, time_s, cfg):
    """How many steps fit into --max_minutes, from the seconds of the first ones."""
    typical = sorted(seconds[TIMED[0] :])[:-2]  # the slowest two may have compiled something
    left = cfg.max_minutes * 60 - time_s
    return step + max(1, int(left / (sum(typical) / len(typical))))


# ----------------------------------------------------------------------------------------------


def make_model(cfg, tokenizer):
    """A new model, one with the weights of the run --init_from, or of the run to resume."""
    drops = {name: getattr(cfg, name) for name in ("dropout", "word_dropout", "label_smoothing")}
    if cfg.init_from == "resume":
        return Transformer.load(cfg.out, "model.safetensors", **drops)
    if cfg.init_from == "scratch":
        ids = dict(pad_id=tokenizer.pad, bos_id=tokenizer.bos, eos_id=tokenizer.eos)
        ids |= dict(vocab_size=tokenizer.vocab_size, cross_rope=cfg.cross_rope)
        # Text finds its place in the source by equal tokens; a task by position, with cross_rope.
        ids["embed_skip"] = ids["cross_next"] = cfg.arch == "encdec" and cfg.objective != "seq2seq"
        shape = cfg.preset, cfg.arch, cfg.split, cfg.n_enc, cfg.n_dec, cfg.src_len, cfg.tgt_len
        return Transformer(make_config(*shape, **ids), **drops)
    model = Transformer.load(cfg.init_from, **drops)
    old = model.config  # a length that was trained once stays trained
    src_len, tgt_len = max(cfg.src_len, old.src_len), max(cfg.tgt_len, old.tgt_len)
    if cfg.arch != "encdec":
        src_len, tgt_len = old.src_len, max(cfg.src_len + cfg.tgt_len, old.tgt_len)
    model.config = replace(old, src_len=src_len, tgt_len=tgt_len, cross_rope=cfg.cross_rope)
    return model


def is_better(new, best, metric):
    """Whether an evaluation beats the best one so far. Ties go to the lower loss: a metric that
    stays at zero must not keep the first weights."""
    return best is None or (new[metric], -new["val_loss"]) > (best[metric], -best["val_loss"])


def evaluate(model, valid_set, cfg, world, step):
    """Metrics of the held-out rows: val_loss and more. Shows an example."""
    model.eval()
    if cfg.objective == "seq2seq":  # at step 0, answers are noise that takes long to make
        metrics = task_metrics(model, valid_set, cfg.eval_rows, world, with_answers=step > 0)
    else:
        metrics = text_metrics(model, valid_set, cfg.eval_rows, cfg.batch_size, world)
        world.say(f"--- {show_text(model, valid_set, world)}\n---")
    model.train()
    return {name: float(value) for name, value in metrics.items()}


def main():
    cfg = resolve(read_settings(Settings, f"{__doc__}\n{examples()}"))
    world = start(cfg)

    # Data, model, optimizers, run folder.
    rows_a_step = cfg.batch_size * cfg.grad_accum * world.size
    train_set, valid_set = open_data(cfg, world.say, rows_a_step)
    torch.manual_seed(cfg.seed)
    model = world.place(make_model(cfg, train_set.tokenizer))
    optimizers = make_optimizers(model, cfg, world)
    params = [p for p in model.parameters() if p.requires_grad]
    fit_memory(model, train_set, cfg, world)
    state = dict(step=0, time_s=0.0, tokens=0, max_iters=cfg.max_iters, best=None, last=None)
    if cfg.init_from == "resume":
        state |= restore(cfg.out, model, optimizers, train_set, valid_set, world)
        cfg.max_iters = cfg.max_iters if "max_iters" in given() else state["max_iters"]
    else:
        name = f"{cfg.arch}-{cfg.preset}-{os.path.basename(cfg.data.rstrip('/'))}"
        cfg.out = new_run(name, cfg, world, train_set, valid_set)
    pad, metric = train_set.tokenizer.pad, train_set.metric  # metric: chooses the best checkpoint
    if world.compile:
        early = range(16 if train_set.varied else 1)
        rows = world.rows(0, cfg.batch_size)
        compile_parts(model, [train_set.batch(step, rows) for step in early], world)
    log = Log(cfg.out, state["step"], world)
    world.say(f"{model.num_params():,} parameters; {rows_a_step} rows a step; {world.describe()}")

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
            if metric in metrics and is_better(metrics, state["best"], metric):
                state["best"] = dict(metrics, step=step)
                save_best(cfg.out, model, step, world)
            state |= dict(last=step, metrics=metrics)
        if last or stopping or state["last"] == step:
            state |= dict(step=step, max_iters=cfg.max_iters)
            save_checkpoint(cfg.out, model, optimizers, state, world)
        if last or stopping:
            break

        # One step: losses are summed over micro-batches and processes, then divided by targets.
        begin, share = time.perf_counter(), lr_share(step, cfg)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * share
        # Dropout's draws, too, are a function of seed and step.
        torch.manual_seed((cfg.seed * 1_000_003 + step) * world.size + world.rank)
        loss_sum, targets, tokens = 0.0, 0, 0
        for micro in range(cfg.grad_accum):
            batch = train_set.batch(step, world.rows(micro, cfg.batch_size))
            src, tgt, loss_mask = to_device(batch, world.device)
            with world.autocast():
                loss = model(src, tgt, loss_mask)  # summed over the targets
            (loss * world.scale).backward()
            loss_sum = loss_sum + loss.detach()
            targets, tokens = targets + int(batch[2].sum()), tokens + count_tokens(batch, pad)
        targets, tokens = map(float, world.sum(targets, tokens))
        world.sum_gradients(params)
        grads = [p.grad for p in params if p.grad is not None]
        # Until here gradients are sums over the targets, from here on means.
        torch._foreach_div_(grads, max(1.0, targets) * world.scale)
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        loss_sum, norm = torch.stack((loss_sum, norm)).tolist()  # here a step waits for its GPU
        loss = world.sum(loss_sum)[0] / max(1, targets)
        if world.usable(loss, norm, step, cfg):
            for optimizer in optimizers:
                optimizer.step()
        model.zero_grad(set_to_none=True)

        # What it took.
        seconds.append(time.perf_counter() - begin)
        row = dict(step=step, time_s=state["time_s"], tokens=state["tokens"], lr=cfg.lr * share)
        log.add(row | dict(loss=loss))
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
