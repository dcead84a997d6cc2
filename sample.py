"""Talks to a trained model: a prompt in, text out as it is made.

    python sample.py --prompt="def area(width, height):\\n    return <mask>"     fills the holes
    python sample.py --run=out/dec-nano-pycode --prompt="import os" --temperature=0.8
    python sample.py --run=out/encdec-nano-pycode-int8 --prompt="..."      an export: without torch
    python sample.py --prompt="..." --show_attention=page.html     where it looked, for a browser
    python sample.py --prompt="..." --run=RUN --race=RUN2          two runs side by side

A run trained with span corruption reads <mask> as a hole and prints the text with its holes filled.
A causal or prefix run goes on where the prompt ends. A run of a task prints its answer. Without
--prompt, standard input is read. A run of vision.py takes pictures; the text's <image> is the place
of one, without it they stand in front:

    python sample.py --run=out/vision-encdec-nano-shapes --image=FILE --prompt="What is there?"
"""

import base64
import os
import sys
import time
from dataclasses import dataclass
from itertools import zip_longest
from types import SimpleNamespace

from data.objectives import MASK, fill_spans, make_prompt
from data.tokenizer import load_tokenizer
from lib.attention import draw
from lib.runs import newest_run, read_run
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
    num_samples: int = setting(1, "answers; one alone streams", low=1, high=1024)
    show_attention: str = setting(None, "where it looked: FILE.html, a page, or FILE.png")
    race: str = setting(None, "a second run, which answers beside the first")
    show_tokens: str = setting(None, "draw which patches of the first picture were read: FILE.png")
    seed: int = setting(1337, "of the draws")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = setting("auto", "of weights", ("auto", "float32", "bfloat16", "float16"))
    threads: int = setting(0, "CPU threads; 0 is torch's choice", high=4096)


def check(cfg):
    if cfg.num_samples > 1 and cfg.temperature == 0:
        raise UserError("--num_samples at --temperature=0 prints one answer often: use 0.8")
    if cfg.beams > 1 and cfg.temperature > 0:
        raise UserError("--beams searches and --temperature draws: use one of them")
    if cfg.show_attention and not cfg.show_attention.endswith((".html", ".png")):
        raise UserError(f"--show_attention={cfg.show_attention} must end in .html or .png")
    if cfg.race and (cfg.beams > 1 or cfg.show_attention):
        raise UserError("--race takes neither --beams nor --show_attention")
    if cfg.num_samples > 1 and (cfg.race or cfg.show_attention):
        raise UserError("--race and --show_attention take one answer: leave --num_samples out")


# ----------------------------------------------------------------------------------------------
# Answers


def text_of(talk, answer, done=True):
    """The text of an answer: where the prompt has holes, the prompt with these filled. Of one that
    is not done: as much as will stay."""
    tokenizer, first = talk.tokenizer, talk.tokenizer.first_sentinel
    ids = answer if talk.objective == "seq2seq" else talk.prompt + answer
    if any(i >= first for i in talk.prompt):
        pieces = fill_spans(talk.prompt, answer, tokenizer)
        filled = [0] + [place for place, (_, is_new) in enumerate(pieces, 1) if is_new]
        ids = [i for piece, _ in pieces[: None if done else filled[-1]] for i in piece]
    parts = [MASK.encode() if i >= first else tokenizer.bytes_of([i]) for i in ids]
    text = b"".join(parts).decode("utf-8", "replace").removeprefix(" " * tokenizer.leading_space)
    return printable(text if done else text.rstrip("\ufffd"))  # half a character may become whole


def show(text, shown):
    """Prints what a text has more than what was `shown`; all of it where that has changed."""
    print(text[len(shown) :] if text.startswith(shown) else "\n" + text, end="", flush=True)
    return text


def beam_search(model, prompt, beams, max_new_tokens):
    """The likeliest answer that `beams` hypotheses side by side find, as ids without its end. The
    score is log-probability over length^0.6: longer answers have more factors."""
    import torch

    eos = model.config.eos_id
    with torch.inference_mode():
        cache, states = model.prefill([prompt], max_new_tokens)
        scores, answers, finished = torch.zeros(1, device=states.device), [[]], []
        for step in range(max_new_tokens):
            logp = model.next_logits(states).float().log_softmax(-1) + scores[:, None]  # (beams, V)
            scores, best = logp.flatten().topk(min(2 * beams, logp.numel()))  # half may end here
            rows, ids = best // logp.size(1), best % logp.size(1)
            for score, row in zip(scores[ids == eos].tolist(), rows[ids == eos].tolist()):
                finished.append((score / (step + 1) ** 0.6, answers[row]))
            rows, ids, scores = (part[ids != eos][:beams] for part in (rows, ids, scores))
            enough = sorted(finished, reverse=True)[:beams]
            if len(enough) == beams and enough[-1][0] >= scores[0] / (step + 2) ** 0.6:
                break
            answers = [answers[row] + [id] for row, id in zip(rows.tolist(), ids.tolist())]
            if step < max_new_tokens - 1:
                cache.select(rows)
                states = model.decode(ids[:, None], cache=cache)
        else:  # what is still without an end
            finished += [(x / len(ids) ** 0.6, ids) for x, ids in zip(scores.tolist(), answers)]
    return max(finished, key=lambda pair: pair[0])[1]


# ----------------------------------------------------------------------------------------------
# Where an answer looked


def attention_weights(model, source, answer):
    """What each token of an answer looked at in its source, or decoder-only in its prompt: weights
    (layers, heads, len(answer), S); and the probabilities (len(answer), V) of what it could say.
    The kernel of attention is exchanged for one that keeps its weights."""
    import torch

    kept = []

    def kernel(q, k, v, mask, causal):
        k, v = (x.float().repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        scores = q.float() @ k.mT * q.size(-1) ** -0.5  # (1, H, T, S)
        seen = torch.ones_like(scores, dtype=torch.bool).tril() if causal else mask
        scores = scores if seen is None else scores.masked_fill(~seen, -torch.inf)
        kept.append(scores.softmax(-1)[0])
        return (kept[-1] @ v).to(q.dtype)

    decoder_only, device = model.config.n_enc == 0, model.embed.weight.device
    for block in model.dec:
        (block.attn if decoder_only else block.cross).kernel = kernel
    target = torch.tensor([[*source, *answer] if decoder_only else answer], device=device)
    prompt = torch.arange(target.size(1), device=device)[None] <= len(source)  # of a prefix LM
    src = prompt if decoder_only else torch.tensor([source], device=device)
    with torch.inference_mode():
        states = model.states(src, target)[0, -len(answer) :]
        probs = model.logits(states).float().softmax(-1).cpu().numpy()
    weights, first = torch.stack(kept).cpu().numpy(), int(model.config.bos_id >= 0)
    if decoder_only:  # what predicts a token stands one place before it
        weights = weights[:, :, len(source) - 1 + first :, first : first + len(source)]
    return weights, probs


# ----------------------------------------------------------------------------------------------
# Two runs side by side


def race(talks, n, drawing):
    """Streams the answers of two runs. Each has a clock that goes while it computes, and the one
    whose clock is behind goes on: the screen shows what two machines would."""
    going, rows, drawn = list(talks), 0, 0
    for talk in talks:
        list(talk.model.generate([talk.prompt], 2, **talk.sees))  # a first call takes longer
        talk.steps = talk.model.generate([talk.prompt], n, *drawing, **talk.sees)
        talk.clock, talk.times, talk.answer = 0, [], []
    while going:
        talk, begin = min(going, key=lambda talk: talk.clock), time.perf_counter()
        new = next(talk.steps, None)
        talk.clock += time.perf_counter() - begin
        if new is None:
            going.remove(talk)
        else:
            talk.times.append(talk.clock)
            talk.answer.append(new[0])
        if not going or (sys.stdout.isatty() and time.perf_counter() > drawn + 0.05):
            rows, drawn = draw_race(talks, rows, not going), time.perf_counter()


def draw_race(talks, rows, done):
    """Draws two columns over the `rows` lines drawn before; returns how many it drew. What is no
    terminal gets one answer after the other."""
    columns, on_screen = [], sys.stdout.isatty()
    width, height = os.get_terminal_size() if on_screen else (0, 0)
    width = (width - 3) // 2 if on_screen else 10**6
    for talk in talks:
        times = talk.times or [talk.clock]
        rate = (len(times) - 1) / max(times[-1] - times[0], 1e-9)
        pace = f"first token {1000 * times[0]:.0f} ms, {rate:.0f} tokens/s, {len(times)} tokens"
        parts = text_of(talk, talk.answer, done).split("\n")
        text = [x[i : i + width] for x in parts for i in range(0, max(1, len(x)), width)]
        columns.append([talk.run, pace, *(text if done else text[4 - height :])])
    lines = [f"{a[:width]:{width}} | {b[:width]}" for a, b in zip_longest(*columns, fillvalue="")]
    lines = lines if on_screen else [*columns[0], "", *columns[1]]
    print((f"\x1b[{rows}A\x1b[J" if rows else "") + "\n".join(lines), flush=True)
    return len(lines)


# ----------------------------------------------------------------------------------------------


def load_exported(cfg, run):
    if cfg.beams > 1 or cfg.show_attention:
        raise UserError(f"--beams and --show_attention work on run folders; {run} is an export")
    if cfg.dtype != "auto" or cfg.device not in ("auto", "cpu", "cuda"):
        raise UserError("--dtype, --device: an export has its own precision, and cpu or cuda")
    kind = Static if read_about(run).static else Exported
    return kind(run, cfg.threads, "cpu" if cfg.device == "auto" else cfg.device)


def load_torch(cfg, run):
    from lib.device import find_dtype, pack, start, tune
    from model import Transformer as kind

    if os.path.exists(os.path.join(run, "vision.json")):
        from vision import VisionLM as kind
    device = start(cfg).device
    model = tune(kind.load(run, device=device, dtype=find_dtype(cfg.dtype, device)).eval())
    return model if cfg.show_attention else pack(model)


def read_pictures(cfg, talk, text):
    """Ids of a text, with a placeholder for each token of a picture; what the model and the page
    are told of the pictures goes into talk."""
    from data.images import draw_tokens, open_image, prepare_image
    from data.picture_tasks import IMAGE, encode_sources

    paths, vision = (cfg.image.split(",") if cfg.image else []), talk.model.vision
    text = text if IMAGE in text else IMAGE * len(paths) + text
    if text.count(IMAGE) != len(paths):
        raise UserError(f"--prompt has {text.count(IMAGE)} {IMAGE}, --image {len(paths)} pictures")
    pictures = [prepare_image(open_image(path), vision) for path in paths]
    talk.sees["images"], orders = talk.model.see(pictures)
    talk.model.look_at(talk.sees["images"])  # generate does so itself, beams and attention do not
    for path, picture, order in zip(paths, pictures, orders):
        with open(path, "rb") as file:
            url = "data:;base64," + base64.b64encode(file.read()).decode()
        cut = dict(side=vision.side, joined=vision.joined, patch=vision.patch, at=picture.at)
        talk.page["pictures"].append(dict(cut, url=url, order=order.tolist()))
    if cfg.show_tokens and pictures:
        draw_tokens(pictures[0], orders[0], vision, cfg.show_tokens)
    return encode_sources([text], [map(len, orders)], talk.tokenizer)[0]


def open_run(cfg, run, text):
    """A run folder or an export, loaded and given a text: model, tokenizer, prompt and so on."""
    about = vars(read_about(run)) if is_export(run) else read_run(run)["settings"]
    model = load_exported(cfg, run) if is_export(run) else load_torch(cfg, run)
    tokenizer, objective = load_tokenizer(f"{run}/"), about["objective"]
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"{run}: its tokenizer has more words than its model")
    talk = SimpleNamespace(run=run, model=model, tokenizer=tokenizer, objective=objective, sees={})
    decoder_only, text = model.config.n_enc == 0, text.strip() if objective == "seq2seq" else text
    talk.page = dict(run=run, decoder_only=decoder_only, pictures=[])
    if hasattr(model, "see"):
        ids = read_pictures(cfg, talk, text)
        talk.prompt = ids + make_prompt(objective, "", tokenizer, decoder_only)
    elif cfg.image or cfg.show_tokens:
        raise UserError(f"--image: {run} is a run without pictures; vision.py trains those")
    else:
        talk.prompt = make_prompt(objective, text, tokenizer, decoder_only)
    return talk


def main():
    cfg = read_settings(Settings, __doc__)
    check(cfg)
    run, text = cfg.run or newest_run(), (cfg.prompt or "").replace("\\n", "\n")
    if cfg.prompt is None:
        if sys.stdin.isatty():
            print("type a prompt, end it with Ctrl-D", file=sys.stderr)
        text = sys.stdin.buffer.read().decode("utf-8", "replace")
    talks = [open_run(cfg, name, text) for name in (run, cfg.race) if name]
    talk, config = talks[0], talks[0].model.config
    static = isinstance(talk.model, Static)
    asked = 0 if config.n_enc else len(talk.prompt)
    # A static export cannot go past its slots.
    longest = talk.model.shapes["decoder"]["mask"][-1] if static else config.tgt_len
    n = cfg.max_new_tokens or min(1024, max(1 if static else 64, longest - asked))
    drawing = cfg.temperature, cfg.top_k, cfg.top_p, cfg.seed
    if cfg.show_attention and len(talk.prompt) > 8192:
        raise UserError(f"--show_attention: {len(talk.prompt)} tokens, at most 8192 can be drawn")
    if cfg.race:
        return race(talks, n, drawing)

    # Answers: ids without their end.
    answers, shown = [[] for _ in range(cfg.num_samples)], ""
    if cfg.beams > 1:
        answers = [beam_search(talk.model, talk.prompt, cfg.beams, n)]
    else:
        sees = {name: tokens.repeat(cfg.num_samples, 1) for name, tokens in talk.sees.items()}
        for new in talk.model.generate([talk.prompt] * cfg.num_samples, n, *drawing, **sees):
            for answer, id in zip(answers, new):
                answer += [] if id is None else [id]
            if len(answers) == 1:
                shown = show(text_of(talk, answers[0], done=False), shown)
    for answer in answers:
        show(text_of(talk, answer) + "\n" + ("-" * 80 + "\n") * (len(answers) > 1), shown)
    if cfg.show_attention:
        answer = answers[0] + [talk.tokenizer.eos] * (len(answers[0]) < n)  # unless it was cut
        looked = attention_weights(talk.model, talk.prompt, answer)
        draw(cfg.show_attention, *looked, talk.prompt, answer, talk.tokenizer, **talk.page)


if __name__ == "__main__":
    script(main)
