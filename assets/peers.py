"""What others do with the same data and shapes: the rows of results.md that are not ours.

    python assets/peers.py t5 --data=codexglue --lr=3e-3 --max_iters=3800
    python assets/peers.py ctranslate2 --preset=330m                        pip install it first
    python assets/peers.py mu                                               the authors' own model

`t5` trains Hugging Face's T5 (v1.1) of our shape on our rows, steps and vocabulary, with AdamW at
--lr, all parameters alike, and scores it as train.py scores ours: run it at several rates, the best
is its figure. It takes train.py's keys of data, sizes, steps, rate and seed.

`ctranslate2` converts that T5, random weights, to int8, and times the first token and those after
it as `python bench.py speed` does; quote ratios of one sitting.

`mu` times the architecture that the authors released, random weights: in float32 without a cache,
as their code computes, then as ours computes it.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch

import bench
import train
from bench import PeerT5, config_of
from data.evaluate import task_metrics
from data.sets import open_data
from lib.device import start, to_device
from lib.settings import UserError, given, progress, read_settings, script, setting
from model import PRESETS, Config, make_config

# Of train.py's keys those that T5 is trained with.
KEYS = """data source_col target_col preset split n_enc n_dec tokenizer vocab_size src_len tgt_len
max_iters batch_size lr warmup_iters schedule eval_rows seed device dtype threads""".split()


class T5(PeerT5):
    """As a Transformer is called."""

    def __init__(self, config):
        super().__init__(config)
        self.config = config
        # What its decoder reads first, in training and after it.
        self.t5.config.decoder_start_token_id = self.t5.config.pad_token_id = config.pad_id

    def forward(self, src, tgt, mask):
        labels = tgt.masked_fill(~mask, -100)
        seen = src != self.config.pad_id
        loss = self.t5(input_ids=src, attention_mask=seen, labels=labels).loss
        return loss * mask.sum()

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens):
        """Greedy, as Transformer.generate: the new ids of every step, None for ended rows."""
        pad, eos = self.config.pad_id, self.config.eos_id
        src = torch.full((len(prompts), max(map(len, prompts))), pad, device=self.t5.device)
        for row, ids in zip(src, prompts):
            row[: len(ids)] = torch.tensor(ids, device=src.device)
        ends = dict(eos_token_id=eos, pad_token_id=eos, decoder_start_token_id=pad)
        more = dict(max_new_tokens=max_new_tokens, do_sample=False) | ends
        answers = self.t5.generate(src, attention_mask=src != pad, **more)[:, 1:]
        ended = (answers == eos).cumsum(1) > 0
        for step, over in zip(answers.T.tolist(), ended.T.tolist()):
            yield [None if end else id for id, end in zip(step, over)]


def train_t5(words):
    cfg = train.resolve(read_settings(train.Settings, __doc__, words))
    if not cfg.max_iters:
        raise UserError("--max_iters is missing: how many steps")
    if cfg.objective != "seq2seq" or cfg.arch != "encdec":
        raise UserError("T5 is an encoder-decoder on a task: --data=docstring, for example")
    if others := set(given()) - set(KEYS):
        raise UserError(f"T5 does not take --{', --'.join(sorted(others))}")
    world = start(cfg)
    train_set, valid_set = open_data(cfg, world.say, cfg.batch_size)
    tokenizer = train_set.tokenizer
    ids = dict(pad_id=tokenizer.pad, bos_id=tokenizer.bos, eos_id=tokenizer.eos)
    ids |= dict(vocab_size=tokenizer.vocab_size, src_len=cfg.src_len, tgt_len=cfg.tgt_len)
    torch.manual_seed(cfg.seed)
    config = make_config(cfg.preset, cfg.arch, cfg.split, cfg.n_enc, cfg.n_dec, **ids)
    model = T5(config).to(world.device)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, betas=(0.9, 0.95), fused=True)
    begin = time.perf_counter()
    for step in progress(range(cfg.max_iters), "T5"):
        optimizer.param_groups[0]["lr"] = cfg.lr * train.lr_share(step, cfg)
        batch = train_set.batch(step, np.arange(cfg.batch_size))
        with world.autocast():
            loss = model(*to_device(batch, world.device)) / max(1, int(batch[2].sum()))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - begin
    found = task_metrics(model.eval(), valid_set, cfg.eval_rows, world)
    row = dict(peer="t5", params_m=round(sum(p.numel() for p in model.parameters()) / 1e6, 2))
    row |= dict(lr=cfg.lr, steps=cfg.max_iters, seconds=round(seconds), seed=cfg.seed)
    print(json.dumps(row | {name: round(float(value), 4) for name, value in found.items()}))


@dataclass
class Speed:
    preset: str = setting("330m", "size", tuple(PRESETS))
    src: int = setting(512, "tokens in", low=1)
    new: int = setting(128, "tokens out", low=2)
    repeats: int = setting(5, "requests behind each median", low=1)
    threads: int = setting(2, "CPU threads", low=1, high=4096)


def time_ctranslate2(words):
    import ctranslate2
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    cfg = read_settings(Speed, __doc__, words)
    torch.manual_seed(0)
    config = config_of(cfg.preset, "2/3", cfg.src, cfg.new)
    peer, names = PeerT5(config), {"<pad>": 0, "</s>": 1, "<unk>": 2}
    names |= {f"w{i}": i for i in range(3, config.vocab_size)}
    with tempfile.TemporaryDirectory() as folder:
        peer.t5.save_pretrained(folder)
        text = Tokenizer(WordLevel(names, unk_token="<unk>"))
        text.pre_tokenizer = WhitespaceSplit()  # its converter wants a tokenizer
        marks = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
        PreTrainedTokenizerFast(tokenizer_object=text, **marks).save_pretrained(folder)
        converter = ctranslate2.converters.TransformersConverter(folder)
        converter.convert(f"{folder}/int8", quantization="int8")
        how = dict(device="cpu", compute_type="int8", intra_threads=cfg.threads)
        translator = ctranslate2.Translator(f"{folder}/int8", **how)
    rng, seconds = np.random.default_rng(0), {1: [], cfg.new: []}
    for _ in range(cfg.repeats + 1):
        prompt = [f"w{i}" for i in rng.integers(3, config.vocab_size, cfg.src)]
        for n, times in seconds.items():
            begin = time.perf_counter()
            length = dict(max_decoding_length=n, min_decoding_length=n, max_input_length=0)
            translator.translate_batch([prompt], beam_size=1, end_token=[], **length)
            times.append(time.perf_counter() - begin)
    first, whole = (statistics.median(times[1:]) for times in seconds.values())  # 0 warms up
    row = dict(peer="ctranslate2-int8", src=cfg.src, new=cfg.new, first_ms=round(first * 1e3, 1))
    row["params_m"] = round(sum(p.numel() for p in peer.parameters()) / 1e6, 1)
    print(json.dumps(row | dict(tok_s=round((cfg.new - 1) / (whole - first), 2))))


@dataclass
class Mu:
    src: int = setting(512, "tokens in", low=1)
    new: int = setting(128, "tokens out", low=2)
    repeats: int = setting(3, "requests behind each median", low=1)
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    threads: int = setting(0, "CPU threads; 0 is the engine's choice", high=4096)
    preset, seed, dtype, compile, deterministic = "330m", 0, "auto", "false", False


def time_mu(words):
    cfg = read_settings(Mu, __doc__, words)
    sizes = dict(n_embd=1024, n_head=6, n_kv_head=3, head_dim=64, n_hidden=4096, vocab_size=32128)
    dialect = dict(mlp="gelu", bias="all", qk_norm=False, src_len=1024, tgt_len=1024)
    config = Config(n_enc=20, n_dec=10, **sizes, **dialect).check()
    # It is no preset. An engine changes its Config, so each has a copy.
    bench.config_of = lambda *_: replace(config)
    for engine, cfg.dtype in (("nocache", "float32"), ("torch", "auto"), ("onnx-int8", "auto")):
        [row] = bench.time_engine(cfg, "2/3", engine, [(cfg.src, cfg.new, 1)])
        print(json.dumps(dict(peer="mu") | row))


def main():
    commands = dict(t5=train_t5, ctranslate2=time_ctranslate2, mu=time_mu)
    if sys.argv[1:2] == [] or sys.argv[1] not in commands:
        print(__doc__)
        return
    commands[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    script(main)
