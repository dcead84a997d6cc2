"""Measures what models cost and what they can do. The first word says what:

    python bench.py speed        first token and tokens/s of generating, in torch and ONNX Runtime
    python bench.py flops        of a forward pass, counted from the shapes
    python bench.py memory       weights and caches while generating
    python bench.py train        tokens/s of training, Hugging Face's T5 beside ours
    python bench.py vision       a picture: its tokens, the tower, the first token of an answer
    python bench.py quality --run=RUN                   scores a run on held-out rows
    python bench.py compare --data=TASK                 trains, scores and judges the architectures
    python bench.py distill --data=TASK --teacher=RUN   the ablation of distillation

`python bench.py COMMAND --help` lists its keys. A time is a median after a warm-up. An engine has a
process of its own, so that its memory and threads are not another's. A machine's speed drifts:
compare rows of one sitting, as ratios; a column KEY/dec is a row's share of the decoder-only row.

Each command is a function, bench_COMMAND; below it stands what it needs. COMMANDS, at the end,
names them and their settings.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from data import metrics
from data.corpus import prepare
from data.evaluate import task_metrics, text_metrics
from data.images import VisionConfig, n_tokens, prepare_image, read_vision
from data.objectives import make_batch
from data.picture_tasks import PicturePairs, is_picture_task, load_picture_task
from data.sets import Pairs, TextSet, decoder_only
from data.tasks import is_task, load_task
from data.tokenizer import load_tokenizer
from lib.device import StaticSteps, compile_parts, pack, start, to_device
from lib.runs import ROOT, newest_run, read_run, replacing, write_json
from lib.settings import UserError, printable, progress, read_settings, script, setting
from model import PRESETS, Transformer, count_params, make_config

SPLITS = ["1/3", "1/2", "2/3"]  # the encoder's share of the layers
ARCHS = ["dec", "prefix", *SPLITS]  # decoder-only: causal, prefix LM
ENGINES = "torch compiled onnx-fp32 onnx-fp16 onnx-int8 onnx-int4 nocache t5".split()


@dataclass
class Cost:
    preset: str = setting(None, "size [330m; of train: small]", tuple(PRESETS))
    archs: str = setting("dec,2/3", f"some of {', '.join(ARCHS)}")
    engine: str = setting(None, f"some of {', '.join(ENGINES)}; train: torch, t5")
    src: str = setting("512", "tokens in; speed: several, separated by commas, are a sweep")
    new: str = setting("128", "tokens out; speed: several are a sweep")
    batch: str = setting("1", "rows at once; speed: several are a sweep")
    repeats: int = setting(5, "requests or steps behind each median", low=1, high=1000)
    grad_accum: int = setting(1, "train: forward passes a step", low=1, high=2**16)
    compile: str = setting("auto", "train: torch.compile", ("auto", "true", "false"))
    tower: str = setting("large", "vision: large is CLIP's ViT-L/14-336", ("tiny", "large"))
    grid: int = setting(3, "vision: tiles a side", high=64)
    tokens: str = setting("all,variance", "vision: some of all, variance, learned, concat")
    keep: float = setting(0.33, "vision: share of the tiles that stays", low=1e-4, high=1)
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = setting("auto", "of torch's engines", ("auto", "float32", "bfloat16", "float16"))
    threads: int = setting(0, "CPU threads; 0 is the engine's choice", high=4096)
    seed: int = setting(1337, "of weights and prompts")
    plot: str = setting(None, "speed: draw the sweep into this file")
    json: str = setting(None, "write the rows to this file")


def config_of(preset, arch, src, new):
    """The Config of one of ARCHS."""
    kind = ("encdec", arch) if "/" in arch else (arch,)
    return make_config(preset, *kind, src_len=src, tgt_len=new)


def named(arch, **more):
    """The first fields of a row."""
    return dict(arch="encdec" if "/" in arch else arch, split=arch, **more)


# ----------------------------------------------------------------------------------------------
# speed


def bench_speed(cfg):
    """Generates with random weights, on which speed does not depend. The paper's table 2, 2/3
    beside decoder-only: first token 0.71 and tokens/s 3.8 on a CPU, 0.58 and 3.9 on a GPU."""
    cfg.preset = cfg.preset or "330m"
    cfg.engine = cfg.engine or "torch,onnx-fp32,onnx-int8,onnx-int4"
    archs, engines = chosen(cfg, "archs", ARCHS), chosen(cfg, "engine", ENGINES)
    shapes = list(itertools.product(*(numbers(cfg, name) for name in ("src", "new", "batch"))))
    jobs = [(time_engine, cfg, arch, engine, shapes) for engine in engines for arch in archs]
    # T5 has an encoder; a prefix LM has no ONNX export.
    able = dict(t5=SPLITS, torch=ARCHS, compiled=ARCHS)
    rows = measured([job for job in jobs if job[2] in able.get(job[3], ["dec", *SPLITS])])
    beside_dec(rows, ("engine", "batch", "src", "new"), "first_ms", "tok_s")
    title = f"{cfg.preset}: ms to the first token, and tokens/s after it; medians of {cfg.repeats}"
    table(title, rows, "arch cache")
    if cfg.plot:
        plot_speed(rows, cfg.plot)
    return rows


def time_engine(cfg, arch, engine, shapes):
    """Rows of one engine: all shapes (tokens in, tokens out, rows at once)."""
    world, rng, rows = start(cfg), np.random.default_rng(cfg.seed), []
    src, new, _ = (max(lengths) for lengths in zip(*shapes))
    config = config_of(cfg.preset, arch, src, new)
    generate, params = make_engine(engine, config, cfg, world)
    for src, new, batch in shapes:
        seconds = []  # to the first token, and from it to the last
        for _ in range(cfg.repeats + 1):
            prompts = rng.integers(5, config.vocab_size, (batch, src)).tolist()
            begin = time.perf_counter()
            marks = [time.perf_counter() - begin for _ in generate(prompts, new)]
            seconds.append((marks[0], marks[-1] - marks[0]))
        firsts, rests = zip(*seconds[1:])  # the first request warms up
        row = named(arch, engine=engine, cache=engine != "nocache", batch=batch, src=src, new=new)
        row |= dict(params_m=round(params / 1e6, 1), first_ms=milliseconds(firsts))
        row["tok_s"] = round(batch * (new - 1) / statistics.median(rests), 2) if new > 1 else None
        rows.append(row | dict(spread=spread(rests if new > 1 else firsts)))
    return rows


def make_engine(engine, config, cfg, world):
    """(generate, parameters): generate(prompts, new) yields the new ids of every step."""
    with torch.device("cpu" if engine.startswith("onnx-") else world.device):
        model = (PeerT5 if engine == "t5" else Transformer)(config).eval()
    params = sum(p.numel() for p in model.parameters())
    config.eos_id = -1  # no answer ends early
    if engine.startswith("onnx-"):
        from export import write
        from lib.runtime import Exported

        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            write(model, f"{folder}/export", engine[5:])
            del model
            twin = Exported(f"{folder}/export", cfg.threads, world.device.type)
        return twin.generate, params
    model = model.to(world.dtype)
    if engine == "t5":
        return model.generate, params
    model = world.place(model)
    if engine == "nocache":
        return lambda prompts, new: generate_without_cache(model, prompts, new), params
    if engine == "compiled":
        for block in (*model.enc, *model.dec):  # prompts are read by both
            block.compile()
        StaticSteps(model, mode="reduce-overhead")
        return model.generate, params  # torch.compile packs matrices itself
    return pack(model).generate, params


@torch.inference_mode()
def generate_without_cache(model, prompts, new):
    """What the paper's released code does: the decoder reads its whole prefix at every step."""
    ids = torch.tensor(prompts, device=model.embed.weight.device)
    bos = torch.full_like(ids[:, :1], model.config.bos_id)
    encoded = model.encode(ids) if model.config.n_enc else None
    tokens = bos if model.config.n_enc else torch.cat((bos, ids), 1)
    for _ in range(new):
        token = model.next_logits(model.decode(tokens, encoded)).argmax(-1, keepdim=True)
        tokens = torch.cat((tokens, token), 1)
        yield token[:, 0].tolist()


class PeerT5(torch.nn.Module):
    """Hugging Face's T5 (v1.1) of the same widths and layers, called as a Transformer is. It has no
    grouped-query attention: where ours has, from 330m on, it is larger."""

    def __init__(self, config):
        from transformers import T5Config, T5ForConditionalGeneration

        super().__init__()
        shape = dict(d_model=config.n_embd, d_kv=config.head_dim, num_heads=config.n_head)
        shape |= dict(d_ff=config.n_hidden, num_layers=config.n_enc, vocab_size=config.vocab_size)
        shape |= dict(num_decoder_layers=config.n_dec, decoder_start_token_id=0, dropout_rate=0.0)
        more = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=True)
        self.t5 = T5ForConditionalGeneration(T5Config(**shape, **more))
        self.embed = self.t5.shared

    def forward(self, src, tgt, mask):
        return self.t5(input_ids=src, labels=tgt).loss * mask.sum()

    @torch.inference_mode()
    def generate(self, prompts, new):
        ids = torch.tensor(prompts, device=self.t5.device)
        encoded, token, past = self.t5.encoder(ids), torch.zeros_like(ids[:, :1]), None
        for _ in range(new):
            inputs = dict(encoder_outputs=encoded, decoder_input_ids=token, past_key_values=past)
            out = self.t5(**inputs, use_cache=True)
            past, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
            yield token[:, 0].tolist()


def plot_speed(rows, path):
    """First token and tokens/s over what was swept."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    swept = max(("src", "new", "batch"), key=lambda name: len({row[name] for row in rows}))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, key in zip(axes, ("first_ms", "tok_s")):
        for curve in dict.fromkeys((row["split"], row["engine"]) for row in rows):
            points = [row for row in rows if (row["split"], row["engine"]) == curve]
            x, y = [row[swept] for row in points], [row[key] for row in points]
            axis.plot(x, y, "o-", label=", ".join(curve))
        axis.set(xlabel=swept, ylabel=key, xscale="log")
        axis.legend(fontsize=8)
    with replacing(path) as new:
        figure.savefig(new, dpi=120, format=path.rpartition(".")[2])


# ----------------------------------------------------------------------------------------------
# flops and memory


def flops(cfg, src, new):
    """FLOPs of one forward pass over one row of a model with this Config, a multiply-add counted as
    two; training costs three times that. A decoder-only model reads src + new positions. Logits are
    counted where the answer is predicted, since nobody needs a prompt's. Causal attention is
    counted in full, as most papers do."""
    C, look = cfg.n_embd, 4 * cfg.n_head * cfg.head_dim  # look: of one query at one key and value
    queries, keys = C * look, 4 * C * cfg.n_kv_head * cfg.head_dim  # of one token
    mlp = (6 if cfg.mlp == "swiglu" else 4) * C * cfg.n_hidden
    token, T = queries + keys + mlp, new if cfg.n_enc else src + new
    enc = cfg.n_enc * src * (token + look * src)
    dec = cfg.n_dec * T * (token + look * T)
    cross = cfg.n_dec * (src * keys + T * (queries + look * src)) if cfg.n_enc else 0
    return enc + dec + cross + 2 * new * C * cfg.vocab_size


def bench_flops(cfg):
    cfg.preset, rows = cfg.preset or "330m", []
    (src,), (new,) = numbers(cfg, "src", 1), numbers(cfg, "new", 1)
    for arch in chosen(cfg, "archs", ARCHS):
        config = config_of(cfg.preset, arch, src, new)
        row = named(arch, src=src, new=new, params_m=round(count_params(config) / 1e6, 1))
        rows.append(row | dict(gflop=round(flops(config, src, new) / 1e9, 3)))
    beside_dec(rows, (), "gflop")
    table(f"{cfg.preset}: GFLOP of one row through the model, logits of the answer alone", rows)
    return rows


def bench_memory(cfg):
    """`cache` keeps keys and values of cross-attention for every layer, as this code does.
    `small_cache` keeps the encoder's last states instead and would compute keys and values again at
    every step, which is how the paper counts."""
    cfg.preset, rows = cfg.preset or "330m", []
    (src,), (new,), (batch,) = (numbers(cfg, name, 1) for name in ("src", "new", "batch"))
    for arch in chosen(cfg, "archs", ARCHS):
        config = config_of(cfg.preset, arch, src, new)
        peak, itemsize = apart(peak_of_one_row, cfg, arch, src, new)
        weights, slot = count_params(config), 2 * config.n_dec * config.n_kv_head * config.head_dim
        cache = slot * (src + new)
        small = slot * new + src * config.n_embd if config.n_enc else cache
        counts = dict(weights=weights, cache=batch * cache, small_cache=batch * small)
        counts |= dict(total=weights + batch * cache, one_row=weights + cache)
        counts = {f"{name}_mb": round(n * itemsize / 1e6) for name, n in counts.items()}
        counts["one_row_peak_mb"] = peak
        rows.append(named(arch, batch=batch, src=src, new=new) | counts)
    beside_dec(rows, (), "total_mb")
    table(f"{cfg.preset}: MB counted for --batch rows, and measured for one", rows)
    return rows


def peak_of_one_row(cfg, arch, src, new):
    """MB that generating for one row takes at most, the libraries' own not counted; bytes of a
    number."""
    world = start(cfg)
    before = peak_memory(world.device)
    with torch.device("meta"):
        model = Transformer(config_of(cfg.preset, arch, src, new))
    model = world.place(model.to(world.dtype).to_empty(device=world.device).eval())
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    next(model.generate([[5] * src], new))  # the caches are made whole before the first token
    return peak_memory(world.device) - before, world.dtype.itemsize


def peak_memory(device):
    """MB that this process has held at most: of the GPU's memory, or resident, which Linux tells.
    Elsewhere 0."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 1e6)
    for line in lines_of("/proc/self/status"):
        if line.startswith("VmHWM"):
            return round(int(line.split()[1]) * 1024 / 1e6)
    return 0


# ----------------------------------------------------------------------------------------------
# train


def bench_train(cfg):
    """Whole optimizer steps on random rows of a task: only targets have a loss. Ours with Muon, T5
    with AdamW."""
    cfg.preset, cfg.engine = cfg.preset or "small", cfg.engine or "torch,t5"
    archs, engines = chosen(cfg, "archs", ARCHS), chosen(cfg, "engine", ("torch", "t5"))
    shape = [numbers(cfg, name, 1)[0] for name in ("batch", "src", "new")]
    jobs = [(time_training, cfg, arch, engine, shape) for engine in engines for arch in archs]
    rows = measured([job for job in jobs if job[3] != "t5" or job[2] in SPLITS])
    beside_dec(rows, (), "tok_s")
    each = f"{shape[0] * cfg.grad_accum} rows a step of {shape[1]} + {shape[2]} tokens"
    table(f"{cfg.preset}: {each}; tokens/s count both (the paper: tok_s/dec is 1.40)", rows)
    return rows


def wait(world):
    """For the device to finish what it was given."""
    if world.device.type in ("cuda", "mps"):
        torch.accelerator.synchronize()


def time_training(cfg, arch, engine, shape):
    """The row of one engine, in a list."""
    from train import make_optimizers

    world, rng, (batch, src_len, new) = start(cfg), np.random.default_rng(cfg.seed), shape
    config = config_of(cfg.preset, arch, src_len, new)
    width = new if config.n_enc else src_len + new
    tgt = rng.integers(5, config.vocab_size, (batch, width))
    mask = np.broadcast_to(np.arange(width) >= width - new, tgt.shape).copy()
    if config.n_enc:
        src = rng.integers(5, config.vocab_size, (batch, src_len))
    else:
        src = np.cumsum(mask, axis=1) <= mask if config.src_len else None  # a prefix LM's prompt
    model = PeerT5(config) if engine == "t5" else world.place(Transformer(config))
    model = model.to(world.device)
    rates = dict(lr=1e-4, embed_lr=1e-4, weight_decay=0.1)
    rates["optimizer"] = "adamw" if engine == "t5" else "muon"
    optimizers = make_optimizers(model, SimpleNamespace(**rates), world)
    compiled = world.compile and engine != "t5"
    if compiled:
        compile_parts(model, [(src, tgt, mask)], world)
    seconds, (src, tgt, mask) = [], to_device((src, tgt, mask), world.device)
    for _ in range(cfg.repeats + 2):
        begin = time.perf_counter()
        for _ in range(cfg.grad_accum):
            with world.autocast():
                loss = model(src, tgt, mask) / mask.sum()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        wait(world)
        seconds.append(time.perf_counter() - begin)
    seconds, rows = seconds[2:], batch * cfg.grad_accum  # the first two steps warm up
    rate = rows / statistics.median(seconds)
    row = named(arch, engine=engine, src=src_len, new=new, batch=batch, rows=rows)
    row |= dict(dtype=str(world.dtype)[6:], compiled=compiled, step_ms=milliseconds(seconds))
    row |= dict(spread=spread(seconds), tok_s=round(rate * (src_len + new)))
    row["gflop_s"] = round(3 * rate * flops(config, src_len, new) / 1e9)
    return [row | dict(peak_mb=peak_memory(world.device))]


# ----------------------------------------------------------------------------------------------
# vision


def bench_vision(cfg):
    cfg.preset = cfg.preset or "330m"
    kinds = chosen(cfg, "tokens", ("all", "variance", "learned", "concat"))
    archs = chosen(cfg, "archs", ["dec", *SPLITS])
    rows = measured([(time_picture, cfg, arch, kind) for arch in archs for kind in kinds])
    title = f"{cfg.preset}, one picture: its tokens; ms to cut it and select, in the tower and the"
    table(f"{title} projector, and to the first token after that; medians of {cfg.repeats}", rows)
    return rows


def time_picture(cfg, arch, tokens):
    """The row of one way to choose tokens, in a list. A prompt of 16 tokens asks."""
    from vision import TOWERS, VisionLM

    world, image_id, seconds = start(cfg), 5, []
    choice = dict(grid=cfg.grid, tokens=tokens, keep=cfg.keep, image_id=image_id)
    vision = VisionConfig(**TOWERS[cfg.tower], **choice).check()
    side = vision.image_size * max(1, cfg.grid)
    noise = np.random.default_rng(cfg.seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    image, n = Image.fromarray(noise), n_tokens(side, side, vision)
    model = VisionLM(config_of(cfg.preset, arch, n + 64, 64), vision)
    model = world.place(model.to(world.dtype).eval())
    for _ in range(cfg.repeats + 1):
        marks = [time.perf_counter()]
        picture = prepare_image(image, vision)
        marks.append(time.perf_counter())
        images, _ = model.see([picture])
        wait(world)
        marks.append(time.perf_counter())
        next(model.generate([[image_id] * n + [*range(10, 26)]], 1, images=images))
        marks.append(time.perf_counter())
        seconds.append(np.diff(marks))
    row = named(arch, tokens=tokens, tiles=len(picture.tiles), n_tokens=n)
    for name, measures in zip(("prepare_ms", "tower_ms", "first_ms"), zip(*seconds[1:])):
        row[name] = milliseconds(measures)
    return [row]


# ----------------------------------------------------------------------------------------------
# quality


@dataclass
class Quality:
    run: str = setting(None, "run folder [the newest in out/]")
    data: str = setting(None, "a task or a text [what the run was trained on]")
    eval_split: str = setting("val", "which held-out rows", ("val", "test"))
    eval_rows: int = setting(0, "how many of them, evenly spaced; 0 is all", high=2**20)
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = setting("auto", "of matrix products", ("auto", "float32", "bfloat16"))
    threads: int = setting(0, "CPU threads; 0 is torch's choice", high=4096)
    seed: int = setting(1337, "text: of the holes")
    json: str = setting(None, "write the rows to this file")


def bench_quality(cfg):
    cfg.run = (cfg.run or newest_run()).rstrip("/")
    row = score_run(cfg)
    row.pop("row_scores", None)
    table(f"{cfg.run}; losses in nats a target token, scores in percent", [row], "run metric")
    return [row]


def score_run(cfg):
    """The row of a run. Of a task, row_scores is what each held-out row adds to the score."""
    about, begin = SimpleNamespace(**read_run(cfg.run)["settings"]), time.perf_counter()
    for name, kind in dict(data=str, src_len=int, tgt_len=int, max_tokens=int | None).items():
        if not isinstance(getattr(about, name, None), kind):
            raise UserError(f"{cfg.run}/run.json: {name} is of the wrong type")
    cfg.data, is_text = cfg.data or about.data, about.objective != "seq2seq"
    if is_text and (is_task(cfg.data) or cfg.eval_split != "val"):
        raise UserError(f"--run={cfg.run} was trained on text: score it on text, --eval_split=val")
    world, load_model = start(cfg), Transformer.load
    if read_vision(cfg.run):
        from vision import load_model
    model = world.place(load_model(cfg.run, device=world.device)).eval()
    shape = model.config
    about.arch = ("dec", "prefix", "encdec")[(shape.n_enc > 0) + (shape.src_len > 0)]
    found = (score_text if is_text else score_task)(model, about, cfg, world)
    params_m = round(model.num_params() / 1e6, 3)
    row = dict(run=cfg.run, data=cfg.data, split=cfg.eval_split, params_m=params_m)
    row |= {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}
    return row | dict(seconds=round(time.perf_counter() - begin, 1))


def score_task(model, about, cfg, world):
    """Scores of greedy answers, and both losses. Writes predictions.jsonl into the run folder, with
    the names that the ragas library reads."""
    vision, lengths = read_vision(cfg.run), (about.src_len, about.tgt_len, decoder_only(about))
    columns = [getattr(about, name, None) for name in ("source_col", "target_col")]
    if vision or (is_task(cfg.data) and cfg.data != about.data):  # which has columns of its own
        columns = []
    task = (load_picture_task if vision else load_task)(cfg.data, *columns, say=world.say)
    rows, answers = task.splits.get(cfg.eval_split), {}
    if not rows:
        known = ", ".join(split for split, rows in task.splits.items() if rows)
        raise UserError(f"--eval_split={cfg.eval_split}: {cfg.data} has rows of {known}")

    def keep(texts, rows):  # the evaluation is that of training; here the answers are wanted, too
        answers.update(zip(map(id, rows), texts))
        return task.score(texts, rows)

    held_out = SimpleNamespace(task=replace(task, score=keep))
    if vision:
        from vision import evaluate

        held_out.pairs = PicturePairs(rows, load_tokenizer(f"{cfg.run}/"), *lengths, vision)
        found = evaluate(model, held_out, cfg, world, step=1)
    else:
        held_out.pairs = Pairs(rows, load_tokenizer(f"{cfg.run}/"), *lengths)
        found = task_metrics(model, held_out, cfg.eval_rows, world)
    metric = next(name for name in found if not name.endswith("_loss"))
    scored = [(row, answers[id(row)]) for row in rows if id(row) in answers]
    with replacing(f"{cfg.run}/predictions.jsonl") as new, open(new, "w", encoding="utf-8") as file:
        for row, text in scored:
            line = dict(user_input=row.get("question", row["source"]), response=text)
            context = [row.get("context", row["source"])]
            line |= dict(reference=row["target"], retrieved_contexts=context)
            file.write(json.dumps(line) + "\n")
    digest = hashlib.sha256(json.dumps([(r["source"], r["target"]) for r, _ in scored]).encode())
    row = dict(rows=len(scored), rows_hash=digest.hexdigest()[:12], metric=metric, **found)
    return row | dict(row_scores=[row_score(task, *pair, metric) for pair in scored])


def score_text(model, about, cfg, world):
    """Losses of held-out text by the run's own objective, and the loss of going on with a text."""
    corpus = prepare(cfg.data, f"{cfg.run}/", log=world.say, most=vars(about).get("max_tokens"))
    about.data, about.seed = cfg.data, cfg.seed
    valid_set = TextSet(corpus, "val", about)
    found = text_metrics(model, valid_set, cfg.eval_rows, 32, world)
    found["perplexity"] = math.exp(min(700, found["val_loss"]))
    n_tokens, after = len(valid_set.tokens), max(1, about.tgt_len - 1)
    before, n_rows = max(1, min(about.src_len - 2, n_tokens - after)), cfg.eval_rows or 1024
    starts, sizes = np.linspace(before, n_tokens - after, n_rows).astype(int), (before, after)
    found["continuation_loss"] = continuation_loss(model, valid_set, about, starts, sizes, world)
    return found


@torch.no_grad()
def continuation_loss(model, valid_set, about, starts, sizes, world):
    """Nats a token of held-out text, given the text before it: by this, runs of different
    objectives can be compared. A span run fills a hole behind the text. sizes: tokens before
    each of the starts, and after it."""
    tokenizer, total, (before, after) = valid_set.tokenizer, 0.0, sizes
    for group in np.array_split(starts, math.ceil(len(starts) / 32)):
        ids = valid_set.tokens.windows(group - before, before + after)
        sources, targets = ids[:, :before], ids[:, before:]
        if about.objective == "span":
            hole = np.full_like(ids[:, :1], tokenizer.sentinel(0))
            sources = np.concatenate((sources, hole, np.full_like(hole, tokenizer.eos)), 1)
            targets = np.concatenate((hole, targets), 1)
        if about.objective == "causal":
            sources, targets = None, ids
        src, tgt, mask = make_batch(sources, targets, tokenizer, decoder_only(about))
        mask[:, :-after] = False
        with world.autocast():
            total += model(*to_device((src, tgt, mask), world.device)).item()
    return total / (len(starts) * after)


# ----------------------------------------------------------------------------------------------
# What a row adds to a score, and the bootstrap

BLEU = {metrics.score_translation: "13a", metrics.score_code: "none"}  # sacrebleu's words


def row_score(task, row, text, metric):
    """A list of numbers, whose sums over rows make the score. BLEU is no mean over rows: its
    numbers are counts of n-grams."""
    if metric != "bleu":
        return [round(task.score([text], [row])[metric], 3)]
    import sacrebleu

    found = sacrebleu.corpus_bleu([text], [[row["target"]]], tokenize=BLEU[task.score], force=True)
    return [*found.counts, *found.totals, found.sys_len, found.ref_len]


def score_of(sums, n_rows):
    """The scores (n,) that sums (n, k) of n_rows row_scores make."""
    if sums.shape[1] == 1:
        return sums[:, 0] / n_rows
    from sacrebleu.metrics import BLEU as bleu

    rows = sums.astype(int).tolist()
    return np.array([bleu.compute_bleu(s[:4], s[4:8], *s[8:], "exp").score for s in rows])


def bootstrap(ours, theirs, draws=4000, seed=0):
    """Row scores of two kinds of runs, (seeds, rows, k) each, on the same rows -> (lead, low,
    high): the lead of the mean over the seeds, and its 95% interval.

    Each draw takes rows with replacement, the same for all runs (Koehn, 2004). What other seeds
    would change is added to it as Welch's t has it: few seeds tell little of their own spread."""
    rng, n_rows, leads = np.random.default_rng(seed), ours.shape[1], np.empty(draws)
    for draw in range(draws):
        times = np.bincount(rng.integers(n_rows, size=n_rows), minlength=n_rows)
        means = (score_of(times @ side, n_rows).mean() for side in (ours, theirs))
        leads[draw] = np.subtract(*means)
    scores = [score_of(side.sum(1), n_rows) for side in (ours, theirs)]
    errors = [side.var(ddof=min(1, len(side) - 1)) / len(side) + 1e-12 for side in scores]
    parts = [error**2 / max(1, len(side) - 1) for error, side in zip(errors, scores)]
    leads += math.sqrt(sum(errors)) * rng.standard_t(sum(errors) ** 2 / sum(parts), draws)
    low, high = np.percentile(leads, (2.5, 97.5))
    return float(scores[0].mean() - scores[1].mean()), float(low), float(high)


# ----------------------------------------------------------------------------------------------
# compare and distill


@dataclass
class Compare:
    data: str = setting("docstring", "a task, as in train.py")
    preset: str = setting("nano", "size", tuple(PRESETS))
    archs: str = setting(None, f"some of {', '.join(ARCHS)} [all but prefix; distill: 2/3]")
    seeds: int = setting(3, "runs of each, with the seeds 1, 2, 3 ...", low=1, high=1000)
    max_iters: int = setting(None, "equal tokens: steps of every run", low=1)
    max_minutes: float = setting(None, "equal minutes: as many steps as fit", low=1e-3)
    train: str = setting("", "more keys of the script; of one arch: --train=2/3:--lr=1e-3")
    init_from: str = setting(None, "run to begin with: out/{arch}-{split}-{seed}, 2/3 being 23")
    teacher: str = setting(None, "of distill.py: each run also distilled from it")
    distill: str = setting("", "more keys of distill.py: --distill='--alpha=0.9'")
    eval_split: str = setting("val", "which held-out rows are scored, all", ("val", "test"))
    results: str = setting(None, "file of finished runs [out/compare-DATA.jsonl]")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    threads: int = setting(0, "CPU threads; 0 is torch's choice", high=4096)
    json: str = setting(None, "write the rows to this file")


# The ablation varies one thing at a time, from alpha 0.5, tau 1, reverse KL and the student's own
# answers: the paper's Figure 5, and what its released code does. The first is cross-entropy alone,
# the second the same on the teacher's answers.
ABLATION = "--alpha=0|--alpha=0 --sequences=teacher|--alpha=0.1|--alpha=0.5|--alpha=0.9|--tau=2"
ABLATION += "|--kl=forward|--kl=forward --alpha=0.9|--sequences=teacher|--sequences=data"
TO_READ = 0.3  # nats that a run which reads its source loses without it


def bench_compare(cfg):
    """Trains and scores decoder-only and the splits of the encoder-decoder, and judges them.

    The rule, fixed before any run:
    1. A run whose shuffled loss is not at least 0.3 nats above its loss has not learnt to read its
       source. It makes a comparison invalid, not won. With pictures, the loss on blank ones counts.
    2. A lead is the mean difference of the task's own metric over the seeds. Its 95% interval comes
       from a bootstrap over test rows, paired, and Welch's t over seeds, of which there are two
       or more. It counts only if the interval excludes zero under equal tokens and equal minutes.
    3. Runs are by steps, so that a busy machine changes nothing. Equal tokens are --max_iters steps
       of each. Equal minutes are --max_minutes over the time of a step, and those times are
       measured for all in turns, in one quiet sitting.
    4. Settings are chosen on val. Test rows are scored once, with --eval_split=test.

    A verdict needs --max_iters and --max_minutes. Every finished run is a line of the results file,
    with its score of each row, and is not run again. What was cut off goes on from its checkpoint.
    With --teacher, all runs go through distill.py: cross-entropy is alpha 0 there."""
    ways = {"cross-entropy": None}
    if cfg.teacher:
        ways = {"cross-entropy": "--alpha=0", "distilled": cfg.distill}
    return compare(cfg, ",".join(["dec", *SPLITS]), ways)


def bench_distill(cfg):
    """The ablation of distillation: ways to distil, judged by the rule of compare."""
    if not cfg.teacher:
        raise UserError("--teacher is missing: a run of train.py --arch=dec, or hf:FOLDER_OR_ID")
    ways = {words: f"{cfg.distill} {words}".strip() for words in ABLATION.split("|")}
    return compare(cfg, "2/3", ways)


def compare(cfg, archs, ways):
    """ways: names of ways to train -> keys of distill.py, None for train.py or vision.py alone."""
    cfg.archs = cfg.archs or archs
    archs = chosen(cfg, "archs", ARCHS)
    try:
        shlex.split(f"{cfg.train} {cfg.distill}")
    except ValueError as error:
        raise UserError(f"--train={cfg.train} --distill={cfg.distill}: {error}") from None
    if not (cfg.max_iters or cfg.max_minutes):
        raise UserError("give --max_iters, for equal tokens, --max_minutes, or both")
    name = cfg.data.strip("/").replace(":", "-").replace("/", "-")
    cfg.results = cfg.results or os.path.join("out", f"compare-{name}.jsonl")
    os.makedirs(os.path.dirname(os.path.abspath(cfg.results)), exist_ok=True)
    common = dict(data=cfg.data, preset=cfg.preset, init_from=cfg.init_from, teacher=cfg.teacher)
    steps, kinds = {}, {}
    for arch, way in itertools.product(archs, ways):
        kind = dict(arch=arch, train=own_words(cfg.train, arch), distill=ways[way])
        kinds[arch, way] = common | kind
    if cfg.max_iters:
        steps |= {("equal tokens", *name): cfg.max_iters for name in kinds}
    if cfg.max_minutes:
        times = step_times(cfg, kinds)
        for name, seconds in times.items():
            steps["equal minutes", *name] = max(1, int(60 * cfg.max_minutes / seconds))
    groups = {name: [] for name in steps}
    for seed, name in progress(list(itertools.product(range(1, cfg.seeds + 1), groups)), "runs"):
        groups[name].append(run_trial(cfg, kinds[name[1:]] | dict(steps=steps[name], seed=seed)))
    return report(cfg, groups)


def read_results(path):
    """The rows of a .jsonl file. A line that a kill cut off is left out."""
    rows = []
    for line in lines_of(path):
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def add_result(path, row):
    """Appends a row, on a line of its own even where the last one was cut off."""
    whole = all(line.endswith("\n") for line in lines_of(path))
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" * (not whole) + json.dumps(row) + "\n")


def alike(row, other):
    """Whether a row has all that the other has."""
    return all(row.get(key) == value for key, value in other.items())


def own_words(text, arch):
    """The keys of --train that are for every architecture or for this one."""
    others = tuple(f"{other}:--" for other in ARCHS if other != arch)
    words = [word.removeprefix(f"{arch}:") for word in shlex.split(text)]
    return shlex.join(word for word in words if not word.startswith(others))


def training(cfg, trial, out):
    """The command that trains a trial into the folder `out`."""
    arch, distilled = trial["arch"], trial["distill"] is not None
    names = dict(arch="encdec" if "/" in arch else arch, split=arch.replace("/", ""))
    names["seed"] = str(trial["seed"])
    words = [f"--data={trial['data']}", "--objective=seq2seq", f"--seed={trial['seed']}"]
    words += [f"--max_iters={trial['steps']}", f"--device={cfg.device}", f"--threads={cfg.threads}"]
    if trial["init_from"]:  # which decides the shape
        words.append(f"--{'student' if distilled else 'init_from'}={trial['init_from']}")
    else:
        words.append(f"--{'student' if distilled else 'preset'}={trial['preset']}")
        words += ["--arch=encdec", f"--split={arch}"] if "/" in arch else [f"--arch={arch}"]
    words += shlex.split(trial["train"])
    if distilled:
        words += [f"--teacher={cfg.teacher}", *shlex.split(trial["distill"])]
    for key, value in names.items():
        words = [word.replace("{" + key + "}", value) for word in words]
    alone = "vision.py" if is_picture_task(cfg.data) else "train.py"
    return ["distill.py" if distilled else alone, *words, f"--out={out}"]


def call(words):
    done = subprocess.run([sys.executable, os.path.join(ROOT, words[0]), *words[1:]], stdout=2)
    if done.returncode:
        raise UserError(f"{shlex.join(words)}: status {done.returncode}; see what it said above")


def step_times(cfg, kinds, rounds=3, steps=24, warm=8):
    """{name: seconds a step} of each kind of run, all from one sitting, where they take turns. A
    sitting is a line of the results file. One that has all of these kinds is used again."""
    where = dict(device=cfg.device, threads=cfg.threads)
    for row in read_results(cfg.results):
        sitting = row.get("step_times", []) if alike(row, where) else []
        found = {name: s for name, kind in kinds.items() for known, s in sitting if known == kind}
        if len(found) == len(kinds):
            return found
    seconds = {name: [] for name in kinds}
    for _, name in progress(list(itertools.product(range(rounds), kinds)), "times of a step"):
        with tempfile.TemporaryDirectory() as folder:
            words = training(cfg, kinds[name] | dict(seed=1, steps=steps), f"{folder}/run")
            call([*words, f"--eval_interval={steps}", "--eval_rows=2"])
            log = read_results(f"{folder}/run/log.jsonl")
        begin = next(row["time_s"] for row in log if row["step"] == warm)
        seconds[name].append((log[-1]["time_s"] - begin) / (steps - warm))
    unrest = max(max(times) / min(times) for times in seconds.values()) - 1
    print(f"times of a step: rounds of one kind differ by up to {unrest:.0%}", file=sys.stderr)
    times = {name: statistics.median(times) for name, times in seconds.items()}
    sitting = [(kinds[name], s) for name, s in times.items()]
    about = dict(step_times=sitting, unrest=round(unrest, 3), machine=machine(cfg))
    add_result(cfg.results, where | about)
    return times


def run_trial(cfg, trial):
    """The row of one run: from the results file, or trained, scored and added to it."""
    for row in read_results(cfg.results):
        if alike(row, trial | dict(split=cfg.eval_split)):
            return row
    mark = hashlib.sha256(json.dumps(trial).encode()).hexdigest()[:6]
    name = f"{trial['preset']}-{trial['arch'].replace('/', '')}-{trial['seed']}-{mark}"
    out = os.path.join(os.path.splitext(cfg.results)[0], name)
    words = training(cfg, trial, out)
    if os.path.exists(f"{out}/train_state.pt"):  # cut off, or scored on another split before
        words = [words[0], "--init_from=resume", f"--out={out}"]
    else:
        shutil.rmtree(out, ignore_errors=True)
    call(words)
    how = dict(eval_split=cfg.eval_split, device=cfg.device, threads=cfg.threads)
    row = apart(score_run, Quality(run=out, **how))
    last = read_results(f"{out}/log.jsonl")[-1]
    row |= dict(train_s=last["time_s"], tokens_m=last["tokens"] / 1e6, machine=machine(cfg))
    add_result(cfg.results, row | trial)
    return row | trial


def judge(ours, theirs):
    """The rule, for the runs of two kinds -> a dict. verdict: leads, trails, undecided, which one
    seed always is, or why the comparison is invalid."""
    for run in [*ours, *theirs]:
        worth = run.get("shuffled_loss", run.get("blank_loss", 0)) - run["val_loss"]
        if worth < TO_READ:
            who = f"{run['arch']}, seed {run['seed']}, has not learnt to read its source"
            return dict(verdict=f"invalid: {who}, which is worth {worth:.2f} nats to it")
    if len({run["rows_hash"] for run in [*ours, *theirs]}) > 1:
        raise UserError("the runs were scored on different rows: use another --results file")
    scores = [np.array([run["row_scores"] for run in runs]) for runs in (ours, theirs)]
    found = dict(zip(("lead", "low", "high"), np.round(bootstrap(*scores), 3).tolist()))
    decided = min(map(len, scores)) > 1 and not found["low"] <= 0 <= found["high"]
    verdict = ("trails", "leads")[found["lead"] > 0] if decided else "undecided"
    return dict(metric=ours[0]["metric"], **found, verdict=verdict)


def report(cfg, groups):
    """Prints a line for each group of runs and what the rule says of each pair; all as rows."""
    lines, leads, first = [], {}, next(iter(groups))[2]
    for (budget, arch, way), runs in groups.items():
        line = dict(budget=budget, arch=arch, trained=way, steps=runs[0]["steps"])
        metric = runs[0]["metric"]
        for key in ("tokens_m", metric, "val_loss", "shuffled_loss", "blank_loss"):
            if key in runs[0]:
                values = [run[key] for run in runs]
                deviation = statistics.stdev(values) if len(values) > 1 else 0
                line[key] = f"{statistics.mean(values):.2f} ± {deviation:.2f}"
        lines.append(line)
        for rival in ((budget, "dec", way), (budget, arch, first)):
            if rival in groups and rival != (budget, arch, way):
                pair = f"{arch} ({way}) against {rival[1]} ({rival[2]})"
                leads.setdefault(pair, {})[budget] = judge(runs, groups[rival])
    n_rows = next(iter(groups.values()))[0]["rows"]
    title = f"{cfg.data}, {cfg.preset}, {n_rows} rows of {cfg.eval_split}"
    table(f"{title}; mean ± standard deviation of {cfg.seeds} seeds, losses in nats", lines)
    for pair, found in leads.items():
        print(f"{pair}: {conclusion([verdict['verdict'] for verdict in found.values()])}")
        for budget, one in found.items():
            lead = "{metric} {lead:+.2f}, 95% from {low:+.2f} to {high:+.2f}: "
            lead = lead.format(**one) if "lead" in one else ""
            print(f"    {budget}: {lead}{one['verdict']}")
    rows = [dict(run, budget=name[0]) for name, runs in groups.items() for run in runs]
    rows = [{key: value for key, value in row.items() if key != "row_scores"} for row in rows]
    for pair, found in leads.items():
        rows += [dict(pair=pair, budget=budget, **verdict) for budget, verdict in found.items()]
    return rows


def conclusion(verdicts):
    """What may be said of a pair after one or both budgets."""
    if any(verdict.startswith("invalid") for verdict in verdicts):
        return "invalid, not won by either; train longer"
    if len(verdicts) < 2:
        return "no lead is claimed from one budget; give --max_iters and --max_minutes"
    agreed = len(set(verdicts)) == 1 and verdicts[0] != "undecided"
    return f"{verdicts[0]} under both budgets" if agreed else "undecided"


# ----------------------------------------------------------------------------------------------


def apart(function, *args):
    """function(*args) in a process of its own. UserError for whatever it dies of."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except UserError:
            raise
        except BrokenProcessPool:
            raise UserError("its process was killed: out of memory?") from None
        except Exception as error:  # torch, onnxruntime and transformers raise many kinds
            raise UserError(f"{type(error).__name__}: {str(error)[:300]}") from error


def measured(jobs):
    """Rows of all jobs (function, cfg, ...), each in a process. One that fails says why, and the
    others go on."""
    rows = []
    for function, *args in progress(jobs, "measuring"):
        try:
            rows += apart(function, *args)
        except UserError as error:
            print(printable(f"{', '.join(map(str, args[1:3]))}: {error}"), file=sys.stderr)
    if not rows:
        raise UserError("nothing could be measured; what each said stands above")
    return rows


def chosen(cfg, name, known):
    """The entries of a key that holds some of `known`, separated by commas."""
    text = getattr(cfg, name)
    for entry in text.split(","):
        if entry not in known:
            takes = f"it takes {', '.join(known)}, separated by commas"
            raise UserError(f"--{name}={text}: {entry!r} is unknown; {takes}")
    return list(dict.fromkeys(text.split(",")))


def numbers(cfg, name, most=100):
    """The numbers of a key that holds at most so many, separated by commas."""
    parts = getattr(cfg, name).split(",")
    fine = all(part.isascii() and part.isdigit() and 0 < int(part[:9]) < 10**7 for part in parts)
    if not fine or len(parts) > most:
        takes = f"it takes a number from 1 to 9999999, or up to {most} with commas between"
        raise UserError(f"--{name}={','.join(parts)}: {takes}")
    return [int(part) for part in parts]


def milliseconds(seconds):
    return round(statistics.median(seconds) * 1e3, 2)


def spread(seconds):
    """How far apart measurements are, as a share of their median."""
    return round((max(seconds) - min(seconds)) / statistics.median(seconds), 3)


def beside_dec(rows, same, *keys):
    """Adds KEY/dec to every row: its share of the decoder-only row with the same values."""
    for row in rows:
        like = dict(arch="dec") | {key: row[key] for key in same}
        for rival in [rival for rival in rows if alike(rival, like)][:1]:
            row |= {f"{key}/dec": round(row[key] / rival[key], 3) for key in keys if row[key]}


def table(title, rows, hidden=""):
    """Prints rows under a line that says what they are, all columns but some."""
    columns = [c for c in dict.fromkeys(itertools.chain(*rows)) if c not in hidden.split()]
    cells = [columns] + [[str(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(printable(title))
    for line in cells:
        print(printable("  ".join(cell.rjust(width) for cell, width in zip(line, widths))))


def lines_of(path):
    """The lines of a file; none where there is no such file."""
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.readlines()


def machine(cfg):
    """What a figure was measured on."""
    models = [line for line in lines_of("/proc/cpuinfo") if line.startswith("model name")]
    name = models[0].split(":")[1].strip() if models else platform.machine()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    about = dict(cpu=name, cores=os.cpu_count(), threads=cfg.threads or torch.get_num_threads())
    about |= dict(gpu=gpu, torch=torch.__version__, python=platform.python_version())
    if shutil.which("git"):
        words = ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"]
        about["commit"] = subprocess.run(words, capture_output=True, text=True).stdout.strip()
    return about


COMMANDS = dict(speed=(Cost, bench_speed), flops=(Cost, bench_flops), memory=(Cost, bench_memory))
COMMANDS |= dict(train=(Cost, bench_train), vision=(Cost, bench_vision))
COMMANDS |= dict(quality=(Quality, bench_quality))
COMMANDS |= dict(compare=(Compare, bench_compare), distill=(Compare, bench_distill))


def main():
    word, words = (sys.argv + [""])[1], sys.argv[2:]
    if word in ("--help", "-h"):
        print(__doc__)
        return
    if word not in COMMANDS:
        raise UserError(f"the first word is one of {', '.join(COMMANDS)}; --help tells more")
    kind, command = COMMANDS[word]
    cfg = read_settings(kind, f"{__doc__}\n{word}: {command.__doc__ or ''}\n", words)
    plot = getattr(cfg, "plot", None)
    for path in (cfg.json, plot):
        if path and not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise UserError(f"{path} cannot be written: there is no such folder")
    if plot and not plot.endswith((".png", ".pdf", ".svg")):
        raise UserError(f"--plot={plot} must end in .png, .pdf or .svg")
    rows, about = command(cfg), machine(cfg)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if cfg.json:
        write_json(cfg.json, dict(machine=about, rows=rows))


if __name__ == "__main__":
    script(main)
