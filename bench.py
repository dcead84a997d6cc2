"""Measures what models cost. Every subcommand prints a table and, with --json=FILE, writes the rows behind it.

    python bench.py train                     training tokens/s: encoder-decoder, decoder-only, Hugging Face T5 beside them
    python bench.py speed                     first token and tokens/s of generating, 330m, batch 1, 512 in, 128 out, in torch and ONNX Runtime;
                                              --src=128,512,1024,4096 --plot=FILE is a sweep, --clients=1,4,16 a server
    python bench.py flops                     of a forward pass, counted
    python bench.py memory                    of weights and caches while generating
    python bench.py vision                    a picture: seconds in the tower, tokens before and after selection, first token on each; --step: a training step
    python bench.py load                      weights of others: seconds and memory of loading them, beside a plain read of the files
    python bench.py quality --run=RUN         scores a run on held-out rows of its task; --data=TASK: on another, or on
                                              multiple choice (mmlu, arc_easy, arc_challenge), or on text (perplexity)
    python bench.py compare --data=TASK       trains and scores decoder-only and the three splits, seed by seed; --teacher=RUN: distilled, too
    python bench.py distill --data=TASK --teacher=RUN      the ablation: share and kind of the divergence, whose answers, sizes of students

`python bench.py COMMAND --help` lists a command's keys. Speeds are means (`speed`; its medians are in --json) or medians after a warm-up. A machine's speed drifts: compare rows of one sitting, as ratios.
"""
import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import queue
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data.choices import is_choice, load_choices
from lib.settings import UserError, parse, script, setting
from data.corpus import prepare
from lib.runtime import Exported
from lib.weights import weight_files
from data.images import VisionConfig, n_tokens, open_image, pixel_variance, prepare_image, read_vision, token_orders
from data.metrics import score
from data.objectives import Objective, pad_rows
from data.pairs import IMAGE, Pairs
from data.picture_tasks import PicturePairs, is_picture_task, load_picture_task
from data.picture_tasks import load as load_image
from lib.runs import ROOT, newest_run, read_record
from data.tasks import is_task, load_task
from data.tokenizer import Tokenizer, load_tokenizer
from model import PRESETS, Config, Transformer, count_params, make_config
from train import Settings as TrainSettings
from train import Finetuning, World, answers, eval_starts, evenly, held_out, keep_memory, loss_of, make_optimizers, matmul_rate, pair_losses, resolve
from vision import TOWERS, VisionLM, blind_score, load_model

ARCHS = ("dec", "1/3", "1/2", "2/3")


@dataclass
class Train:
    preset: str = setting("small", "size", tuple(PRESETS))
    split: str = setting("2/3", "the encoder's share of the layers", ("1/3", "1/2", "2/3"))
    engine: str = setting("encdec,dec,t5", "some of encdec, dec, t5 (Hugging Face's, the peer), separated by commas")
    src: int = setting(512, "source tokens a row")
    new: int = setting(128, "target tokens a row")
    batch: str = setting("4,8,16", "rows a forward pass; of several, separated by commas, the best is kept")
    rows: int = setting(64, "rows an optimizer step, accumulated over passes of --batch rows")
    dtype: str = setting("auto", "auto (tries both and keeps the best), float32 or bfloat16", ("auto", "float32", "bfloat16"))
    compile: str = setting("auto", "torch.compile of our layers; auto: where train.py would", ("auto", "true", "false"))
    repeats: int = setting(5, "measurements behind each median")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    threads: int = setting(0, "CPU threads; 0 is torch's own choice")
    json: str = setting(None, "write the rows to this file")


@dataclass
class Speed:
    preset: str = setting("330m", "size", tuple(PRESETS))
    archs: str = setting("dec,2/3", "decoder-only and splits of the encoder-decoder, separated by commas, or all")
    shape: str = setting("", "changes of the preset, as keys of train.py: 'n_enc=20 n_dec=10 n_embd=1024 n_hidden=2816', with --archs=2/3")
    engine: str = setting("torch,onnx-fp32,onnx-int8,onnx-int4", "some of torch, compiled (what reads the prompt by torch.compile), onnx-fp32, onnx-fp16, "
                          "onnx-int8, onnx-int4, nocache (torch, all read again at every step), t5 (Hugging Face's), separated by commas, or all")
    src: str = setting("512", "tokens in; several, separated by commas, are a sweep")
    new: str = setting("128", "tokens out; several are a sweep")
    batch: str = setting("1", "rows at once; several are a sweep")
    examples: int = setting(None, "requests behind each mean; default: as many as take 20 seconds, from 3 to 100", type=int)
    clients: str = setting(None, "instead: so many clients, each waiting for its answer before it asks again; several are a sweep")
    dtype: str = setting("auto", "of torch's engines", ("auto", "float32", "bfloat16"))
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    threads: int = setting(0, "CPU threads; 0 is the engine's own choice")
    seed: int = setting(1337, "of the prompts")
    plot: str = setting(None, "draw the sweep into this file")
    json: str = setting(None, "write the rows to this file")


@dataclass
class Cost:
    preset: str = setting("330m", "size", tuple(PRESETS))
    archs: str = setting("dec,1/3,1/2,2/3", "decoder-only and splits of the encoder-decoder, separated by commas, or all")
    shape: str = setting("", "changes of the preset, as keys of train.py: 'n_enc=20 n_dec=10 n_embd=1024 n_hidden=2816', with --archs=2/3")
    src: int = setting(4096, "tokens in")
    new: int = setting(256, "tokens out")
    batch: int = setting(32, "memory: rows at once")
    dtype: str = setting("float32", "memory: of weights and caches", ("float32", "bfloat16"))
    device: str = setting("auto", "memory: auto, cpu, cuda, cuda:N or mps")
    threads: int = setting(0, "CPU threads; 0 is torch's own choice")
    json: str = setting(None, "write the rows to this file")


@dataclass
class Load:
    run: str = setting(None, "hf:FOLDER; default: random weights in bfloat16 of --preset, decoder-only, written for the purpose")
    preset: str = setting("1b", "size of the random weights", tuple(PRESETS))
    repeats: int = setting(5, "measurements behind each median")
    threads: int = setting(0, "CPU threads; 0 is torch's own choice")
    json: str = setting(None, "write the rows to this file")


@dataclass
class Vision:
    preset: str = setting("330m", "size of the language model", tuple(PRESETS))
    archs: str = setting("2/3", "decoder-only and splits of the encoder-decoder, separated by commas, or all")
    tower: str = setting("large", "a tower of vision.py; large is CLIP's ViT-L/14 at 336 pixels", tuple(TOWERS))
    image: str = setting(None, "picture file; default: noise that fills the grid")
    grid: int = setting(3, "tiles a side at most")
    tokens: str = setting("all,variance", "ways to choose tokens, as vision.py's --tokens, separated by commas")
    keep: float = setting(0.33, "share that stays")
    engine: str = setting("torch,onnx-int8", "some of torch, onnx-fp32, onnx-int8, onnx-int4, separated by commas")
    repeats: int = setting(3, "measurements behind each median")
    step: bool = setting(False, "instead: one training step on one such picture, and the memory that it takes")
    new: int = setting(32, "--step: target tokens")
    dtype: str = setting("auto", "of torch", ("auto", "float32", "bfloat16"))
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    threads: int = setting(0, "CPU threads; 0 is the engine's own choice")
    json: str = setting(None, "write the rows to this file")


@dataclass
class Quality:
    run: str = setting(None, "run folder; default: the newest in out/")
    data: str = setting(None, "a task, mmlu, arc_easy, arc_challenge (or NAME:PATH), or a text; default: what the run was trained on")
    source_col: str = setting(None, "column of the source; default: the run's, or the task's")
    target_col: str = setting(None, "column of the target; default: the run's, or the task's")
    skip_bad: bool = setting(False, "leave out rows that cannot be used, and count them, instead of stopping")
    eval_split: str = setting("val", "which held-out rows", ("val", "test"))
    eval_rows: int = setting(0, "how many of them, evenly spaced; 0 is all")
    batch_size: int = setting(128, "answers made at once")
    out: str = setting(None, "where the answers go, one JSON object a line, as the ragas library reads them; default: predictions.jsonl in the run folder")
    plot: str = setting(None, "a run with pictures: draw some with right and some with wrong answers into this file")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = setting("auto", "of the matrix products", ("auto", "float32", "bfloat16"))
    threads: int = setting(0, "CPU threads; 0 is torch's own choice")
    json: str = setting(None, "write the rows to this file")


@dataclass
class Compare:
    data: str = setting("docstring", "a task, as in train.py")
    preset: str = setting("nano", "one or more sizes, separated by commas")
    archs: str = setting("dec,1/3,1/2,2/3", "decoder-only and splits of the encoder-decoder, separated by commas")
    seeds: int = setting(3, "runs of each, with the seeds 1, 2, 3 ...")
    equal: str = setting("time", "what all have the same of: time (--max_minutes), tokens, or flops (--max_iters is decoder-only's; the others get as many "
                         "steps as see the same rows, or cost the same)", ("time", "tokens", "flops"))
    max_minutes: float = setting(4.0, "training time a run, where time is equal")
    max_iters: int = setting(None, "steps a run, where tokens or flops are equal", type=int)
    train: str = setting("", "more keys for train.py, in quotes: '--vocab_size=4096 --batch_size=8'; {arch} and {seed} become the run's, as dec or 23 and 1")
    teacher: str = setting(None, "each also distilled from this teacher, as distill.py takes it")
    distill: str = setting("", "more keys for distill.py, in quotes: '--alpha=0.5 --sequences=data'")
    eval_split: str = setting("val", "which held-out rows are scored, all of them; the best checkpoint is chosen on val", ("val", "test"))
    results: str = setting(None, "file that each finished run is appended to, and whose runs are not run again; default: out/compare-TASK.jsonl")
    plot: str = setting(None, "draw the task's metric, run by run, into this file")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    threads: int = setting(0, "CPU threads; 0 is torch's own choice")
    json: str = setting(None, "write the rows to this file")


@dataclass
class Distill(Compare):
    archs: str = setting("2/3", "decoder-only and splits of the encoder-decoder, separated by commas")
    alphas: str = setting("0,0.5,1", "shares of the divergence in the loss, separated by commas. Whose answers and sizes are compared at the one in the middle of this list")
    kls: str = setting("reverse,forward", "kinds of divergence")
    sequences: str = setting("data,student,teacher", "whose answers; the divergences are compared on the first")
    sizes: str = setting("mini", "students of other sizes, with the first divergence and the first answers")


def seconds(run, device, repeats):
    """Times of `repeats` runs after one to warm up, sorted."""
    wait = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    times = []
    for _ in range(repeats + 1):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])


def train_world(cfg, dtype, compiled):
    """The training script's own settings and machine, so that what is measured is what trains."""
    settings = resolve(TrainSettings(preset=cfg.preset, device=cfg.device, dtype=dtype, threads=cfg.threads, compile=compiled))
    return settings, World(settings)


def peer_t5(config):
    """Hugging Face's T5 (v1.1) with the widths and layers of an encoder-decoder of ours. It has no grouped-query attention: where ours
    has (from 330m on), it is larger."""
    try:
        from transformers import T5Config, T5ForConditionalGeneration
    except ImportError:
        raise UserError("--engine=t5 needs transformers: pip install -r requirements-dev.txt, or leave t5 out") from None
    shape = T5Config(vocab_size=config.vocab_size, d_model=config.n_embd, d_kv=config.head_dim, num_heads=config.n_head,
                     d_ff=config.n_hidden, num_layers=config.n_enc, num_decoder_layers=config.n_dec, feed_forward_proj="gated-gelu",
                     tie_word_embeddings=True, decoder_start_token_id=0, dropout_rate=0.0)
    return T5ForConditionalGeneration(shape)


def bench_train(cfg):
    """Whole optimizer steps on random rows: tokens/s, source and target, the share of the matrix-product rate, and the most memory held. A
    process for each row, so that its memory is its own."""
    rows, dtypes = [], ("float32", "bfloat16") if cfg.dtype == "auto" else (cfg.dtype,)
    for engine, dtype, batch in tqdm([(e, d, b) for e in cfg.engine.split(",") for d in dtypes for b in numbers(cfg.batch)], desc="train"):
        try:
            rows.append(apart(train_of, cfg, engine, dtype, batch))
            tqdm.write(json.dumps(rows[-1]), file=sys.stderr)
        except Exception as error:  # whatever one dies of, the others go on
            tqdm.write(f"{engine}, {dtype}, batch {batch}: {reason(error)}", file=sys.stderr)
    if not rows:
        raise UserError("nothing could be measured; what each said stands above")
    best = {engine: max((row for row in rows if row["engine"] == engine), key=lambda row: row["tok_s"]) for engine in dict.fromkeys(row["engine"] for row in rows)}
    table(list(best.values()), ("engine", "dtype", "batch", "rows", "compiled", "params_m", "step_ms", "tok_s", "gflop_s", "mfu", "peak_mb"))
    for rival in ("t5", "dec"):
        if rival in best and "encdec" in best:
            ratio = best["encdec"]["tok_s"] / best[rival]["tok_s"]
            print(f"encdec / {rival}, the best of each: {ratio:.2f} times the tokens/s" + (f", so {1 / ratio:.2f} of its time for the same rows (the paper: 0.71)" if rival == "dec" else ""))
    return rows


def train_of(cfg, engine, dtype, batch):
    """The row of one engine, precision and batch."""
    encdec = make_config(cfg.preset, "encdec", cfg.split, src_len=cfg.src, tgt_len=cfg.new)
    config = make_config(cfg.preset, "dec", src_len=cfg.src, tgt_len=cfg.new) if engine == "dec" else encdec
    if engine != "t5":
        keep_memory()
    settings, world = train_world(cfg, dtype, cfg.compile if engine != "t5" else "false")
    torch.manual_seed(0)
    model = (peer_t5(encdec) if engine == "t5" else Transformer(config)).to(world.device)
    step, passes = train_step(model, engine, config, settings, world, cfg, batch)
    step()
    times = seconds(step, world.device, cfg.repeats)
    typical, new = statistics.median(times), cfg.new + (cfg.src if engine == "dec" else 0)
    flops = 3 * batch * passes * Transformer.flops(model if engine != "t5" else Transformer(encdec), cfg.src, new)
    return dict(arch="dec" if engine == "dec" else "encdec", split=cfg.split, engine=engine, dtype=dtype, batch=batch, rows=batch * passes,
                src=cfg.src, new=cfg.new, params_m=round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
                compiled=engine != "t5" and world.compile, step_ms=round(typical * 1e3, 1), spread_ms=round((times[-1] - times[0]) * 1e3, 1),
                tok_s=round(batch * passes * (cfg.src + cfg.new) / typical), gflop_s=round(flops / typical / 1e9),
                mfu=round(flops / typical / matmul_rate(world.device, world.dtype), 3), peak_mb=peak_memory(world.device))


def train_step(model, engine, config, settings, world, cfg, batch):
    """-> (a function that makes one optimizer step on random rows, its number of passes)."""
    src = torch.randint(config.vocab_size, (batch, cfg.src), device=world.device)
    tgt = torch.randint(config.vocab_size, (batch, cfg.new + (cfg.src if engine == "dec" else 0)), device=world.device)
    every, passes = torch.ones_like(tgt, dtype=torch.bool), max(1, cfg.rows // batch)
    if engine == "t5":
        optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-4, fused=world.device.type != "mps")]
    else:
        optimizers = make_optimizers(model, settings, world.dtype, lambda text: None)
        for module in model.compiled_parts() if world.compile else []:
            module.compile()

    def step():
        for _ in range(passes):
            with world.precision():
                if engine == "t5":
                    loss = model(input_ids=src, labels=tgt).loss
                else:
                    loss = loss_of(model, (None if engine == "dec" else src, None, tgt, every, 0))[0] / tgt.numel()
                loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return step, passes


# ---------------------------------------------------------------------------------------------------------------------
# Generation

def config_of(cfg, arch):
    """The preset's model of an architecture ("dec", or a split), with the changes of --shape."""
    kinds, changes = {field.name: field.type for field in fields(Config)}, {}
    for word in cfg.shape.split():
        name, _, value = word.partition("=")
        try:
            changes[name] = {"True": True, "False": False}[value.title()] if kinds[name] is bool else kinds[name](value)
        except (KeyError, ValueError):
            raise UserError(f"--shape: {word!r} is no field of model.Config with a value that it can have") from None
    if {"n_enc", "n_dec", "n_hidden"} & changes.keys() and "," in cfg.archs:
        raise UserError("--shape with n_enc, n_dec or n_hidden is one model, and others of its size are not known: say which kind it is, --archs=2/3 for example")
    if arch == "dec":
        changes.pop("n_enc", None)
        return make_config(cfg.preset, "dec", **changes)
    return make_config(cfg.preset, "encdec", arch, **changes)


ENGINES = ("torch", "compiled", "onnx-fp32", "onnx-fp16", "onnx-int8", "onnx-int4", "nocache", "t5")
PAPER = {"CPU": (1591 / 2242, 15.3 / 4.0), "GPU": (86 / 149, 37.4 / 9.7), "NPU": (189 / 358, 123.8 / 26.5)}  # table 2: first token, tokens/s; 2/3 over dec


def bench_speed(cfg):
    """Generation with random weights, which speed does not depend on. A process for each engine and architecture, so that one's
    memory and threads are not another's."""
    pairs = [(arch, engine) for arch in cfg.archs.split(",") for engine in cfg.engine.split(",") if engine != "t5" or arch != "dec"]
    if len(pairs) == 1:
        rows = speed_of(cfg, *pairs[0])
    else:
        rows = []
        for arch, engine in tqdm(pairs, desc="speed"):
            try:
                rows += apart(speed_of, cfg, arch, engine)
            except Exception as error:  # whatever an engine dies of, the others go on
                tqdm.write(f"{arch}, {engine}: {reason(error)}", file=sys.stderr)
    if not rows:
        raise UserError("no engine could be measured; what each said stands above")
    columns = ["arch", "split", "engine", "batch", "src", "new"]
    columns += ["clients", "requests_s", "p50_ms", "p95_ms"] if cfg.clients else ["examples", "first_ms", "bound_first_ms", "tok_s", "bound_tok_s", "spread", "peak_mb"]
    table(rows, columns)
    for engine in cfg.engine.split(",") if not cfg.clients else []:
        found = {(row["split"] or "dec"): row for row in rows if row["engine"] == engine and row["new"] > 1}
        if "dec" in found and "2/3" in found and "," not in cfg.src + cfg.new + cfg.batch:  # not a sweep
            first, rate = (found["2/3"][key] / found["dec"][key] for key in ("first_ms", "tok_s"))
            print(f"{engine}: 2/3 against decoder-only, first token in {first:.2f} of its time, {rate:.2f} times its tokens/s; the paper's table 2: " +
                  ", ".join(f"{name} {a:.2f} and {b:.1f}" for name, (a, b) in PAPER.items()))
    if cfg.plot:
        plot_speed(rows, cfg.plot)
    return rows


def reason(error):
    if isinstance(error, BrokenProcessPool):
        return "its process was killed; out of memory?"
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {str(error)[:300]}"


def apart(function, *args):
    """Its result, from a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def speed_of(cfg, arch, engine):
    """Rows of one engine: every combination of the lengths and batches asked for."""
    _, world = train_world(cfg, cfg.dtype, "false")
    config = config_of(cfg, arch)
    common = dict(arch="dec" if arch == "dec" else "encdec", split=None if arch == "dec" else arch, engine=engine, cache=engine != "nocache")
    shapes = [(src, new, batch) for src in numbers(cfg.src) for new in numbers(cfg.new) for batch in numbers(cfg.clients or cfg.batch)]
    for shape in shapes:
        check_room(config, engine, *shape, world)
    flops = {src: prompt_flops(config, src) for src in numbers(cfg.src)}
    run, about, rng, rows = *make_engine(engine, config, cfg, world), np.random.default_rng(cfg.seed), []
    for src, new, batch in tqdm(shapes, desc=f"{arch} {engine}", leave=False):
        if cfg.clients:
            rows.append(common | dict(batch=f"to {batch}", src=src, new=new, clients=batch) | serve(run, batch, src, new, config.vocab_size, rng))
            continue
        times, start = [], time.perf_counter()
        while len(times) <= (cfg.examples or (100 if time.perf_counter() - start < 20 else 3)):
            prompts, begin = rng.integers(5, config.vocab_size, (batch, src)).tolist(), time.perf_counter()
            marks = run(prompts, new)
            assert len(marks) == new
            times.append((marks[0] - begin, marks[-1] - marks[0]))
        first, rest = np.array(times[1:]).T  # the first one warms up
        read = about["step_bytes"] + batch * cache_bytes(config, src, new // 2, about["itemsize"])
        rows.append(common | dict(batch=batch, src=src, new=new, examples=len(first), params_m=round(about["params"] / 1e6, 1), first_ms=round(first.mean() * 1e3, 1),
                                  first_median_ms=round(float(np.median(first)) * 1e3, 1), tok_s=round(batch * (new - 1) / rest.mean(), 2) if new > 1 else None,
                                  tok_median_s=round(batch * (new - 1) / float(np.median(rest)), 2) if new > 1 else None,
                                  spread=round((rest if new > 1 else first).std() / (rest if new > 1 else first).mean(), 3),
                                  read_mb=round(read / 1e6, 1), peak_mb=peak_memory(world.device)))
    if cfg.clients:
        return rows
    # No step can be faster than its weights and caches are read, and no prompt than its products are computed.
    bandwidth, rate = read_bandwidth(world.device), int8_rate(cfg.threads) if engine in ("onnx-int8", "onnx-int4") and world.device.type == "cpu" else product_rate(engine, world)
    for row in rows:
        row |= dict(read_gb_s=round(bandwidth / 1e9, 1), bound_tok_s=round(row["batch"] * bandwidth / row["read_mb"] / 1e6, 1), gflop_s=round(rate / 1e9),
                    bound_first_ms=round(row["batch"] * flops[row["src"]] / rate * 1e3, 1))
    return rows


def make_engine(engine, config, cfg, world):
    """-> (run(prompts, new), which gives the times at which the tokens came, and what it reads a step)."""
    torch.manual_seed(0)
    if engine == "t5":
        if cfg.batch != "1" or cfg.clients or config.n_enc < config.n_dec:
            raise UserError("t5 streams one row only, and its cache fails with more decoder than encoder layers: --batch=1, split 1/2 or 2/3")
        model = peer_t5(config).to(world.device, world.dtype).eval()
        return functools.partial(t5_marks, model), about_of(model, model.decoder.parameters(), model.shared.weight)
    with torch.device("cpu" if engine.startswith("onnx-") else world.device):
        model = Transformer(config).eval()
    if engine.startswith("onnx-"):
        from export import write
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # the weights stay mapped
            write(model, os.path.join(folder, "x"), engine[5:])
            params, model = model.num_params(), None
            twin = Exported(os.path.join(folder, "x"), cfg.threads, world.device.type)
            twin.config.eos_id = -1  # never ends early
            return marks_of(twin.generate), dict(params=params, step_bytes=twin.step_bytes, itemsize=np.dtype(twin.float).itemsize)
    model = model.to(world.dtype)
    model.config.eos_id = -1
    about = about_of(model, model.dec.parameters(), model.embed.weight)
    if engine == "nocache":
        return marks_of(functools.partial(generate_without_cache, model)), about
    model.pack()
    if engine == "compiled":  # the decoder's steps, each of another length, gain nothing
        for module in model.enc:
            module.compile()
    return marks_of(model.generate), about


def marks_of(generate):
    return lambda prompts, new: [time.perf_counter() for _ in generate(prompts, new)]


def about_of(model, decoder, embed):
    weights = {id(p): p for p in (*decoder, embed)}.values()
    return dict(params=sum(p.numel() for p in model.parameters()), step_bytes=sum(p.numel() * p.element_size() for p in weights), itemsize=embed.element_size())


@torch.inference_mode()
def generate_without_cache(model, prompts, new):
    """What a model without a cache does, the paper's released code among them: the decoder reads its whole prefix at every step."""
    ids = torch.tensor(prompts, device=model.embed.weight.device)
    bos = torch.full_like(ids[:, :1], model.config.bos_id)
    encoded, tokens = (model.encode(ids), bos) if model.config.n_enc else (None, torch.cat((bos, ids), 1))
    for _ in range(new):
        tokens = torch.cat((tokens, model.logits(model.decode(tokens, encoded)[:, -1]).argmax(-1, keepdim=True)), 1)
        yield tokens[:, -1].tolist()


@torch.inference_mode()
def t5_marks(model, prompts, new):
    marks = []
    streamer = SimpleNamespace(put=lambda ids: marks.append(time.perf_counter()), end=lambda: None)
    model.generate(torch.tensor(prompts, device=model.device), max_new_tokens=new, min_new_tokens=new, do_sample=False, streamer=streamer)
    return marks[1:]  # the first is the decoder's start token


def serve(run, clients, src, new, vocab, rng, seconds=20):
    """Requests a second and how long they take, for `clients` that each wait for their answer before they ask again. Whoever waits
    when the model is free goes into its next batch. Prompts are of half of `src` to all of it."""
    waiting, stop, taken = queue.Queue(), time.perf_counter() + seconds, []

    def client(seed):
        rng = np.random.default_rng(seed)
        while time.perf_counter() < stop:
            start, answered = time.perf_counter(), threading.Event()
            waiting.put((rng.integers(5, vocab, rng.integers(src // 2, src + 1)).tolist(), answered))
            answered.wait()
            taken.append(time.perf_counter() - start)

    run([[5] * src] * clients, 2)  # warms up
    crowd = [threading.Thread(target=client, args=(int(seed),), daemon=True) for seed in rng.integers(2 ** 31, size=clients)]
    start = time.perf_counter()
    for thread in crowd:
        thread.start()
    while any(thread.is_alive() for thread in crowd) or not waiting.empty():
        with contextlib.suppress(queue.Empty):
            batch = [waiting.get(timeout=0.1)]
            while not waiting.empty():
                batch.append(waiting.get())
            run([prompt for prompt, _ in batch], new)
            for _, answered in batch:
                answered.set()
    return dict(requests_s=round(len(taken) / (time.perf_counter() - start), 3), p50_ms=round(float(np.percentile(taken, 50)) * 1e3),
                p95_ms=round(float(np.percentile(taken, 95)) * 1e3), requests=len(taken))


def numbers(text):
    return [int(part) for part in text.split(",")]


def cache_bytes(config, src, new, itemsize):
    """Keys and values of one row: of the tokens so far in every decoder layer, and of the source."""
    return 2 * config.n_dec * config.n_kv_head * config.head_dim * (src + new) * itemsize


def check_room(config, engine, src, new, batch, world):
    """Stops before a CPU's memory is full and the machine swaps."""
    if world.device.type != "cpu" or not os.path.exists("/proc/meminfo"):
        return
    with open("/proc/meminfo", encoding="utf-8") as f:
        free = next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    itemsize = 4 if engine.startswith("onnx") else world.dtype.itemsize
    weights = count_params(config) * (8 if engine.startswith("onnx") else 2 * itemsize)  # the export; a packed copy
    read = src if config.n_enc else src + new
    row = cache_bytes(config, src, new, itemsize) + itemsize * (read * (6 * config.n_embd + 3 * config.n_hidden) + config.n_head * read * min(read, src + new) + 2 * config.vocab_size)
    if weights + batch * row > free:
        fits = int((free - weights) // row)
        raise UserError(f"--batch={batch} with --src={src} --new={new} takes about {(weights + batch * row) / 2 ** 30:.1f} GiB, and {free / 2 ** 30:.1f} GiB are free: "
                        + (f"--batch={fits} would fit" if fits > 0 else "not even one row fits"))


def read_bandwidth(device):
    """Bytes a second that all threads read together from memory, summing 1 GiB."""
    data = torch.ones(2 ** 28, device=device)
    return data.nbytes / statistics.median(seconds(lambda: data.sum(), device, 9))


def prompt_flops(config, src):
    """FLOPs up to the first token's logits, one row; causal attention halved."""
    with torch.device("meta"):
        model = Transformer(config)
    if config.n_enc:
        return model.flops(src, 1)
    T = src + 1
    return model.flops(0, T) - 2 * src * config.n_embd * config.vocab_size - config.n_dec * 2 * config.n_head * config.head_dim * T ** 2


def product_rate(engine, world):
    world.dtype = torch.float32 if engine == "onnx-fp32" else torch.float16 if engine == "onnx-fp16" else world.dtype
    return matmul_rate(world.device, world.dtype)


def int8_rate(threads):
    """Operations a second of ONNX Runtime's dynamic int8 matrix products (activations quantized on the way in), 512 rows."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper
    rows, n, rng = 512, 2048, np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.integers(-127, 128, (n, n), dtype=np.int8), "w"), numpy_helper.from_array(np.full(n, 0.01, np.float32), "scales")]
    nodes = [helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "scale", "zero"]),
             helper.make_node("MatMulIntegerToFloat", ["codes", "w", "scale", "scales", "zero"], ["y"], domain="com.microsoft")]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, n]) for name in "xy")
    model = helper.make_model(helper.make_graph(nodes, "rate", [x], [y], weights), ir_version=10,
                              opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    feed = dict(x=rng.standard_normal((rows, n), dtype=np.float32))
    return 2 * rows * n * n / statistics.median(seconds(lambda: session.run(None, feed), torch.device("cpu"), 10))


def peak_memory(device):
    """MB that this process has held at most: of the GPU's memory, or resident."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 1e6)
    if os.path.exists("/proc/self/status"):  # Linux hands a child its parent's ru_maxrss
        with open("/proc/self/status", encoding="utf-8") as f:
            return round(next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM")) / 1e6)
    import resource
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6)


def plot_speed(rows, path):
    """First token and tokens/s over what was swept."""
    plt = pyplot()
    over = max(("src", "new", "batch"), key=lambda name: len({row[name] for row in rows}))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for key in dict.fromkeys((row["split"] or "decoder-only", row["engine"]) for row in rows):
        group = [row for row in rows if (row["split"] or "decoder-only", row["engine"]) == key]
        for axis, value in zip(axes, ("first_ms", "tok_s")):
            axis.plot([row[over] for row in group], [row[value] for row in group], "o-", ms=4, label=", ".join(key))
    axes[0].set(ylabel="first token, ms", yscale="log")
    axes[1].set(ylabel="tokens/s after it", ylim=(0, None))
    for axis in axes:
        axis.set(xlabel=dict(src="tokens in", new="tokens out", batch="rows at once")[over], xscale="log")
        axis.set_xticks(sorted({row[over] for row in rows}), sorted({row[over] for row in rows}), minor=False)
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------------------------------------------------------------
# What can be counted

def bench_flops(cfg):
    """Forward FLOPs of one row, analytically and by torch's counter, the causal attention in full and halved."""
    rows = []
    for arch in cfg.archs.split(","):
        config = config_of(cfg, arch)
        with torch.device("meta"):
            model = Transformer(config)
            src = None if arch == "dec" else torch.zeros(1, cfg.src, dtype=torch.long)
            tgt = torch.zeros(1, cfg.new + (cfg.src if arch == "dec" else 0), dtype=torch.long)
            counter = FlopCounterMode(display=False)
            with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():  # the fused kernel is not counted
                model(src, None, tgt, torch.ones_like(tgt, dtype=torch.bool))
        full = model.flops(0 if arch == "dec" else cfg.src, tgt.size(1))
        causal = config.n_dec * 2 * config.n_head * config.head_dim * tgt.size(1) ** 2  # half of q k and of the weights times v
        rows.append(dict(arch=arch, src=cfg.src, new=cfg.new, params_m=round(count_params(config) / 1e6, 1), gflop=round(full / 1e9, 3),
                         gflop_counted=round(counter.get_total_flops() / 1e9, 3), gflop_halved=round((full - causal) / 1e9, 3)))
    for row in rows:
        if rows[0]["arch"] == "dec":
            row["of_dec"], row["of_dec_halved"] = (round(row[key] / rows[0][key], 3) for key in ("gflop", "gflop_halved"))
    table(rows, list(rows[0]))
    return rows


def bench_memory(cfg):
    """Bytes while generating: weights, and caches of two kinds, one that keeps every layer's cross-attention keys and values (fast, and what
    the code here does) and one that keeps the encoder's last states alone (small: the paper's wording). Measured for one row."""
    rows, itemsize = [], getattr(torch, cfg.dtype).itemsize
    for arch in tqdm(cfg.archs.split(","), desc="memory"):
        config = config_of(cfg, arch)
        weights = count_params(config) * itemsize
        full = cache_bytes(config, cfg.src, cfg.new, itemsize)
        small = cache_bytes(config, 0, cfg.new, itemsize) + cfg.src * config.n_embd * itemsize if config.n_enc else full
        measured = apart(measure_memory, cfg, arch)
        mb = lambda n: round(n / 1e6)
        rows.append(dict(arch=arch, src=cfg.src, new=cfg.new, batch=cfg.batch, weights_mb=mb(weights), cache_mb=mb(cfg.batch * full), small_cache_mb=mb(cfg.batch * small),
                         total_mb=mb(weights + cfg.batch * full), small_total_mb=mb(weights + cfg.batch * small), one_row_mb=mb(weights + full), one_row_peak_mb=measured))
    for row in rows:
        if rows[0]["arch"] == "dec":
            row["of_dec"], row["small_of_dec"] = (round(row[key] / rows[0][key], 3) for key in ("total_mb", "small_total_mb"))
    table(rows, list(rows[0]))
    return rows


def measure_memory(cfg, arch):
    """MB that generating for one row takes at most, the libraries' own not counted."""
    _, world = train_world(cfg, cfg.dtype, "false")
    config, before = config_of(cfg, arch), peak_memory(world.device)
    check_room(config, "torch", cfg.src, cfg.new, 1, world)
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(world.dtype).to_empty(device=world.device).eval()
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    for _ in zip(range(2), model.generate([[5] * cfg.src], cfg.new)):  # the caches are made whole before the first token
        pass
    return peak_memory(world.device) - before


# ---------------------------------------------------------------------------------------------------------------------
# Loading

def bench_load(cfg):
    """Every file has been read before: seconds are those of a memory that holds them, and reading and loading take turns."""
    from export import write_hf
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        name = cfg.run
        if name is None:
            tokenizer = Tokenizer("bytes")
            with torch.device("meta"):
                model = Transformer(make_config(cfg.preset, "dec", embed_scale=1.0))
            model = model.to(torch.bfloat16).to_empty(device="cpu")
            for p in model.parameters():
                torch.nn.init.normal_(p, std=0.02)
            write_hf(model, tokenizer, os.path.join(folder, "x"), cfg.preset, dict(settings=dict(data="nothing", objective="causal")), torch.bfloat16)
            name, model = f"hf:{folder}/x", None
        row = apart(load_of, name, cfg.repeats, cfg.threads)
    table([row], list(row))
    return [row]


def load_of(name, repeats, threads):
    """In a process of its own: seconds of a plain read and of loading, MB that loading adds."""
    from export import load_foreign
    if threads:
        torch.set_num_threads(threads)
    files, reading, loading = weight_files(name[3:], name), [], []
    size, room = sum(map(os.path.getsize, files)), bytearray(1 << 24)
    before = peak_memory(torch.device("cpu"))
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        for file in files:
            with open(file, "rb", buffering=0) as f:
                while f.readinto(room):
                    pass
        middle = time.perf_counter()
        model = load_foreign(name)
        reading, loading = [*reading, middle - start], [*loading, time.perf_counter() - middle]
        params, model = model.num_params(), None
    read, load, peak = statistics.median(reading[1:]), statistics.median(loading[1:]), peak_memory(torch.device("cpu")) - before
    return dict(params_m=round(params / 1e6, 1), mb=round(size / 1e6), read_s=round(read, 2), load_s=round(load, 2), of_read=round(load / read, 2), peak_mb=peak, of_bytes=round(peak / (size / 1e6), 2))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def bench_vision(cfg):
    """Random weights, which speed does not depend on. A process for each model and engine, so that its memory is its own."""
    pairs = [(arch, engine) for arch in cfg.archs.split(",") for engine in (["torch"] if cfg.step else cfg.engine.split(","))]
    rows = [row for pair in tqdm(pairs, desc="vision") for row in apart(vision_step if cfg.step else vision_of, cfg, *pair)]
    table(rows, list(rows[0]))
    return rows


def picture_of(cfg, tokens):
    """-> (VisionConfig, the picture as a PIL image)."""
    vision = VisionConfig(**TOWERS[cfg.tower], grid=cfg.grid, tokens=tokens, keep=cfg.keep).check()
    side = vision.image_size * max(1, cfg.grid)
    return vision, open_image(cfg.image) if cfg.image else Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def seeing_model(cfg, arch, vision, n):
    """A VisionLM of the preset that reads n tokens of a picture and sixteen of text, and that prompt."""
    changes = dict(src_len=n + 64, tgt_len=64, image_id=5)
    config = make_config(cfg.preset, "dec", **changes) if arch == "dec" else make_config(cfg.preset, "encdec", arch, **changes)
    torch.manual_seed(0)
    return VisionLM(config, vision).eval(), [5] * n + list(range(10, 26))


def vision_of(cfg, arch, engine):
    """Rows of one engine, one for each way to choose tokens: seconds to open, cut and score the picture, in the tower, and to the first token."""
    _, world = train_world(cfg, cfg.dtype, "false")
    rows = []
    for tokens in cfg.tokens.split(","):
        vision, image = picture_of(cfg, tokens)
        n = n_tokens(*image.size, vision)
        model, prompt = seeing_model(cfg, arch, vision, n)
        flops, tower = prompt_flops(model.config, len(prompt)), model.tower.flops()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            if engine == "torch":
                model = model.to(world.device, world.dtype).pack()
                start = functools.partial(model.prefill, [prompt], 1)
            else:
                from export import write
                write(model, os.path.join(folder, "x"), engine[5:])
                model = None
                model = Exported(os.path.join(folder, "x"), cfg.threads, world.device.type)
                start = functools.partial(model.start, [prompt], 1)
            with torch.inference_mode():
                prepared = seconds(lambda: prepare_image(image, vision), torch.device("cpu"), cfg.repeats)
                picture = prepare_image(image, vision)
                chosen = seconds(lambda: (pixel_variance(np.concatenate(picture.tiles[1:]), vision.patch) if tokens == "variance" and picture.at.rows else None,
                                          token_orders([picture], vision)), torch.device("cpu"), cfg.repeats)
                seen = seconds(lambda: model.see([picture]), world.device, cfg.repeats)
                images = model.see([picture])[0]
                first = seconds(lambda: start(images=images), world.device, cfg.repeats)
        found = {name: statistics.median(times) for name, times in dict(open=prepared, select=chosen, tower=seen, first=first).items()}
        rows.append(dict(arch=arch, engine=engine, tokens=tokens, picture=f"{image.width}x{image.height}", tiles=len(picture.tiles), n_tokens=n,
                         prepare_ms=round(1e3 * found["open"], 1), select_ms=round(1e3 * found["select"], 2), tower_ms=round(1e3 * found["tower"]),
                         select_share=round(found["select"] / found["tower"], 5), tower_gflop=round(len(picture.tiles) * tower / 1e9), first_ms=round(1e3 * found["first"]),
                         first_gflop=round(flops / 1e9), first_of_all=None, gflop_of_all=None))
    for row in rows:
        row["first_of_all"], row["gflop_of_all"] = round(row["first_ms"] / rows[0]["first_ms"], 3), round(row["first_gflop"] / rows[0]["first_gflop"], 3)
    return rows


def vision_step(cfg, arch, engine):
    """One optimizer step of everything, the tower too, on one picture: its time and the most memory held."""
    settings, world = train_world(cfg, cfg.dtype, "false")
    keep_memory()
    vision, image = picture_of(cfg, cfg.tokens.split(",")[-1])
    n = n_tokens(*image.size, vision)
    model, prompt = seeing_model(cfg, arch, vision, n)
    model = model.to(world.device).train()
    optimizers, picture = make_optimizers(model, settings, world.dtype, lambda text: None), prepare_image(image, vision)
    answer = torch.arange(30, 30 + cfg.new, device=world.device)
    src, tgt = torch.tensor([prompt], device=world.device), answer[None]
    mask = torch.ones_like(tgt, dtype=torch.bool)
    if arch == "dec":
        src, tgt, mask = None, torch.cat((src, tgt), 1), torch.cat((torch.zeros_like(src, dtype=torch.bool), mask), 1)
    start = time.perf_counter()
    with world.precision():
        images = model.tokens_of([picture])[0]
        loss = model(src, None, tgt, mask, images=images)[1]
        loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return [dict(arch=arch, params_m=round(model.num_params() / 1e6, 1), tower_m=round(sum(p.numel() for p in model.tower.parameters()) / 1e6, 1), n_tokens=n, tiles=len(picture.tiles),
                 new=cfg.new, loss=round(loss.item(), 3), step_s=round(time.perf_counter() - start, 1), peak_mb=peak_memory(world.device))]


# ---------------------------------------------------------------------------------------------------------------------
# Quality

def bench_quality(cfg):
    cfg.run = cfg.run or newest_run()
    record = read_record(cfg.run)["settings"]
    try:
        settings = TrainSettings(**record)
    except TypeError as error:
        raise UserError(f"{cfg.run}/run.json is of another version of train.py ({error}); {cfg.run}/source has that one") from None
    data = cfg.data or settings.data
    if settings.objective == "seq2seq" and is_choice(data):
        raise UserError(f"--data={data} is for pretrained runs; {cfg.run} was trained on the task {settings.data}")
    if settings.objective != "seq2seq" and is_task(data):
        raise UserError(f"--data={data} is a task, and {cfg.run} was not trained on one: python train.py --data={data} --init_from={cfg.run}")
    if settings.objective != "seq2seq" and not is_choice(data) and cfg.eval_split != "val":
        raise UserError(f"--eval_split={cfg.eval_split}: text has only its held-out part, val")
    settings.device, settings.dtype, settings.threads, settings.eval_rows = cfg.device, cfg.dtype, cfg.threads, cfg.eval_rows
    cfg.skip_bad = cfg.skip_bad or settings.skip_bad
    world = World(settings)
    vision = read_vision(cfg.run)
    model, tokenizer = load_model(cfg.run, device=world.device).eval(), load_tokenizer(cfg.run)
    start = time.perf_counter()
    if vision:
        task = load_picture_task(data, cfg.skip_bad)
        if another_file(data, settings.data):
            task.splits[cfg.eval_split] = [row for rows in task.splits.values() for row in rows]
        found = score_task(model, tokenizer, task, settings, cfg, world, vision)
    elif is_choice(data):
        found = score_choices(model, tokenizer, settings.objective, load_choices(data, cfg.eval_split), cfg, world)
    elif settings.objective != "seq2seq":
        corpus = prepare(data, cfg.run, text_col=settings.text_col, max_tokens=1, log=lambda text: None)  # only the held-out part is read
        objective = Objective(settings.objective, tokenizer, settings.src_len, settings.tgt_len, settings.arch == "dec", settings.noise, settings.mean_span)
        found = held_out(model, corpus.splits["val"], objective, settings, world)
        found["perplexity"] = math.exp(found["text_loss"])
        found |= continuation_loss(model, tokenizer, corpus.splits["val"], settings, world)
    else:
        same = data.split(":")[0] == settings.data.split(":")[0]
        columns = (settings.source_col, settings.target_col) if same else (None, None)
        task = load_task(data, cfg.source_col or columns[0], cfg.target_col or columns[1], cfg.skip_bad)
        if another_file(data, settings.data):
            task.splits[cfg.eval_split] = [row for rows in task.splits.values() for row in rows]
        found = score_task(model, tokenizer, task, settings, cfg, world)
    row = dict(run=cfg.run, data=data, split=cfg.eval_split, seconds=round(time.perf_counter() - start, 1)) | {
        name: round(value, 4) for name, value in found.items()}
    table([row], list(row)[1:])
    return [row]


def another_file(data, trained):
    """Whether --data is a single file that the run was not trained on: all of its rows are held out then."""
    path, old = (os.path.realpath(name.partition(":")[2] or name) for name in (data, trained))
    return os.path.isfile(path) and path != old


def score_task(model, tokenizer, task, settings, cfg, world, vision=None):
    """Metrics, loss and loss with shuffled sources on held-out rows; writes the answers. With pictures, `blank` is the first metric where each is an empty ground."""
    rows = task.splits.get(cfg.eval_split)
    if not rows:
        raise UserError(f"--eval_split={cfg.eval_split}: {task.name} has no such rows; it has {', '.join(task.splits)}")
    rows = [rows[i] for i in evenly(len(rows), cfg.eval_rows)]
    if vision:
        pairs = PicturePairs(rows, tokenizer, settings.src_len, settings.tgt_len, settings.arch == "dec", vision, cfg.skip_bad)
        rows = pairs.rows
    else:
        pairs = Pairs(rows, tokenizer, settings.src_len, settings.tgt_len, settings.arch == "dec")
    every = list(range(len(rows)))
    texts = answers(model, pairs, every, settings.tgt_len, cfg.batch_size, world)
    path = cfg.out or os.path.join(cfg.run, "predictions.jsonl")
    with open(path, "w", encoding="utf-8") as f:
        for row, text in zip(rows, texts):
            f.write(json.dumps(dict(user_input=row.get("question", row["source"]), response=text, reference=row["target"],
                                    retrieved_contexts=[row.get("context", row["source"])]), ensure_ascii=False) + "\n")
    print(f"{len(rows)} answers in {path}; {pairs.describe()}")
    found = dict(rows=len(rows), **score(task, texts, rows), **pair_losses(model, pairs, every, 32, world))
    if vision and cfg.plot:
        plot_answers(pairs, texts, cfg.plot)
    if vision:
        found["blank"] = blind_score(model, task, pairs, every, settings.tgt_len, cfg.batch_size, world)
        found |= dict(picture_tokens=statistics.mean(map(sum, pairs.n_tokens)), first_ms=1e3 * first_token(model, pairs, evenly(len(rows), 30), world))
    return found


@torch.inference_mode()
def first_token(model, pairs, rows, world):
    """Median seconds from a row's pictures as they lie on disk to the first token of its answer, a row at a time."""
    def start(row):
        with world.precision():
            model.prefill([pairs.prompt(row)], 1, **pairs.shown(model, [row]))
    return statistics.median(seconds(lambda: start(row), world.device, 1)[0] for row in rows)


def plot_answers(pairs, texts, path, each=5):
    """The first pictures with right answers above the first with wrong ones."""
    plt = pyplot()
    seen = [row for row in range(len(texts)) if pairs.rows[row]["images"]]
    right = [row for row in seen if texts[row] == pairs.rows[row]["target"]]
    wrong = [row for row in seen if texts[row] != pairs.rows[row]["target"]]
    figure, axes = plt.subplots(2, each, figsize=(2.6 * each, 7), squeeze=False)
    for line, rows in zip(axes, (right, wrong)):
        for axis in line:
            axis.axis("off")
        for axis, row in zip(line, rows):
            source = pairs.rows[row]["source"].replace(IMAGE, "").strip()
            said = f"{source}\n{texts[row]}" + ("" if row in right else f"\n(right: {pairs.rows[row]['target']})")
            axis.imshow(load_image(pairs.rows[row]["images"][0], "a picture"))
            axis.set_title("\n".join(part for words in said.split("\n") for part in textwrap.wrap(words, 34)), fontsize=8, color="black" if row in right else "tab:red")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


@torch.no_grad()
def continuation_logp(model, tokenizer, objective, heads, bodies, world):
    """Log-probability (rows,) in nats of each body behind its head, both lists of ids, the heads of one length. A causal or prefix
    run goes on where the head ends; a span run fills a hole behind it."""
    skip, ends = 0, []
    if objective in ("span", "ul2"):
        hole = [tokenizer.sentinel(0)]
        bodies, skip, ends = [hole + list(body) for body in bodies], 1, hole + [tokenizer.eos]
    decoder_only = model.config.n_enc == 0
    if decoder_only and objective != "causal":
        ends = [*ends, tokenizer.sep]
    heads = [[*head, *ends] for head in heads]
    if decoder_only:
        bodies, skip = [head + list(body) for head, body in zip(heads, bodies)], len(heads[0]) + skip
    tgt, real = pad_rows([np.array(body) for body in bodies], max(map(len, bodies)), tokenizer.pad)
    src = None if decoder_only else torch.tensor(heads, device=world.device)
    tgt, mask = torch.from_numpy(tgt).to(world.device), torch.from_numpy(real & (np.arange(real.shape[1]) >= skip)).to(world.device)
    with world.precision():
        logits, _ = model(src, None, tgt, mask)
    return logits.float().log_softmax(-1).gather(2, tgt[:, :, None])[:, :, 0].masked_fill(~mask, 0).sum(1).cpu().numpy()


def continuation_loss(model, tokenizer, tokens, settings, world):
    """Nats a token of held-out text given the text before it: what runs of different objectives can be compared by. What stands
    before is as long as a source can be beside a hole, whether the objective has one or not."""
    before, after = settings.src_len - 2, settings.tgt_len - 1
    if min(before, after) < 1 or len(tokens) < before + after:
        return {}
    starts = eval_starts(len(tokens), before + after, settings.eval_rows or 1024, False)
    total = 0
    for rows in np.array_split(starts, math.ceil(len(starts) / settings.batch_size)):
        ids = tokens.windows(rows, before + after).tolist()
        total += continuation_logp(model, tokenizer, settings.objective, [row[:before] for row in ids], [row[before:] for row in ids], world).sum()
    return dict(continuation_loss=-float(total) / (len(starts) * after))


def score_choices(model, tokenizer, objective, questions, cfg, world):
    """Accuracy in percent by log-likelihood: of a choice as it is (acc), and divided by its bytes (acc_norm)."""
    questions = [questions[i] for i in evenly(len(questions), cfg.eval_rows)]
    right = np.zeros(2)
    for question, choices, answer in tqdm(questions, desc="choices"):
        head = tokenizer.encode(f"Question: {question}\nAnswer:")
        bodies = tokenizer.encode_batch([" " + choice for choice in choices])
        logp = continuation_logp(model, tokenizer, objective, [head] * len(choices), bodies, world)
        size = np.array([len(choice.encode()) for choice in choices])
        right += [logp.argmax() == answer, (logp / size).argmax() == answer]
    return dict(rows=len(questions), acc=100 * right[0] / len(questions), acc_norm=100 * right[1] / len(questions),
                chance=100 * float(np.mean([1 / len(choices) for _, choices, _ in questions])))


def bench_compare(cfg):
    """Each run is train.py (or distill.py) and then `bench.py quality`, in processes of their own."""
    ways = [("cross-entropy", None)] + ([("distilled", cfg.distill)] if cfg.teacher else [])
    trials = [trial_of(cfg, preset, arch, seed, words) for seed in range(1, cfg.seeds + 1) for preset in cfg.preset.split(",") for arch in cfg.archs.split(",") for _, words in ways]
    rows = run_trials(cfg, trials)
    groups = [(dict(preset=preset, arch=arch, trained=way), trial_of(cfg, preset, arch, None, words))
              for preset in cfg.preset.split(",") for arch in cfg.archs.split(",") for way, words in ways]
    report(cfg, rows, groups, "arch", ("preset", "trained"))
    return rows


def bench_distill(cfg):
    """The paper's Figure 5: one thing is varied at a time."""
    alphas, kls, sequences = cfg.alphas.split(","), cfg.kls.split(","), cfg.sequences.split(",")
    middle = alphas[len(alphas) // 2]
    points = [("alpha 0", cfg.preset, "--alpha=0")] * ("0" in alphas)
    points += [(f"{kl}, alpha {alpha}", cfg.preset, f"--alpha={alpha} --kl={kl} --sequences={sequences[0]}") for kl in kls for alpha in alphas if alpha != "0"]
    points += [(f"{other}'s answers", cfg.preset, f"--alpha={middle} --kl={kls[0]} --sequences={other}") for other in sequences[1:]]
    points += [(size, size, f"--alpha={middle} --kl={kls[0]} --sequences={sequences[0]}") for size in cfg.sizes.split(",") if size]
    points = [(name, preset, f"{words} {cfg.distill}".strip()) for name, preset, words in points]
    rows = run_trials(cfg, [trial_of(cfg, preset, arch, seed, words) for seed in range(1, cfg.seeds + 1) for arch in cfg.archs.split(",") for _, preset, words in points])
    groups = [(dict(point=name, arch=arch), trial_of(cfg, preset, arch, None, words)) for arch in cfg.archs.split(",") for name, preset, words in points]
    report(cfg, rows, groups, "point", ("arch",))
    return rows


def trial_of(cfg, preset, arch, seed, words):
    """What a row of the results file must agree with to be this run's; words None: train.py alone, else distill.py with them."""
    budget = f"{cfg.max_minutes:g} min" if cfg.equal == "time" else f"{cfg.max_iters} steps, equal {cfg.equal}"
    return dict(data=cfg.data, split=cfg.eval_split, preset=preset, arch=arch, budget=budget, train=cfg.train, teacher=None if words is None else cfg.teacher,
                distill=words) | ({} if seed is None else dict(seed=seed))


def matches(trial, row):
    return all(row.get(key) == value for key, value in trial.items())


def run_trials(cfg, trials):
    """Runs those that are not in the results file yet, and returns the rows of all."""
    name = cfg.data.replace(":", "-").replace("/", "-")
    cfg.results = cfg.results or os.path.join("out", f"compare-{name}.jsonl")
    os.makedirs(os.path.dirname(cfg.results) or ".", exist_ok=True)
    done, cut = read_results(cfg.results)
    for trial in tqdm(trials, desc="compare", unit="run"):
        if not any(matches(trial, row) for row in done):
            done.append(compare_run(cfg, trial, os.path.splitext(cfg.results)[0], done))
            with open(cfg.results, "a", encoding="utf-8") as f:
                f.write("\n" * cut + json.dumps(done[-1]) + "\n")
            cut = False
    return [row for trial in trials for row in done if matches(trial, row)]


def report(cfg, rows, groups, across, series):
    """Prints a line for each group (what it is called, what its rows agree with); the plot has a curve for each value of `series`."""
    metric, lines, points = rows[0]["metric"], [], []
    for name, trial in groups:
        group = [row for row in rows if matches(trial, row)]
        line = dict(name, runs=len(group))
        for key in ("params_m", "train_s", "tokens_m", "steps"):
            line[key] = round(statistics.mean(row[key] for row in group), 2)
        for key in (metric, *[key for key in group[0] if key in ("exact", "rouge_l", "f1", "val_loss", "shuffled_loss", "blank") and key != metric]):
            values = [row[key] for row in group]
            line[key] = f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}"
        lines.append(line)
        points.append((name[across], ", ".join(str(name[key]) for key in series), [row[metric] for row in group]))
    print(f"{cfg.data}, {cfg.eval_split}, {rows[0]['rows']} rows, {trial['budget']} a run; mean ± standard deviation over seeds")
    table(lines, list(lines[0]))
    if cfg.plot:
        plot_compare(points, metric, cfg)


def read_results(path):
    """The rows of a results file, and whether its last line was cut off."""
    if not os.path.exists(path):
        return [], False
    with open(path, encoding="utf-8") as f:
        lines = f.readlines()
    rows = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows, bool(lines) and not lines[-1].endswith("\n")


def compare_run(cfg, trial, folder, done):
    """Trains and scores one run; the row of the results file. A run that was scored on another split is not trained again."""
    what = [trial["budget"], trial["train"]] + ([trial["teacher"], trial["distill"]] if trial["distill"] is not None else [])
    mark = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:4]
    short = trial["arch"].replace("/", "")
    out = os.path.join(folder, f"{trial['preset']}-{short}-{trial['seed']}-{mark}")
    twin = next((row for row in done if matches(trial | dict(split=row.get("split")), row)), None)
    trained = twin and os.path.exists(os.path.join(out, "run.json"))
    common = [f"--device={cfg.device}", f"--threads={cfg.threads}"]
    if not trained:
        shutil.rmtree(out, ignore_errors=True)  # of a sweep that was cut off
        train_trial(cfg, trial, short, out, common)
    report = os.path.join(out, "quality.json")
    call([os.path.join(ROOT, "bench.py"), "quality", f"--run={out}", f"--eval_split={cfg.eval_split}", f"--json={report}", *common])
    with open(report, encoding="utf-8") as f:
        scores = json.load(f)["rows"][0]
    with open(os.path.join(out, "log.jsonl"), encoding="utf-8") as f:
        log = [json.loads(line) for line in f]
    params = load_model(out).num_params()
    scores = {key: value for key, value in scores.items() if key not in ("run", "data", "split", "seconds")}
    metric = next(key for key in scores if key != "rows")
    return trial | dict(metric=metric, params_m=round(params / 1e6, 3), train_s=log[-1]["time_s"], tokens_m=log[-1]["tokens"] / 1e6,
                        **({} if trial["distill"] is None else dict(teacher_s=round(read_record(out)["teacher_s"], 1))), steps=log[-1]["step"], commit=twin["commit"] if trained else commit()) | scores


def train_trial(cfg, trial, short, out, common):
    """The command that trains a run of a sweep into the folder `out`; `short` is the architecture's name in folders, `common` the machine's keys."""
    arch = ["--arch=dec"] if trial["arch"] == "dec" else ["--arch=encdec", f"--split={trial['arch']}"]
    more = shlex.split(cfg.train.replace("{arch}", short).replace("{seed}", str(trial["seed"])))
    seeing = is_picture_task(cfg.data)
    words = [*arch, f"--preset={trial['preset']}", f"--seed={trial['seed']}", f"--data={cfg.data}", *([] if seeing else ["--objective=seq2seq"]), f"--out={out}", *common, *more]
    words.append(f"--max_minutes={cfg.max_minutes}" if cfg.equal == "time" else f"--max_iters={equal_steps(cfg, words)}")
    if trial["distill"] is None:
        call([os.path.join(ROOT, "vision.py" if seeing else "train.py"), *words])
    else:
        call([os.path.join(ROOT, "distill.py"), *distill_words(words), f"--teacher={cfg.teacher}", *shlex.split(trial["distill"])])


def distill_words(words):
    """Keys of train.py as distill.py has them: the vocabulary is the teacher's, and --student is a size or a run."""
    given = {name: value or "true" for name, _, value in (word[2:].partition("=") for word in words)}
    student = given.pop("init_from", given.pop("preset"))
    given = {name: value for name, value in given.items() if name not in ("preset", "objective", "vocab_size", "tokenizer")}
    return [f"--{name}={value}" for name, value in given.items()] + [f"--student={student}"]


def equal_steps(cfg, words):
    """Steps that see the rows, or cost the FLOPs, of cfg.max_iters steps of the decoder-only model of the same preset."""
    if is_picture_task(cfg.data):
        raise UserError(f"--equal={cfg.equal} counts what texts cost; with pictures runs have the same time, --max_minutes")
    def step_cost(words):
        settings = resolve(parse(TrainSettings, "", words))
        job = Finetuning(settings, World(settings), lambda text: None)
        chosen = {name: getattr(settings, name) for name in ("n_embd", "n_head", "n_kv_head", "head_dim", "n_hidden") if getattr(settings, name)}
        config = make_config(settings.preset, settings.arch, settings.split, settings.n_enc, settings.n_dec, vocab_size=job.tokenizer.vocab_size, **chosen)
        rows = len(job.pairs["train"]) / len(job.order.plan(0))  # a step
        return rows * (Transformer(config).flops(*job.lengths) if cfg.equal == "flops" else 1)
    rival = ["--arch=dec" if word.startswith("--arch=") else word for word in words if not word.startswith("--split=")]
    return max(1, round(cfg.max_iters * step_cost(rival) / step_cost(words)))


def call(words):
    done = subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(f"{' '.join(words)} ended with status {done.returncode}; what it said stands above")


def commit():
    done = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None


def plot_compare(points, metric, cfg):
    """points: (place on the axis, curve, values of its runs)."""
    plt = pyplot()
    places, curves = list(dict.fromkeys(place for place, _, _ in points)), list(dict.fromkeys(curve for _, curve, _ in points))
    figure, axes = plt.subplots(figsize=(max(6, 1.1 * len(places)), 4))
    for k, curve in enumerate(curves):
        mine = [(places.index(place) + 0.15 * (k - (len(curves) - 1) / 2), values) for place, name, values in points if name == curve]
        axes.errorbar([x for x, _ in mine], [np.mean(v) for _, v in mine], [np.std(v, ddof=1) if len(v) > 1 else 0 for _, v in mine], fmt="s", ms=6, capsize=4, label=curve)
        for x, values in mine:
            axes.plot([x] * len(values), values, "k.", ms=4, alpha=0.5)
    axes.set_xticks(range(len(places)), [place.replace(", ", ",\n") for place in places])
    axes.set(ylabel=metric, title=cfg.data)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(cfg.plot, dpi=120)


# ---------------------------------------------------------------------------------------------------------------------

def table(rows, columns):
    cells = [columns] + [[str(row[column]) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


def pyplot():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def machine(threads):
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            name = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), name)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(cpu=name, cores=os.cpu_count(), threads=threads or torch.get_num_threads(), gpu=gpu, torch=torch.__version__, python=platform.python_version())


def check_list(cfg, name, known, everything=None):
    """--name holds some of `known`, separated by commas; "all" is all of them."""
    if getattr(cfg, name) == "all":
        setattr(cfg, name, ",".join(everything or known))
    if bad := [value for value in getattr(cfg, name).split(",") if value not in known]:
        raise UserError(f"--{name}={bad[0]}: it takes {', '.join(known)}, separated by commas, or all")


def at_least_one(cfg, *names):
    for name in names:
        if getattr(cfg, name) is not None and getattr(cfg, name) < 1:
            raise UserError(f"--{name}={getattr(cfg, name)} must be at least 1")


def check_train(cfg):
    check_list(cfg, "engine", ("encdec", "dec", "t5"))
    check_numbers(cfg, "batch")
    at_least_one(cfg, "src", "new", "repeats", "rows")


def check_numbers(cfg, name):
    if not all(part.isdigit() and int(part) > 0 for part in getattr(cfg, name).split(",")):
        raise UserError(f"--{name}={getattr(cfg, name)} must be a positive number, or several separated by commas")


def check_speed(cfg):
    check_list(cfg, "archs", ARCHS)
    check_list(cfg, "engine", ENGINES)
    config_of(cfg, cfg.archs.split(",")[0])
    for name in ("src", "new", "batch", *(["clients"] if cfg.clients else [])):
        check_numbers(cfg, name)
    at_least_one(cfg, "examples")
    if cfg.clients and (cfg.plot or cfg.batch != "1"):
        raise UserError("--clients makes batches of whoever waits, and draws nothing: leave --batch and --plot out")
    check_plot(cfg)


def check_load(cfg):
    if cfg.run and not cfg.run.startswith("hf:"):
        raise UserError(f"--run={cfg.run} should be hf:FOLDER")
    at_least_one(cfg, "repeats")


def check_cost(cfg):
    check_list(cfg, "archs", ARCHS)
    config_of(cfg, cfg.archs.split(",")[0])
    at_least_one(cfg, "src", "new", "batch")


def check_vision(cfg):
    check_list(cfg, "archs", ARCHS)
    check_list(cfg, "engine", ("torch", "onnx-fp32", "onnx-int8", "onnx-int4"))
    check_list(cfg, "tokens", ("all", "variance", "learned", "concat"))
    at_least_one(cfg, "repeats", "new")
    picture_of(cfg, cfg.tokens.split(",")[-1])


def check_plot(cfg):
    if cfg.plot and not cfg.plot.endswith((".png", ".pdf", ".svg")):
        raise UserError(f"--plot={cfg.plot} must end in .png, .pdf or .svg")


def check_quality(cfg):
    check_plot(cfg)
    if cfg.plot and not os.path.exists(os.path.join(cfg.run or newest_run(), "vision.json")):
        raise UserError(f"--plot={cfg.plot} draws pictures, and {cfg.run or newest_run()} is a run without")
    for name in ("batch_size", "eval_rows", "threads"):
        if getattr(cfg, name) < (name == "batch_size"):
            raise UserError(f"--{name}={getattr(cfg, name)} is too small")


def check_compare(cfg):
    check_list(cfg, "preset", tuple(PRESETS))
    check_list(cfg, "archs", ARCHS)
    if (cfg.equal == "time") == (cfg.max_iters is not None):
        raise UserError("--equal=time takes --max_minutes; --equal=tokens and --equal=flops take --max_iters")
    for name in ("train", "distill"):
        try:
            words = shlex.split(getattr(cfg, name))
        except ValueError as error:
            raise UserError(f"--{name}={getattr(cfg, name)}: {error}") from None
        if not all(word.startswith("--") for word in words):
            raise UserError(f"--{name}={getattr(cfg, name)}: write its keys as --key=value")
    if cfg.distill and not cfg.teacher:
        raise UserError(f"--distill={cfg.distill} needs a --teacher")
    check_plot(cfg)
    at_least_one(cfg, "seeds")


def check_distill(cfg):
    check_compare(cfg)
    check_list(cfg, "kls", ("reverse", "forward", "jsd"))
    check_list(cfg, "sequences", ("data", "student", "teacher"))
    if cfg.sizes:
        check_list(cfg, "sizes", tuple(PRESETS))
    if not cfg.teacher:
        raise UserError("--teacher is missing: a run folder of train.py --arch=dec, or hf:FOLDER_OR_ID")
    if "," in cfg.preset:
        raise UserError(f"--preset={cfg.preset}: one size; the others go into --sizes")
    try:
        fine = all(0 <= float(alpha) <= 1 for alpha in cfg.alphas.split(","))
    except ValueError:
        fine = False
    if not fine:
        raise UserError(f"--alphas={cfg.alphas} must be numbers from 0 to 1, separated by commas")


COMMANDS = {"train": (Train, check_train, bench_train), "speed": (Speed, check_speed, bench_speed), "flops": (Cost, check_cost, bench_flops),
            "memory": (Cost, check_cost, bench_memory), "load": (Load, check_load, bench_load), "vision": (Vision, check_vision, bench_vision), "quality": (Quality, check_quality, bench_quality), "compare": (Compare, check_compare, bench_compare),
            "distill": (Distill, check_distill, bench_distill)}


def main():
    words = sys.argv[1:]
    if not words or words[0] not in COMMANDS:
        if not {"--help", "-h"} & set(words):
            raise UserError(f"the first word is one of {', '.join(COMMANDS)}; --help tells more")
        print(__doc__)
        return
    kind, check, command = COMMANDS[words[0]]
    cfg = parse(kind, __doc__, words[1:])
    check(cfg)
    if cfg.json:
        open(cfg.json, "a", encoding="utf-8").close()  # that it can be written should not turn out at the end
    rows = command(cfg)
    about = machine(cfg.threads)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if cfg.json:
        with open(cfg.json, "w", encoding="utf-8") as f:
            json.dump(dict(machine=about, rows=rows), f, indent=1)


if __name__ == "__main__":
    script(main)
