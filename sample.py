"""Talks to a trained model: a prompt in, text out as it is made.

    python sample.py --prompt="def area(width, height):\\n    return <mask>"   fills the holes (span-trained runs)
    python sample.py --run=out/dec-nano-pycode --prompt="import os" --temperature=0.8 --num_samples=3
    cat file.py | python sample.py                                           the newest run, prompt from standard input
    python sample.py --run=out/vision-encdec-nano-shapes --image=FILE --prompt="What is there?"      asks about a picture
    python sample.py --run=out/encdec-nano-pycode-int8 --prompt="..."        an export: then torch is not needed

A span-trained model reads <mask> as a hole and prints the whole text with the holes filled (a prompt without <mask> gets
one at its end); a causal or prefix one goes on where the prompt ends; one trained on a task prints its answer. A run of vision.py reads
<image> as the place of a picture; without one, the pictures stand in front.
"""
import codecs
import os
import sys
from dataclasses import dataclass

from lib.settings import UserError, parse, script, setting
from lib.runtime import Exported, Static, is_export, read_about
from data.objectives import fill_spans
from data.pairs import IMAGE, encode_sources
from lib.runs import newest_run, read_record
from data.tokenizer import N_SENTINELS, load_tokenizer

MASK = "<mask>"


@dataclass
class Settings:
    run: str = setting(None, "run folder, or a folder that export.py wrote; default: the newest run in out/")
    prompt: str = setting(None, "the text to start from; default: standard input. \\n is a line break")
    image: str = setting(None, "picture files, separated by commas, for runs of vision.py")
    max_new_tokens: int = setting(None, "longest answer, in tokens; default: what the model was trained for", type=int)
    temperature: float = setting(0.0, "0 takes the likeliest token; higher is more varied")
    top_k: int = setting(0, "draw from the k likeliest tokens; 0 is all")
    top_p: float = setting(1.0, "draw from the fewest tokens that hold this probability together")
    beams: int = setting(1, "beam search with so many beams, instead of drawing")
    num_samples: int = setting(1, "answers to the prompt; the first streams, more are printed when done")
    show_attention: str = setting(None, "draw what the answer looked at in its source into this picture: FILE.png")
    attention_layer: int = setting(None, "decoder layer for that, from 0; default: the mean over all of them (and over their heads)", type=int)
    show_tokens: str = setting(None, "draw which patches of the first picture were read into this file: FILE.png")
    seed: int = setting(1337, "of the draws")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = setting("auto", "of weights and states; auto: bfloat16 where the device has it", ("auto", "float32", "bfloat16"))
    threads: int = setting(0, "CPU threads; 0 is torch's own choice")


def encode_prompt(text, tokenizer, objective, decoder_only, n_tokens=None):
    """Prompt ids: of the encoder's source or, decoder-only, of the beginning of the sequence. n_tokens: how many the pictures are, for
    a run that sees some."""
    if n_tokens is not None:
        ids = encode_sources([text], tokenizer, [n_tokens])[0]
    elif objective in ("span", "ul2") and (objective == "span" or MASK in text):
        parts = (text if MASK in text else text + MASK).split(MASK)
        if len(parts) - 1 > N_SENTINELS:
            raise UserError(f"--prompt has {len(parts) - 1} {MASK}, at most {N_SENTINELS} can be told apart")
        ids = tokenizer.encode(parts[0])
        for hole, part in enumerate(parts[1:]):
            ids += [tokenizer.sentinel(hole), *tokenizer.encode(part)]
        ids.append(tokenizer.eos)
    else:
        ids = tokenizer.encode(text)
    if not ids:
        raise UserError("the prompt is empty")
    if objective == "seq2seq":
        ids.append(tokenizer.eos)
    return ids + [tokenizer.sep] * (decoder_only and objective != "causal")


class Printer:
    """Streams an answer, behind its prompt unless that is a source of its own (`alone`). Where the prompt has holes, the text
    between them is printed as each hole is reached."""

    def __init__(self, prompt, tokenizer, holes, alone=False):
        self.tokenizer, self.decoder = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")
        self.source = [i for i in prompt if i < tokenizer.n_text or i >= tokenizer.first_sentinel] if holes else []
        self.holes = holes
        if not holes and not alone:
            self.write([i for i in prompt if i < tokenizer.n_text])

    def write(self, ids):
        print(self.decoder.decode(self.tokenizer.bytes_of(ids)), end="", flush=True)

    def advance(self, stop):
        """Prints the source up to the hole `stop` (or its end), leaving holes that were skipped as they are."""
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
        self.advance(None)
        print(self.decoder.decode(b"", final=True))


def beam_search(model, prompt, beams, max_new_tokens, images=None):
    """The likeliest answer that `beams` hypotheses side by side find; score: log-probability over length to the power
    0.6, so that longer answers are not penalised for having more factors. Returns ids, without end-of-sequence."""
    import torch
    eos = model.config.eos_id
    with torch.inference_mode():
        cache, states = model.prefill([prompt], max_new_tokens, images=images)
        scores, answers, finished = torch.zeros(1, device=states.device), [[]], []
        for step in range(max_new_tokens):
            logp = model.next_logits(states).float().log_softmax(-1) + scores[:, None]  # (beams, V)
            best = logp.flatten().topk(min(2 * beams, logp.numel()))  # twice: half of them may end here
            kept = []
            for score, index in zip(best.values.tolist(), best.indices.tolist()):
                row, id = divmod(index, logp.size(1))
                if id == eos:
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
                states = model.decode(torch.tensor([[id] for _, _, id in kept], device=states.device), cache=cache)
        else:  # what is still without an end
            finished += [(score / len(answer) ** 0.6, answer) for score, answer in zip(scores.tolist(), answers) if answer]
    return max(finished, key=lambda pair: pair[0])[1]


def cross_attention(model, source, answer, images=None):
    """What each token of an answer looked at in its source: (layers, heads, len(answer), len(source)), rows summing to 1.
    Row t is the step that chose answer[t]. Worked out again from what goes into each cross-attention."""
    import torch
    from model import rotate
    maps, hooks = [], []

    def note(attention, inputs, kwargs, output):
        x, keys, values = inputs
        q = attention.q_norm(attention.wq(x).unflatten(-1, (attention.n_head, attention.head_dim))).transpose(1, 2)
        q = q if kwargs["rope"] is None else rotate(q, kwargs["rope"])
        keys = keys.repeat_interleave(attention.n_head // attention.n_kv_head, dim=1)
        maps.append((q.float() @ keys.float().mT * attention.head_dim ** -0.5).softmax(-1)[0])
    for block in model.dec:
        hooks.append(block.cross.register_forward_hook(note, with_kwargs=True))
    device = model.embed.weight.device
    with torch.inference_mode():
        source = torch.tensor([source], device=device)
        encoded, sees = model.encode(source, images=images), model.decoder_sees(images, source, None)
        model.decode(torch.tensor([[model.config.bos_id, *answer[:-1]]], device=device), encoded, **sees)
    for hook in hooks:
        hook.remove()
    return torch.stack(maps)


def draw_attention(weights, source, answer, tokenizer, path):
    """weights (len(answer), len(source)) as a picture."""
    import matplotlib
    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a dollar sign is a dollar sign
    import matplotlib.pyplot as plt
    labels = [[(tokenizer.name_of(i) or tokenizer.decode([i])).replace("\n", "\\n").replace("\t", "\\t") for i in ids] for ids in (source, answer)]
    figure, axes = plt.subplots(figsize=(2 + 0.16 * len(source), 1.5 + 0.16 * len(answer)))
    axes.imshow(weights, cmap="Greys", aspect="auto", vmin=0)
    axes.set_xticks(range(len(source)), labels[0], rotation=90, fontsize=7, family="monospace")
    axes.set_yticks(range(len(answer)), labels[1], fontsize=7, family="monospace")
    axes.set(xlabel="source", ylabel="answer")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def open_pictures(paths, text, vision, run):
    """--image -> (Pictures, how many tokens each is, the prompt with as many IMAGE)."""
    if vision is None:
        raise UserError(f"--image: {run} is a run without pictures; vision.py trains one with")
    from data.images import n_tokens, open_image, prepare_image
    paths = ([paths] if os.path.exists(paths) else [path.strip() for path in paths.split(",")]) if paths else []
    images = [open_image(path) for path in paths]
    text = text if IMAGE in text else IMAGE * len(images) + text
    if text.count(IMAGE) != len(images):
        raise UserError(f"--prompt has {text.count(IMAGE)} {IMAGE} and --image names {len(images)} pictures: they must be as many")
    return [prepare_image(image, vision) for image in images], [n_tokens(*image.size, vision) for image in images], text


def vision_of(run, exported):
    """How the run sees pictures, None if it does not. Without pictures, Pillow is not needed, so data.images is imported where there are some."""
    if exported:
        about = read_about(run).get("vision")
        if about is None:
            return None
        from data.images import VisionConfig
        return VisionConfig(**about).check()
    if not os.path.exists(os.path.join(run, "vision.json")):
        return None
    from data.images import read_vision
    return read_vision(run)


def load_exported(cfg, run):
    if cfg.beams > 1 or cfg.show_attention:
        raise UserError(f"{'--beams' if cfg.beams > 1 else '--show_attention'} works on run folders; {run} is an export")
    if cfg.dtype != "auto":
        raise UserError(f"--dtype={cfg.dtype}: an export has the precision it was written with; python export.py --precision=... writes another")
    kind = Static if "static" in read_about(run) else Exported
    return kind(run, cfg.threads, "cpu" if cfg.device == "auto" else cfg.device)


def load_torch(cfg, run):
    import torch
    from model import Transformer, has_bf16
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    device = cfg.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device={cfg.device} cannot be used here; use --device=cpu or auto") from None
    dtype = {"auto": torch.bfloat16 if has_bf16(torch.device(device)) else torch.float32}.get(cfg.dtype) or getattr(torch, cfg.dtype)
    if os.path.exists(os.path.join(run, "vision.json")):
        from vision import load_model
    else:
        load_model = Transformer.load
    model = load_model(run, device=device, dtype=dtype).eval()
    if cfg.show_attention and (not model.config.n_enc or not 0 <= (cfg.attention_layer or 0) < model.config.n_dec):
        raise UserError(f"--show_attention: {run} is decoder-only and has no source apart" if not model.config.n_enc else
                        f"--attention_layer={cfg.attention_layer}: {run} has the decoder layers 0 to {model.config.n_dec - 1}")
    return model.pack()


def main():
    cfg = parse(Settings, __doc__)
    if cfg.seed < 0:
        raise UserError(f"--seed={cfg.seed} must not be negative")
    for name in ("max_new_tokens", "beams", "num_samples"):
        if getattr(cfg, name) is not None and getattr(cfg, name) < 1:
            raise UserError(f"--{name}={getattr(cfg, name)} must be at least 1")
    if not (cfg.temperature == 0 or 0.01 <= cfg.temperature < 100) or cfg.top_k < 0 or not 0 < cfg.top_p <= 1:
        raise UserError("--temperature is 0 or lies from 0.01 to 100, --top_k must not be negative, --top_p lies above 0 and at most at 1")
    if cfg.num_samples > 1 and cfg.temperature == 0:
        raise UserError(f"--num_samples={cfg.num_samples} at --temperature=0 would print one answer so many times: use --temperature=0.8")
    if cfg.beams > 1 and cfg.temperature > 0:
        raise UserError("--beams searches for the likeliest answer and --temperature draws: use one of them")
    if cfg.show_attention and not cfg.show_attention.endswith((".png", ".pdf", ".svg")):
        raise UserError(f"--show_attention={cfg.show_attention} must end in .png, .pdf or .svg")
    run = cfg.run or newest_run()
    exported = is_export(run)
    objective = read_about(run)["objective"] if exported else read_record(run)["settings"]["objective"]
    tokenizer = load_tokenizer(run)
    if cfg.prompt is None and sys.stdin.isatty():
        print(f"{run} ({objective}); type a prompt" + (f" with {MASK} for holes" if objective == "span" else "") +
              ", end it with Ctrl-D", file=sys.stderr)
    text = sys.stdin.buffer.read().decode("utf-8", "replace") if cfg.prompt is None else cfg.prompt.replace("\\n", "\n")
    text = text.strip() if objective == "seq2seq" else text
    vision, pictures, counts = vision_of(run, exported), [], None
    if cfg.image or vision:
        pictures, counts, text = open_pictures(cfg.image, text, vision, run)
    if cfg.show_tokens and not pictures:
        raise UserError("--show_tokens draws on a picture: give one with --image")

    model = load_exported(cfg, run) if exported else load_torch(cfg, run)
    prompt = encode_prompt(text, tokenizer, objective, model.config.n_enc == 0, counts)
    sees = {}  # what the model is given beside the prompt
    if pictures:
        images, orders = model.see(pictures)
        sees["images"] = images[[*range(len(images))] * cfg.num_samples]
    if cfg.show_tokens:
        from data.images import draw_tokens
        draw_tokens(pictures[0], orders[0], vision, cfg.show_tokens)
    if cfg.max_new_tokens is None:
        static = exported and model.about.get("static")
        room = static["tgt_len"] if static else model.config.tgt_len
        cfg.max_new_tokens = min(1024, room if model.config.n_enc else max(1 if static else 64, room - len(prompt)))
    holes = any(i >= tokenizer.first_sentinel for i in prompt)

    if cfg.beams > 1:
        answers = [beam_search(model, prompt, cfg.beams, cfg.max_new_tokens, **sees)]
    elif cfg.num_samples > 1:
        steps = list(model.generate([prompt] * cfg.num_samples, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, cfg.seed, **sees))
        answers = [[step[b] for step in steps if step[b] is not None] for b in range(cfg.num_samples)]
    else:
        answers, printer = [[]], Printer(prompt, tokenizer, holes, objective == "seq2seq")
        for step in model.generate([prompt], cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, cfg.seed, **sees):
            printer.add(step[0])
            answers[0].append(step[0])
        printer.finish()
    for number, answer in enumerate(answers if cfg.beams > 1 or cfg.num_samples > 1 else []):
        if number:
            print("-" * 80)
        pieces = fill_spans(prompt, answer, tokenizer) if holes else [(answer if objective == "seq2seq" else prompt + answer, True)]
        print(tokenizer.decode([i for ids, _ in pieces for i in ids]))
    if cfg.show_attention:
        answer = answers[0] + [tokenizer.eos]
        weights = cross_attention(model, prompt, answer, **sees).mean(1)  # (layers, answer, source)
        weights = weights.mean(0) if cfg.attention_layer is None else weights[cfg.attention_layer]
        draw_attention(weights.cpu().numpy(), prompt, answer, tokenizer, cfg.show_attention)


if __name__ == "__main__":
    script(main)
