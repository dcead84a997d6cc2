"""Measures what models cost. Every subcommand prints a table and, with --json=FILE, writes the rows behind it.

    python bench.py train                     training tokens/s: encoder-decoder, decoder-only, Hugging Face T5 beside them
    python bench.py speed --preset=330m       first token and tokens/s of generating, batch 1, 512 in, 128 out

Speeds are medians after a warm-up. A machine's speed drifts: compare rows of one sitting, as ratios.
"""
import functools
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

from data.cli import UserError, parse, script, setting
from model import PRESETS, ModelError, Transformer, make_config
from train import Settings as TrainSettings
from train import World, loss_of, make_optimizers, resolve


@dataclass
class Settings:
    preset: str = setting(None, "size; default: small for train, 330m for speed", tuple(PRESETS))
    split: str = setting("2/3", "the encoder's share of the layers", ("1/3", "1/2", "2/3"))
    engine: str = setting("all", "all, or some of encdec, dec, t5 (Hugging Face's, the peer), separated by commas")
    src: int = setting(512, "source tokens a row")
    new: int = setting(128, "speed: tokens generated a row; train: target tokens a row")
    batch: str = setting(None, "rows a forward pass; train takes several, separated by commas, and keeps the best; default: 1 for "
                         "speed, 4,8,16 for train")
    rows: int = setting(64, "train: rows an optimizer step, accumulated over passes of --batch rows")
    dtype: str = setting("auto", "auto (train: tries both and keeps the best), float32 or bfloat16", ("auto", "float32", "bfloat16"))
    compile: str = setting("auto", "torch.compile of our layers; auto: in train where train.py would, not in speed", ("auto", "true", "false"))
    repeats: int = setting(5, "measurements behind each median")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    threads: int = setting(0, "CPU threads; 0 is torch's own choice")
    json: str = setting(None, "write the rows to this file")


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
    """Hugging Face's T5 (v1.1) of the shape of an encoder-decoder of ours, with its MLP's width solved for equal parameters."""
    try:
        from transformers import T5Config, T5ForConditionalGeneration
    except ImportError:
        raise UserError("--engine=t5 needs transformers: pip install -r requirements-dev.txt, or leave t5 out") from None
    shape = T5Config(vocab_size=config.vocab_size, d_model=config.n_embd, d_kv=config.head_dim, num_heads=config.n_head,
                     d_ff=config.n_hidden, num_layers=config.n_enc, num_decoder_layers=config.n_dec, feed_forward_proj="gated-gelu",
                     tie_word_embeddings=True, decoder_start_token_id=0, dropout_rate=0.0)
    return T5ForConditionalGeneration(shape)


def bench_train(cfg):
    """Whole optimizer steps on random rows: tokens/s, source and target, and the share of the matrix-product rate."""
    rows, encdec = [], make_config(cfg.preset, "encdec", cfg.split, src_len=cfg.src, tgt_len=cfg.new)
    dec = make_config(cfg.preset, "dec", src_len=cfg.src, tgt_len=cfg.new)
    precisions = ("float32", "bfloat16") if cfg.dtype == "auto" else (cfg.dtype,)
    trials = [(engine, dtype, int(batch)) for engine in cfg.engine.split(",") for dtype in precisions
              for batch in (cfg.batch or "4,8,16").split(",")]
    for engine, dtype, batch in tqdm(trials, desc="train"):
        settings, world = train_world(cfg, dtype, cfg.compile if engine != "t5" else "false")
        torch.manual_seed(0)
        model = (peer_t5(encdec) if engine == "t5" else Transformer(dec if engine == "dec" else encdec)).to(world.device)
        src = torch.randint(cfg.vocab, (batch, cfg.src), device=world.device)
        tgt = torch.randint(cfg.vocab, (batch, cfg.new + (cfg.src if engine == "dec" else 0)), device=world.device)
        every = torch.ones_like(tgt, dtype=torch.bool)
        if engine == "t5":
            optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-4, fused=world.device.type != "mps")]
        else:
            optimizers = make_optimizers(model, settings, world.dtype, lambda text: None)
            if world.compile:
                for module in model.compiled_parts():
                    module.compile()

        passes = max(1, cfg.rows // batch)

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

        step()
        times = seconds(step, world.device, cfg.repeats)
        typical = statistics.median(times)
        flops = 3 * batch * passes * Transformer.flops(model if engine != "t5" else Transformer(encdec), cfg.src, tgt.size(1))
        rows.append(dict(arch="dec" if engine == "dec" else "encdec", split=cfg.split, engine=engine, dtype=dtype, batch=batch, rows=batch * passes,
                         src=cfg.src, new=cfg.new, params_m=round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
                         compiled=engine != "t5" and world.compile, step_ms=round(typical * 1e3, 1), spread_ms=round((times[-1] - times[0]) * 1e3, 1),
                         tok_s=round(batch * passes * (cfg.src + cfg.new) / typical), gflop_s=round(flops / typical / 1e9),
                         mfu=round(flops / typical / world.rate(), 3)))
        torch.compiler.reset()
        tqdm.write(json.dumps(rows[-1]), file=sys.stderr)
    best = {engine: max((row for row in rows if row["engine"] == engine), key=lambda row: row["tok_s"]) for engine in cfg.engine.split(",")}
    table(list(best.values()), ("engine", "dtype", "batch", "rows", "compiled", "params_m", "step_ms", "tok_s", "gflop_s", "mfu"))
    if "t5" in best and "encdec" in best:
        print(f"encdec / t5, the best of each: {best['encdec']['tok_s'] / best['t5']['tok_s']:.2f} times the tokens/s")
    return rows


def bench_speed(cfg):
    """Generation: time to the first token, then tokens/s; random weights, which speed does not depend on."""
    rows, batch = [], int(cfg.batch or 1)
    _, world = train_world(cfg, cfg.dtype, "false")
    dtype = world.dtype
    for engine in tqdm(cfg.engine.split(","), desc="speed"):
        torch.manual_seed(0)
        config = make_config(cfg.preset, "dec" if engine == "dec" else "encdec", cfg.split)
        with torch.device(world.device):
            model = (peer_t5(config) if engine == "t5" else Transformer(config)).to(dtype).eval()
        compiled = engine != "t5" and cfg.compile == "true"
        if engine != "t5":
            model.pack()
        if compiled:  # what reads the prompt; the decoder's steps, each of another length, gain nothing
            for module in model.enc:
                module.compile()
        prompts = torch.randint(5, cfg.vocab, (batch, cfg.src), device=world.device)

        def generate(n):
            if engine == "t5":
                with torch.inference_mode():
                    model.generate(prompts, max_new_tokens=n, min_new_tokens=n, do_sample=False)
                return
            model.config.eos_id = -1  # never ends early
            made = sum(1 for _ in model.generate(prompts.tolist(), n))
            assert made == n

        first = statistics.median(seconds(lambda: generate(1), world.device, cfg.repeats))
        whole = statistics.median(seconds(lambda: generate(cfg.new), world.device, cfg.repeats))
        rows.append(dict(arch="dec" if engine == "dec" else "encdec", split=cfg.split, engine=f"{engine}-{str(dtype)[6:]}{'-compiled' * compiled}", cache=True, batch=batch,
                         src=cfg.src, new=cfg.new, params_m=round(sum(p.numel() for p in model.parameters()) / 1e6, 1),
                         first_ms=round(first * 1e3, 1), tok_s=round(batch * (cfg.new - 1) / (whole - first), 2)))
        tqdm.write(json.dumps(rows[-1]), file=sys.stderr)
    table(rows, ("engine", "params_m", "batch", "src", "new", "first_ms", "tok_s"))
    return rows


def table(rows, columns):
    cells = [columns] + [[str(row[column]) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


def machine(threads):
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            name = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), name)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(cpu=name, cores=os.cpu_count(), threads=torch.get_num_threads(), gpu=gpu, torch=torch.__version__, python=platform.python_version())


COMMANDS = {"train": bench_train, "speed": bench_speed}


def main():
    words = sys.argv[1:]
    if not words or words[0] not in COMMANDS:
        if not {"--help", "-h"} & set(words):
            raise UserError(f"the first word is one of {', '.join(COMMANDS)}; --help tells more")
    else:
        words = words[1:]
    cfg = parse(Settings, __doc__, words)
    command = COMMANDS[sys.argv[1]]
    cfg.preset = cfg.preset or ("small" if command is bench_train else "330m")
    cfg.engine = {"all": "encdec,dec,t5"}.get(cfg.engine, cfg.engine)
    for name in cfg.engine.split(","):
        if name not in ("encdec", "dec", "t5"):
            raise UserError(f"--engine={name}: it takes encdec, dec, t5")
    for name in ("src", "new", "repeats", "rows"):
        if getattr(cfg, name) < (2 if name == "new" else 1):
            raise UserError(f"--{name}={getattr(cfg, name)} is too small")
    if not all(size.isdigit() and int(size) > 0 for size in (cfg.batch or "1").split(",")):
        raise UserError(f"--batch={cfg.batch} must be positive numbers")
    if command is bench_speed and "," in (cfg.batch or ""):
        raise UserError("speed takes one --batch")
    if cfg.json:
        open(cfg.json, "a", encoding="utf-8").close()  # that it can be written should not turn out at the end
    cfg.vocab = PRESETS[cfg.preset]["vocab_size"]
    rows = command(cfg)
    about = machine(cfg.threads)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if cfg.json:
        with open(cfg.json, "w", encoding="utf-8") as f:
            json.dump(dict(machine=about, rows=rows), f, indent=1)


if __name__ == "__main__":
    script(main, ModelError)
