"""Talks to a trained model: a prompt in, text out as it is made.

    python sample.py --prompt="def area(width, height):\\n    return <mask>"     fills the holes
    python sample.py --run=out/dec-nano-pycode --prompt="import os" --temperature=0.8
    python sample.py --run=out/encdec-nano-pycode-int8 --prompt="..."      an export: without torch

A run trained with span corruption reads <mask> as a hole and prints the text with its holes filled.
A causal or prefix run goes on where the prompt ends. A run of a task prints its answer. Without
--prompt, standard input is read. A run of vision.py takes pictures:

    python sample.py --run=out/vision-encdec-nano-shapes --image=FILE --prompt="What is there?"
"""

import codecs
import os
import sys
from dataclasses import dataclass

from data.objectives import MASK, fill_spans, make_prompt
from data.tokenizer import load_tokenizer
from lib.runs import newest_run, read_run, replacing
from lib.runtime import Exported, Static, is_export, read_about
from lib.settings import UserError, printable, read_settings, script, setting


@dataclass
class Settings:
    run: str = setting(None, "run folder, or one that export.py wrote [the newest run in out/]")
    prompt: str = setting(None, "the text to start from; \\n is a line break [standard input]")
    image: str = setting(None, "picture files, separated by commas, for runs of vision.py")
    max_new_tokens: int = setting(None, "longest answer", low=1, high=2**20)
    temperature: float = setting(0.0, "0 takes the likeliest token", high=100)
    top_k: int = setting(0, "draw from the k likeliest tokens; 0 is all")
    top_p: float = setting(1.0, "draw from the fewest that hold this probability", low=1e-6, high=1)
    beams: int = setting(1, "beam search with so many beams, instead of drawing", low=1, high=256)
    num_samples: int = setting(1, "answers; the first streams", low=1, high=1024)
    show_attention: str = setting(None, "draw what the answer looked at: FILE.png")
    show_tokens: str = setting(None, "draw which patches of the first picture were read: FILE.png")
    seed: int = setting(1337, "of the draws")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = setting("auto", "of weights and states", ("auto", "float32", "bfloat16"))
    threads: int = setting(0, "CPU threads; 0 is torch's choice", high=4096)


def check(cfg):
    if 0 < cfg.temperature < 0.01:
        raise UserError(f"--temperature={cfg.temperature} is 0 or at least 0.01")
    if cfg.num_samples > 1 and cfg.temperature == 0:
        raise UserError("--num_samples at --temperature=0 prints one answer often: use 0.8")
    if cfg.beams > 1 and cfg.temperature > 0:
        raise UserError("--beams searches and --temperature draws: use one of them")
    if cfg.show_attention and not cfg.show_attention.endswith((".png", ".pdf", ".svg")):
        raise UserError(f"--show_attention={cfg.show_attention} must end in .png, .pdf or .svg")


class Printer:
    """Streams an answer. Where the prompt has holes, the text between them is printed as each hole
    is reached."""

    def __init__(self, prompt, tokenizer):
        self.tokenizer, self.decoder = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")
        n_text, first = tokenizer.n_text, tokenizer.first_sentinel
        self.source = [i for i in prompt if i < n_text or i >= first]
        self.holes = any(i >= first for i in prompt)

    def write(self, ids, final=False):
        text = self.decoder.decode(self.tokenizer.bytes_of(ids), final)
        print(printable(text), end="", flush=True)

    def advance(self, stop):
        """Prints the source up to the hole `stop`, leaving holes that were skipped as they are."""
        while self.source and self.source[0] != stop:
            i = self.source.pop(0)
            self.write([i]) if i < self.tokenizer.n_text else print(MASK, end="", flush=True)
        self.source = self.source[1:]

    def add(self, id):
        if id < self.tokenizer.n_text:
            self.write([id])
        elif self.holes and id in self.source:
            self.advance(id)

    def finish(self):
        if self.holes:
            self.advance(None)
        self.write([], final=True)
        print()


def beam_search(model, prompt, beams, max_new_tokens):
    """The likeliest answer that `beams` hypotheses side by side find, as ids without its end. The
    score is log-probability over length^0.6: longer answers have more factors."""
    import torch

    with torch.inference_mode():
        cache, states = model.prefill([prompt], max_new_tokens)
        scores, answers, finished = torch.zeros(1, device=states.device), [[]], []
        for step in range(max_new_tokens):
            logp = model.next_logits(states).float().log_softmax(-1) + scores[:, None]  # (beams, V)
            best = logp.flatten().topk(min(2 * beams, logp.numel()))  # twice: half may end here
            kept = []
            for score, index in zip(best.values.tolist(), best.indices.tolist()):
                row, id = divmod(index, logp.size(1))
                if id == model.config.eos_id:
                    finished.append((score / (len(answers[row]) + 1) ** 0.6, answers[row]))
                elif len(kept) < beams:
                    kept.append((score, row, id))
            enough = sorted(finished, reverse=True)[:beams]
            if len(enough) == beams and enough[-1][0] >= kept[0][0] / (step + 2) ** 0.6:
                break
            answers = [answers[row] + [id] for _, row, id in kept]
            scores = torch.tensor([score for score, _, _ in kept], device=states.device)
            if step < max_new_tokens - 1:
                cache.select(torch.tensor([row for _, row, _ in kept], device=states.device))
                tokens = torch.tensor([[id] for _, _, id in kept], device=states.device)
                states = model.decode(tokens, cache=cache)
        else:  # what is still without an end
            ends = zip(scores.tolist(), answers)
            finished += [(score / len(answer) ** 0.6, answer) for score, answer in ends]
    return max(finished, key=lambda pair: pair[0])[1]


def attention_weights(model, source, answer):
    """What each token of an answer looked at in its source, or decoder-only in its prompt and the
    answer so far: (len(answer), S), a mean over layers and heads, rows summing to 1. The kernel of
    attention is exchanged for one that keeps its weights."""
    import torch

    kept = []

    def kernel(q, k, v, mask, causal):
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        scores = q.float() @ k.float().mT * q.size(-1) ** -0.5  # (B, H, T, S)
        if causal:
            past = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
            scores = scores.masked_fill(~past, -torch.inf)
        weights = scores.softmax(-1)
        kept.append(weights[0].mean(0))
        return (weights @ v.float()).to(q.dtype)

    device, decoder_only = model.embed.weight.device, model.config.n_enc == 0
    for block in model.dec:
        (block.attn if decoder_only else block.cross).kernel = kernel
    with torch.inference_mode():
        target = torch.tensor([[*source, *answer] if decoder_only else answer], device=device)
        model.states(None if decoder_only else torch.tensor([source], device=device), target)
    weights = torch.stack(kept).mean(0).cpu().numpy()
    return weights[len(source) :, 1 : 1 + len(source)] if decoder_only else weights


def draw_attention(weights, source, answer, tokenizer, path):
    """weights (len(answer), len(source)) as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a dollar sign is a dollar sign
    import matplotlib.pyplot as plt

    def label(i):
        return printable(tokenizer.name_of(i) or tokenizer.decode([i])).replace("\n", "\\n")

    size = 2 + 0.16 * len(source), 1.5 + 0.16 * len(answer)
    figure, axes = plt.subplots(figsize=[min(side, 100) for side in size])
    axes.imshow(weights, cmap="Greys", aspect="auto", vmin=0)
    style = dict(fontsize=7, family="monospace")
    axes.set_xticks(range(len(source)), [label(i) for i in source], rotation=90, **style)
    axes.set_yticks(range(len(answer)), [label(i) for i in answer], **style)
    axes.set(xlabel="source", ylabel="answer")
    with replacing(path) as new:
        figure.savefig(new, dpi=120, bbox_inches="tight")
    plt.close(figure)


def load_exported(cfg, run):
    if cfg.beams > 1 or cfg.show_attention:
        raise UserError(f"--beams and --show_attention work on run folders; {run} is an export")
    if cfg.dtype != "auto":
        raise UserError(f"--dtype={cfg.dtype}: an export has the precision it was written with")
    kind = Static if "static" in read_about(run) else Exported
    return kind(run, cfg.threads, "cpu" if cfg.device == "auto" else cfg.device)


def load_torch(cfg, run):
    from lib.device import find_dtype, pack, start, tune
    from model import Transformer

    world = start(cfg)
    kind = Transformer
    if os.path.exists(os.path.join(run, "vision.json")):
        from vision import VisionLM as kind
    dtype = find_dtype(cfg.dtype, world.device)
    model = tune(kind.load(run, device=world.device, dtype=dtype).eval())
    return model if cfg.show_attention else pack(model)


def main():
    cfg = read_settings(Settings, __doc__)
    check(cfg)
    run = cfg.run or newest_run()
    exported = is_export(run)
    about = read_about(run) if exported else read_run(run)["settings"]
    tokenizer, objective = load_tokenizer(run), about["objective"]
    if cfg.prompt is None and sys.stdin.isatty():
        print(f"{run} ({objective}); type a prompt, end it with Ctrl-D", file=sys.stderr)
    if cfg.prompt is None:
        text = sys.stdin.buffer.read().decode("utf-8", "replace")
    else:
        text = cfg.prompt.replace("\\n", "\n")
    text = text.strip() if objective == "seq2seq" else text

    model = load_exported(cfg, run) if exported else load_torch(cfg, run)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"{run}: its tokenizer has more words than its model")
    prompt = make_prompt(objective, text, tokenizer, model.config.n_enc == 0)
    room = model.config.tgt_len if model.config.n_enc else model.config.tgt_len - len(prompt)
    n = cfg.max_new_tokens or min(1024, max(64, room))
    drawing = cfg.temperature, cfg.top_k, cfg.top_p, cfg.seed

    # Answers: ids without their end.
    if cfg.beams > 1:
        answers = [beam_search(model, prompt, cfg.beams, n)]
    elif cfg.num_samples > 1:
        steps = list(model.generate([prompt] * cfg.num_samples, n, *drawing))
        rows = range(cfg.num_samples)
        answers = [[new[b] for new in steps if new[b] is not None] for b in rows]
    else:
        answers, printer = [[]], Printer(prompt, tokenizer)
        if objective in ("causal", "prefix"):
            printer.write([i for i in prompt if i < tokenizer.n_text])
        for new in model.generate([prompt], n, *drawing):
            printer.add(new[0])
            answers[0].append(new[0])
        printer.finish()

    several = cfg.beams > 1 or cfg.num_samples > 1
    for answer in answers if several else []:
        ids = answer if objective == "seq2seq" else prompt + answer
        if any(i >= tokenizer.first_sentinel for i in prompt):
            ids = [i for piece, _ in fill_spans(prompt, answer, tokenizer) for i in piece]
        print(printable(tokenizer.decode(ids)) + ("\n" + "-" * 80 if len(answers) > 1 else ""))
    if cfg.show_attention:
        answer = answers[0] + [tokenizer.eos]
        weights = attention_weights(model, prompt, answer)
        draw_attention(weights, prompt, answer, tokenizer, cfg.show_attention)


if __name__ == "__main__":
    script(main)
