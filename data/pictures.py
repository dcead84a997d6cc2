"""Pictures that are drawn on the spot, with questions whose answers are known. Needs no torch.

    shapes    one or two groups of shapes -> what they are: "three red circles at the top left"
    docs      lines of made-up words in many fonts, noisy and turned -> the text
    charts    a bar chart and a question -> a value, the largest bar, a difference, a colour, the
              title. An answer counts the bars off until it has found those asked for: "Oslo,
              Lima = 8". What stands after the last "=" is scored.
    tables    the same charts -> all that they show. Train on these first: from single answers
              alone, reading is not learnt in minutes.

All about a picture follows from (kind, split, number). What it says decides by a hash to which
split it belongs, and it is drawn again until it belongs to the right one: no caption, text or title
that is held out stands in training. Single words do.
"""

import functools
import hashlib
import os
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SPLITS = ("train", "val", "test")
# Pictures of train, val and test.
SIZES = dict(shapes=(200_000, 1000, 1000), docs=(30_000, 500, 500), charts=(12_000, 250, 250))
QUESTIONS = 8  # of a chart


def split_of(text):
    """A tenth of all texts are held out, half of those for test."""
    part = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 20
    return SPLITS[(part < 2) + (part < 1)]


def drawn_from(kind, split, number):
    """(rng, plan) of a picture; the plan's first part is what the picture says."""
    for attempt in range(10000):
        rng = random.Random(f"{kind} {split} {number} {attempt}")
        plan = PLANS[kind](rng)
        if split_of(plan[0]) == split:
            return rng, plan
    raise AssertionError(f"{kind}: nothing falls into {split}")


# ----------------------------------------------------------------------------------------------
# shapes

COLOURS = dict(red=(220, 40, 40), blue=(40, 80, 220), green=(30, 150, 60))
COLOURS |= dict(yellow=(235, 200, 30), purple=(140, 50, 170), black=(25, 25, 25))
SHAPES = ("circle", "square", "triangle", "star")
COUNTS = ("one", "two", "three", "four")
PLACES = ("at the top left", "at the top", "at the top right", "at the left", "in the middle")
PLACES += ("at the right", "at the bottom left", "at the bottom", "at the bottom right")


def plan_shapes(rng):
    """(caption, groups of (count, colour, shape, place))"""
    groups, words = [], []
    for place in sorted(rng.sample(range(9), rng.randint(1, 2))):
        n, colour, shape = rng.randint(1, 4), rng.choice(list(COLOURS)), rng.choice(SHAPES)
        groups.append((n, colour, shape, place))
        words.append(f"{COUNTS[n - 1]} {colour} {shape}{'s' * (n > 1)} {PLACES[place]}")
    return ", ".join(words), groups


def draw_shapes(rng, groups, size=96):
    """A picture of size x size; each group stands in one of nine fields."""
    ground = np.array([rng.randint(200, 255) for _ in range(3)])
    image = Image.fromarray(noisy(rng, np.tile(ground, (size, size, 1)), 6))
    # Drawn large and shrunk: smooth edges.
    large = image.resize((4 * size, 4 * size), Image.Resampling.NEAREST)
    draw, field = ImageDraw.Draw(large), 4 * size / 3
    for n, colour, shape, place in groups:
        rgb = tuple(max(0, min(255, c + rng.randint(-20, 20))) for c in COLOURS[colour])
        for quarter in rng.sample(range(4), n):
            r = field * rng.uniform(0.17, 0.24)
            x, y = ((at + 0.5) / 2 for at in (quarter % 2, quarter // 2))
            x, y = (field * at + rng.uniform(-1, 1) * (field / 4 - r) for at in (x, y))
            x, y = x + place % 3 * field, y + place // 3 * field
            draw_shape(draw, shape, (x, y), r, rgb)
    return large.resize((size, size), Image.Resampling.BOX)


def draw_shape(draw, shape, middle, r, rgb):
    x, y = middle
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=rgb)
        return
    corners = dict(square=4, triangle=3, star=10)[shape]
    turns = np.arange(corners) * 2 * np.pi / corners - np.pi / (4 if shape == "square" else 2)
    reach = np.where((shape == "star") & (np.arange(corners) % 2 == 1), 0.45 * r, r)
    reach = reach * 1.2 if shape == "square" else reach
    draw.polygon(list(zip(x + reach * np.cos(turns), y + reach * np.sin(turns))), fill=rgb)


def noisy(rng, pixels, size):
    """Pixels (H, W, 3) with grey noise of a standard deviation, as bytes."""
    noise = np.random.default_rng(rng.randrange(2**32)).normal(0, size, pixels.shape[:2])
    return np.clip(pixels + noise[:, :, None], 0, 255).astype(np.uint8)


# ----------------------------------------------------------------------------------------------
# docs

# Fonts that matplotlib brings along.
FONTS = [f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "Mono", "Mono-Bold")]
FONTS += [f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic")]
FONTS += ["STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10"]


@functools.lru_cache(maxsize=512)
def font_of(name, size):
    import matplotlib

    folder = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    return ImageFont.truetype(os.path.join(folder, f"{name}.ttf"), size)


def made_up_word(rng):
    if rng.random() < 0.15:
        return str(rng.randint(0, 9999))
    letters = ("bcdfghklmnprstvwz", "aeiou", ("", "", "n", "r", "s", "t"))
    word = "".join(rng.choice(some) for _ in range(rng.randint(1, 3)) for some in letters)
    return word.capitalize() if rng.random() < 0.2 else word


def plan_docs(rng):
    """(text, its lines, (font, its size, width of the text), size of the picture)"""
    lines = []
    for _ in range(rng.randint(1, 2)):
        lines.append(" ".join(made_up_word(rng) for _ in range(rng.randint(2, 4))))
    points, name = rng.randint(12, 18), rng.choice(FONTS)
    wide = int(max(font_of(name, points).getbbox(line)[2] for line in lines))
    height = round(1.4 * points) * len(lines) + rng.randint(6, 16)
    return " ".join(lines), lines, (name, points, wide), (wide + rng.randint(6, 24), height)


def draw_docs(rng, lines, style, size):
    (name, points, wide), paper, ink = style, rng.randint(190, 255), rng.randint(0, 90)
    image = Image.new("L", size, paper)
    left, top = rng.randint(2, size[0] - wide - 2), rng.randint(1, 5)
    for k, line in enumerate(lines):
        at = left, top + k * round(1.4 * points)
        ImageDraw.Draw(image).text(at, line, fill=ink, font=font_of(name, points))
    image = image.rotate(rng.uniform(-1.5, 1.5), Image.Resampling.BICUBIC, fillcolor=paper)
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7)))
    tint = np.array([rng.uniform(0.92, 1) for _ in range(3)])
    return Image.fromarray(noisy(rng, np.asarray(image)[:, :, None] * tint, rng.uniform(0, 12)))


# ----------------------------------------------------------------------------------------------
# charts

WHAT = "Sales Rain Visitors Exports Trees Votes Births Goals Books Cars Flights Ships".split()
BY = "city month team farm school river port street year region shop age".split()
LABELS = "Oslo Rome Lima Cork Kyiv Pisa Jan Apr May Sep North West Ants Cats Dogs Elks".split()
BARS = dict(red="#d62728", blue="#1f77b4", green="#2ca02c", orange="#ff7f0e")
BARS |= dict(purple="#9467bd", brown="#8c564b", pink="#e377c2", grey="#7f7f7f")


def plan_charts(rng):
    """(title, labels, values, colours)"""
    n = rng.randint(3, 4)
    title, labels = f"{rng.choice(WHAT)} by {rng.choice(BY)}", rng.sample(LABELS, n)
    top = rng.choice((10, 20, 50, 100))
    values = [max(1, round(top * rng.uniform(0.08, 1))) for _ in range(n)]
    while len(set(values)) < n:  # one bar is the largest
        values = [value + rng.randint(0, 2) for value in values]
    return title, labels, values, rng.sample(list(BARS), n)


def draw_charts(rng, title, labels, values, colours):
    """160 x 160 pixels: bars from x = 30 to 155 and from y = 139 up, their values on top."""
    image = Image.new("RGB", (160, 160), "white")
    draw, small, font = ImageDraw.Draw(image), font_of("DejaVuSans", 8), font_of("DejaVuSans", 9)
    draw.text((30, 17), title, "black", font_of("DejaVuSans", 10), "ls")
    scale, step = 98 / max(values), 125 / len(labels)  # pixels of one, of a bar and its gap
    tick = next(t for t in (1, 2, 5, 10, 20, 50) if max(values) / t <= 7)
    end, share = rng.choice((29, 29, 155)), rng.uniform(0.5, 0.85)  # some have lines across
    for value in range(0, max(values) + 1, tick):
        y = 139 - value * scale
        draw.line((27, y, end, y), "#cccccc")
        draw.text((25, y), str(value), "black", small, "rm")
    for k, (label, value, colour) in enumerate(zip(labels, values, colours)):
        x, y, half = 30 + (k + 0.5) * step, 139 - value * scale, share * step / 2
        draw.rectangle((x - half, y, x + half, 139), BARS[colour])
        draw.text((x, y - 2), str(value), "black", font, "ms")
        draw.text((x, 151), label, "black", font, "ms")
    draw.line((30, 139, 155, 139), "black")
    draw.line((30, 22, 30, 139), "black")
    return image


def counted(labels, whats, asked):
    """The bars from the left to the last that is asked for; those asked for with what they are."""
    pairs = list(enumerate(zip(labels, whats)))[: max(asked) + 1]
    return ", ".join(f"{label} = {what}" if k in asked else label for k, (label, what) in pairs)


def questions_of(title, labels, values, colours):
    """All questions that a chart can be asked: kind -> [(question, answer)]."""
    kinds = dict(title=[("What is the title?", title)])
    kinds["largest"] = [("Which bar is the largest?", labels[int(np.argmax(values))])]
    kinds |= dict(value=[], colour=[], difference=[])
    for i, one in enumerate(labels):
        answers = counted(labels, values, [i]), counted(labels, colours, [i])
        kinds["value"].append((f"What is the value of {one}?", answers[0]))
        kinds["colour"].append((f"What colour is the bar of {one}?", answers[1]))
        for j, two in enumerate(labels):
            if values[i] > values[j]:
                sum_up = f"{values[i]} - {values[j]} = {values[i] - values[j]}"
                answer = f"{counted(labels, values, [i, j])}; {sum_up}"
                kinds["difference"].append((f"How much larger is {one} than {two}?", answer))
    return kinds


def table_of(title, labels, values, colours):
    """All that a chart shows, its bars numbered."""
    lists = (colours, labels, values)
    return "; ".join([" ".join(f"{i} {x}" for i, x in enumerate(a, 1)) for a in lists] + [title])


# ----------------------------------------------------------------------------------------------
# As rows of a task

PLANS = dict(shapes=plan_shapes, docs=plan_docs, charts=plan_charts)
DRAW = dict(shapes=draw_shapes, docs=draw_docs, charts=draw_charts)
ASKED = dict(shapes="What is there?", docs="Read it.", tables="What does it show?")


@dataclass(frozen=True)
class Drawn:
    """A picture of one of these kinds, drawn when it is asked for."""

    kind: str
    split: str
    number: int

    def size(self):
        if self.kind == "docs":
            return drawn_from(self.kind, self.split, self.number)[1][3]
        return dict(shapes=(96, 96), charts=(160, 160))[self.kind]

    def load(self):
        rng, plan = drawn_from(self.kind, self.split, self.number)
        return DRAW[self.kind](rng, *plan[self.kind != "charts" :])


def picture_rows(kind, sizes=None):
    """split -> rows with source, target and images."""
    sizes = zip(SPLITS, sizes or SIZES["charts" if kind == "tables" else kind])
    return {s: [row for k in range(n) for row in rows_of_picture(kind, s, k)] for s, n in sizes}


def rows_of_picture(kind, split, number):
    drawn = "charts" if kind == "tables" else kind
    _, plan = drawn_from(drawn, split, number)
    images = [Drawn(drawn, split, number)]
    if kind != "charts":
        target = table_of(*plan) if kind == "tables" else plan[0]
        return [dict(source=f"<image>{ASKED[kind]}", target=target, images=images)]
    chance, kinds, rows = random.Random(f"questions {split} {number}"), questions_of(*plan), []
    for k in range(QUESTIONS):  # each kind as often as the others, while it has questions left
        what = list(kinds)[(number + k) % len(kinds)]
        if kinds[what]:
            question, answer = kinds[what].pop(chance.randrange(len(kinds[what])))
            source = f"<image>{question}"
            rows.append(dict(source=source, target=answer, images=images, kind=what))
    # A model that can read a chart unlearns it before it answers, unless it is asked to read on.
    return rows + rows_of_picture("tables", split, number) * (split == "train")
