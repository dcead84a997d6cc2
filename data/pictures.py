"""Pictures that are drawn on the spot, with questions whose answers are known: no download. Needs no torch.

    shapes    one or two groups of shapes -> what they are: "three red circles at the top left, one blue star in the middle"
    docs      lines of made-up words in many fonts and noises, as SynDoG draws them -> the text
    charts    a bar chart, drawn by matplotlib, and questions as ChartQA's -> a value, the largest bar, a difference, a colour, the title; bars that a question names are counted off
              first: "Oslo, Lima = 8"
    tables    the same charts -> all that they show: colours, names, values, title. To begin with: from single answers alone, reading is not learnt in minutes

Everything about a picture follows from (kind, split, number). What it says (its caption, its text, a chart's title) falls by a hash into the training or a held-out
split, and is drawn again until it falls into the right one: no caption, text or title that is held out was ever seen in training. Single words are.
"""
import functools
import hashlib
import inspect
import io
import json
import multiprocessing
import os
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from tqdm import tqdm

import data.corpus

SPLITS = ("train", "val", "test")


def split_of(text):
    """Where a text belongs: a tenth of all are held out, half of those for test."""
    part = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 20
    return SPLITS[(part < 2) + (part < 1)]


def drawn_from(kind, split, number, make):
    """make(rng) -> (what is said, ...) with fresh random numbers until what is said belongs to the split. -> (rng, what make gave)."""
    for attempt in range(10000):
        rng = random.Random(f"{kind} {split} {number} {attempt}")
        plan = make(rng)
        if split_of(plan[0]) == split:
            return rng, plan
    raise AssertionError(f"{kind}: nothing falls into {split}")


# ---------------------------------------------------------------------------------------------------------------------
# shapes

COLOURS = dict(red=(220, 40, 40), blue=(40, 80, 220), green=(30, 150, 60), yellow=(235, 200, 30), purple=(140, 50, 170), black=(25, 25, 25))
SHAPES = ("circle", "square", "triangle", "star")
COUNTS = ("one", "two", "three", "four")
PLACES = ("at the top left", "at the top", "at the top right", "at the left", "in the middle", "at the right", "at the bottom left", "at the bottom", "at the bottom right")


def plan_shapes(rng):
    """-> (caption, groups of (count, colour, shape, place))."""
    groups = [(rng.randint(1, 4), rng.choice(list(COLOURS)), rng.choice(SHAPES), place) for place in sorted(rng.sample(range(9), rng.randint(1, 2)))]
    words = [f"{COUNTS[n - 1]} {colour} {shape}{'s' if n > 1 else ''} {PLACES[place]}" for n, colour, shape, place in groups]
    return ", ".join(words), groups


def draw_shapes(rng, groups, size=96):
    """A picture of size x size; a group stands in one of nine fields."""
    ground = np.array([rng.randint(200, 255) for _ in range(3)])
    noise = np.random.default_rng(rng.randrange(2 ** 32)).normal(0, 6, (size, size, 1))
    image = Image.fromarray(np.clip(ground + noise, 0, 255).astype(np.uint8))
    large = image.resize((4 * size, 4 * size), Image.Resampling.NEAREST)  # drawn large and shrunk, for smooth edges
    draw, field = ImageDraw.Draw(large), 4 * size / 3
    for n, colour, shape, place in groups:
        rgb = tuple(max(0, min(255, c + rng.randint(-20, 20))) for c in COLOURS[colour])
        for quarter in rng.sample(range(4), n):
            r = field * rng.uniform(0.17, 0.24)
            x, y = ((at + 0.5) * field / 2 + rng.uniform(-1, 1) * (field / 4 - r) for at in (quarter % 2, quarter // 2))
            x, y = x + place % 3 * field, y + place // 3 * field
            if shape == "circle":
                draw.ellipse((x - r, y - r, x + r, y + r), fill=rgb)
            elif shape == "square":
                draw.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=rgb)
            else:
                corners = 3 if shape == "triangle" else 10
                turns = [2 * np.pi * k / corners - np.pi / 2 for k in range(corners)]
                reach = [r if shape == "triangle" or k % 2 == 0 else 0.45 * r for k in range(corners)]
                draw.polygon([(x + q * np.cos(a), y + q * np.sin(a)) for q, a in zip(reach, turns)], fill=rgb)
    return large.resize((size, size), Image.Resampling.BOX)


# ---------------------------------------------------------------------------------------------------------------------
# docs

FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSansMono", "DejaVuSansMono-Bold",
         "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10", "cmb10")  # which matplotlib brings along


@functools.lru_cache(maxsize=512)
def font_of(name, size):
    import matplotlib
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf"), size)


def made_up_word(rng):
    word = "".join(rng.choice("bcdfghklmnprstvwz") + rng.choice("aeiou") + rng.choice(("", "", "n", "r", "s", "t")) for _ in range(rng.randint(1, 3)))
    return word.capitalize() if rng.random() < 0.2 else word


def plan_docs(rng):
    """-> (text, its lines). A line is two to four words or numbers."""
    lines = [" ".join(made_up_word(rng) if rng.random() < 0.85 else str(rng.randint(0, 9999)) for _ in range(rng.randint(2, 4))) for _ in range(rng.randint(1, 2))]
    return " ".join(lines), lines


def plan_paper(rng, lines):
    """-> (font, its size, width of the text, size of the picture): as wide and high as the text needs."""
    points, name = rng.randint(12, 18), rng.choice(FONTS)
    font = font_of(name, points)
    width = max(font.getbbox(line)[2] for line in lines)
    return font, points, width, (width + rng.randint(6, 24), round(1.4 * points) * len(lines) + rng.randint(6, 16))


def draw_docs(rng, lines):
    font, points, needed, (width, height) = plan_paper(rng, lines)
    paper, ink = rng.randint(190, 255), rng.randint(0, 90)
    image = Image.new("L", (width, height), paper)
    left, top = rng.randint(2, width - needed - 2), rng.randint(1, 5)
    for k, line in enumerate(lines):
        ImageDraw.Draw(image).text((left, top + k * round(1.4 * points)), line, fill=ink, font=font)
    image = image.rotate(rng.uniform(-1.5, 1.5), Image.Resampling.BICUBIC, fillcolor=paper)
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7)))
    noise = np.random.default_rng(rng.randrange(2 ** 32)).normal(0, rng.uniform(0, 12), (height, width))
    tint = np.array([rng.uniform(0.92, 1) for _ in range(3)])
    return Image.fromarray(np.clip((np.asarray(image) + noise)[:, :, None] * tint, 0, 255).astype(np.uint8))


# ---------------------------------------------------------------------------------------------------------------------
# charts

WHAT = ("Sales", "Rain", "Visitors", "Exports", "Trees", "Votes", "Births", "Goals", "Books", "Cars", "Flights", "Ships")
BY = ("city", "month", "team", "farm", "school", "river", "port", "street", "year", "region", "shop", "age")
LABELS = ("Oslo", "Rome", "Lima", "Cork", "Kyiv", "Pisa", "Jan", "Apr", "May", "Sep", "North", "West", "Ants", "Cats", "Dogs", "Elks")
BARS = dict(red="#d62728", blue="#1f77b4", green="#2ca02c", orange="#ff7f0e", purple="#9467bd", brown="#8c564b", pink="#e377c2", grey="#7f7f7f")


def plan_charts(rng):
    """-> (title, labels, values, colours)."""
    n = rng.randint(3, 4)
    title, labels = f"{rng.choice(WHAT)} by {rng.choice(BY)}", rng.sample(LABELS, n)
    top = rng.choice((10, 20, 50, 100))
    values = [max(1, round(top * rng.uniform(0.08, 1))) for _ in range(n)]
    while len(set(values)) < n:  # one bar is the largest
        values = [value + rng.randint(0, 2) for value in values]
    return title, labels, values, rng.sample(list(BARS), n)


def questions_of(title, labels, values, colours):
    """All questions that a chart can be asked: (kind, question, answer). Where the question names bars, the answer counts them off from the left until all of these are found: "Oslo, Lima = 8".
    What stands after the last "=" is scored. To compare a name with the question when it has been written is learnt in minutes, to find the bar in the picture at once is not."""
    found = [("title", "What is the title?", title), ("largest", "Which bar is the largest?", labels[int(np.argmax(values))])]

    def counted(whats, asked):
        return ", ".join(f"{label} = {what}" if k in asked else label for k, (label, what) in enumerate(zip(labels, whats)) if k <= max(asked))
    n = range(len(labels))
    for k in n:
        found += [("value", f"What is the value of {labels[k]}?", counted(values, [k])), ("colour", f"What colour is the bar of {labels[k]}?", counted(colours, [k]))]
    found += [("difference", f"How much larger is {labels[i]} than {labels[j]}?", f"{counted(values, [i, j])}; {values[i]} - {values[j]} = {values[i] - values[j]}")
              for i in n for j in n if values[i] > values[j]]
    return found


def table_of(title, labels, values, colours):
    """All that a chart shows. The bars are numbered: to count them while they are listed takes longer to learn than to read them."""
    lists = (" ".join(f"{i} {what}" for i, what in enumerate(found, 1)) for found in (colours, labels, values))
    return "; ".join((*lists, title))


@functools.lru_cache(maxsize=1)
def canvas(size):
    """matplotlib's figure and its surface, made once: a new one a chart would take twice as long."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(size / 80, size / 80), dpi=80)
    return figure, FigureCanvasAgg(figure)


def draw_charts(rng, title, labels, values, colours, size=160):
    figure, surface = canvas(size)
    figure.clear()
    axes = figure.add_axes((0.19, 0.13, 0.78, 0.73))
    bars = axes.bar(range(len(labels)), values, width=rng.uniform(0.5, 0.85), color=[BARS[colour] for colour in colours])
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set_xlim(-0.5, len(labels) - 0.5)  # names at the same places, whatever the width of the bars
    axes.tick_params(axis="y", labelsize=7)
    axes.set_title(title, fontsize=9, pad=4, loc="left")
    axes.margins(y=0.15)
    axes.bar_label(bars, fontsize=8, padding=1)
    if rng.random() < 0.3:
        axes.grid(axis="y", alpha=0.4)
    for side in ("top", "right"):
        axes.spines[side].set_visible(rng.random() < 0.5)
    surface.draw()
    return Image.fromarray(np.asarray(surface.buffer_rgba())[:, :, :3].copy())


# ---------------------------------------------------------------------------------------------------------------------
# As rows of a task

PLANS = dict(shapes=plan_shapes, docs=plan_docs, charts=plan_charts)
READINGS = dict(tables="charts")  # kinds that share another's pictures
SIZES = dict(shapes=(200_000, 1000, 1000), docs=(100_000, 500, 500), charts=(12_000, 250, 250))  # pictures of train, val and test
QUESTIONS = 8  # of a chart
READ_AGAIN = 1  # rows of `tables` among a training chart's questions: without them, a model that reads unlearns it before it answers


@dataclass(frozen=True)
class Drawn:
    """A picture of one of these kinds, drawn when it is asked for."""
    kind: str
    split: str
    number: int

    def size(self):
        if self.kind == "docs":
            rng, plan = drawn_from(self.kind, self.split, self.number, plan_docs)
            return plan_paper(rng, plan[1])[3]
        return dict(shapes=(96, 96), charts=(160, 160))[self.kind]

    def load(self):
        if self.kind == "charts":  # a hundred times slower to draw than the others
            return Image.open(io.BytesIO(chart_store(self.split).read(self.number)))
        rng, plan = drawn_from(self.kind, self.split, self.number, PLANS[self.kind])
        return draw_shapes(rng, plan[1]) if self.kind == "shapes" else draw_docs(rng, plan[1])


def picture_rows(kind, sizes=None):
    """split -> rows with source, target and images."""
    sizes = sizes or SIZES[READINGS.get(kind, kind)]
    return {split: [row for number in range(n) for row in rows_of_picture(kind, split, number)] for split, n in zip(SPLITS, sizes)}


def rows_of_picture(kind, split, number):
    drawn = READINGS.get(kind, kind)
    _, plan = drawn_from(drawn, split, number, PLANS[drawn])
    images = [Drawn(drawn, split, number)]
    if kind == "tables":
        return [dict(source="<image>What does it show?", target=table_of(*plan), images=images)]
    if kind != "charts":
        return [dict(source="<image>" + {"shapes": "What is there?", "docs": "Read it."}[kind], target=plan[0], images=images)]
    asked = random.Random(f"questions {split} {number}")
    kinds = {}
    for what, question, answer in questions_of(*plan):
        kinds.setdefault(what, []).append((question, answer))
    rows = []
    for k in range(QUESTIONS):  # every kind as often as every other, as far as there are enough questions of it
        what = list(kinds)[(number + k) % len(kinds)]
        if kinds[what]:
            question, answer = kinds[what].pop(asked.randrange(len(kinds[what])))
            rows.append(dict(source=f"<image>{question}", target=answer, images=images, kind=what))
    return rows + rows_of_picture("tables", split, number) * (READ_AGAIN if split == "train" else 0)


class Store:
    """The charts of a split, drawn once by all cores and kept as PNGs in one file of the cache; a drawing that was cut off goes on."""
    BLOCK = 500

    def __init__(self, split, n, cache):
        import matplotlib
        source = [inspect.getsource(part) for part in (split_of, drawn_from, plan_charts, canvas.__wrapped__, draw_charts)] + [WHAT, BY, LABELS, BARS]  # another drawing is another store
        key = hashlib.sha256(json.dumps([source, matplotlib.__version__, n]).encode()).hexdigest()[:12]
        self.folder, self.n, self.split = os.path.join(cache, f"charts-{key}", split), n, split
        self.files = {}

    def draw(self):
        os.makedirs(self.folder, exist_ok=True)
        missing = [block for block in range(-(-self.n // self.BLOCK)) if not os.path.exists(self.path(block))]
        if not missing:
            return
        jobs = [(self.path(block), self.split, block * self.BLOCK, min(self.n, (block + 1) * self.BLOCK)) for block in missing]
        if len(jobs) == 1:
            draw_block(jobs[0])
            return
        with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
            for _ in tqdm(pool.map(draw_block, jobs), total=len(jobs), desc=f"drawing charts, {self.split}", unit=f" x {self.BLOCK}", file=sys.stderr):
                pass

    def path(self, block):
        return os.path.join(self.folder, f"{block}.npz")

    def read(self, number):
        block = number // self.BLOCK
        if block not in self.files:
            if not os.path.exists(self.path(block)):
                draw_charts_once()
            with np.load(self.path(block)) as found:
                self.files[block] = found["bytes"], found["ends"]
        content, ends = self.files[block]
        k = number % self.BLOCK
        return content[(ends[k - 1] if k else 0):ends[k]].tobytes()


open_store = functools.lru_cache(maxsize=None)(Store)


def chart_store(split):
    return open_store(split, SIZES["charts"][SPLITS.index(split)], data.corpus.CACHE)


def draw_charts_once():
    """All of them, before anything else: matplotlib cannot draw in two threads at a time, and train.py makes its batches in one of its own."""
    for split in SPLITS:
        chart_store(split).draw()


def draw_block(job):
    path, split, first, end = job
    pictures = []
    for number in range(first, end):
        rng, plan = drawn_from("charts", split, number, plan_charts)
        buffer = io.BytesIO()
        draw_charts(rng, *plan).save(buffer, "PNG", compress_level=3)
        pictures.append(buffer.getvalue())
    with open(new := f"{path}.{os.getpid()}", "wb") as f:
        np.savez(f, bytes=np.frombuffer(b"".join(pictures), np.uint8), ends=np.cumsum([len(p) for p in pictures]))
    os.replace(new, path)
