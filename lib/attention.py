"""What an answer looked at, for people: a picture, or a page for a browser. Needs no torch."""

import base64
import json
import os

from lib.runs import ROOT, replacing
from lib.settings import printable


def draw(path, weights, probs, source, answer, tokenizer, **more):
    """Writes FILE.png, the mean of all heads, or FILE.html, lib/attention.html with these data in
    it. weights (layers, heads, T, S) of the ids `source` (S) and `answer` (T); probs (T, V): of
    what could have been said; more: what else the page is told, see its script."""

    def label(i):  # its text, and whether it is a special token
        name = tokenizer.name_of(i)
        return printable(name or tokenizer.bytes_of([i]).decode("utf-8", "replace")), bool(name)

    data = more | dict(source=[label(i) for i in source], answer=[label(i) for i in answer])
    if path.endswith(".png"):
        return draw_picture(path, weights.mean((0, 1)), data["source"], data["answer"])
    best = (-probs).argsort(1)[:, :6].tolist()
    data["likely"] = [[[label(i)[0], float(p[i])] for i in ids] for ids, p in zip(best, probs)]
    data["probs"] = [float(p[i]) for i, p in zip(answer, probs)]
    for axis in (1, 0):  # heads, then layers, become their mean where a page would be too large
        if weights.size > 2**25:
            weights = weights.mean(axis, keepdims=True)
    packed = (weights**0.5 * 255 + 0.5).astype("uint8")  # the root: small weights keep a digit
    data |= dict(shape=weights.shape, weights=base64.b64encode(packed.tobytes()).decode())
    with open(os.path.join(ROOT, "lib", "attention.html"), encoding="utf-8") as file:
        page = file.read().replace("{{data}}", json.dumps(data).replace("<", "\\u003c"))
    with replacing(path) as new, open(new, "w", encoding="utf-8") as file:
        file.write(page)


def draw_picture(path, weights, source, answer):
    """weights (T, S) of labelled tokens, as FILE.png."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # a dollar sign is a dollar sign
    figure = Figure([min(100, 2 + 0.16 * len(texts)) for texts in (source, answer)])
    axes, style = figure.subplots(), dict(fontsize=7, family="monospace")
    axes.imshow(weights, cmap="Greys", aspect="auto", vmin=0)
    axes.set_xticks(range(len(source)), [repr(x)[1:-1] for x, _ in source], rotation=90, **style)
    axes.set_yticks(range(len(answer)), [repr(x)[1:-1] for x, _ in answer], **style)
    with replacing(path) as new:
        figure.savefig(new, dpi=120, bbox_inches="tight", format="png")
