"""Tasks whose sources have pictures, as rows and as batches. Needs no torch.

A row is a dict with `source`, in which every <image> stands for a picture, `target`, `images` (a
path, bytes, a drawing of data/pictures.py, or a place in a data set) and, where a question has
several right answers, `answers`.

`--data` names a task that is drawn on the spot (shapes, docs, charts, tables), a data set of the
paper from the Hub, TASK:PATH (a local copy with the same columns), or a .jsonl, .json, .csv or
.parquet file with the columns image, source and target.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import metrics
from data.corpus import split_files
from data.images import n_tokens, open_image, prepare_image, size_by_header
from data.pictures import Drawn, picture_rows
from data.sets import IMAGE, Pairs, TaskSet
from data.tasks import hold_out, json_lines
from data.tokenizer import load_tokenizer, train_tokenizer
from lib.settings import UserError, read_json

# ----------------------------------------------------------------------------------------------
# Records of a data set -> rows. The columns are those of the published data sets.


def asked(record, question, target, **more):
    return [dict(source=f"{IMAGE}{question}", target=target, images=[record["image"]], **more)]


def of_pair(record):
    """image (one, or a list), source, target: the columns of one's own data."""
    images = record["image"] if isinstance(record["image"], list) else [record["image"]]
    return [dict(source=record["source"], target=record["target"], images=images)]


def of_conversation(record):
    """LLaVA's and UReader's: every answer is a target, what was said before it its source."""
    said, rows, images = "", [], record.get("image")
    images = images if isinstance(images, list) else [images] if images is not None else []
    for turn in record["conversations"]:
        text = turn["value"].strip()
        if turn["from"] in ("gpt", "assistant"):
            rows.append(dict(source=said.strip(), target=text, images=images))
        said += text + "\n"
    return rows


def of_synthdog(record):
    text = json.loads(record["ground_truth"])["gt_parse"]["text_sequence"]
    return asked(record, "Read it.", text)


def of_chartqa(record):
    label = record["label"]
    return asked(record, record["query"], label[0] if isinstance(label, list) else label)


def of_vqa(record):
    """TextVQA, VQAv2, DocVQA: answers of several people, texts or records; the commonest is the
    target."""
    answers = [a["answer"] if isinstance(a, dict) else a for a in record["answers"]]
    target = record.get("multiple_choice_answer") or max(answers, key=answers.count)
    return asked(record, record["question"], target, answers=answers)


@dataclass
class PictureTask:
    score: Callable  # of data/metrics.py
    read: Callable | None = None  # record -> rows; None: drawn by data/pictures.py
    hub: str | None = None  # where its records lie on the Hub
    name: str = ""
    splits: dict = field(default_factory=dict)


reading, vqa, anls = metrics.score_reading, metrics.score_vqa, metrics.score_anls
TASKS = {
    "shapes": PictureTask(metrics.score_exact),
    "docs": PictureTask(reading),
    "charts": PictureTask(metrics.score_worked),
    "tables": PictureTask(reading),
    "llava-pretrain": PictureTask(reading, of_conversation, "liuhaotian/LLaVA-Pretrain"),
    "llava-instruct": PictureTask(reading, of_conversation, "liuhaotian/LLaVA-Instruct-150K"),
    "ureader": PictureTask(anls, of_conversation, "Mizukiluke/ureader-instruction-1.0"),
    "synthdog": PictureTask(reading, of_synthdog, "naver-clova-ix/synthdog-en"),
    "chartqa": PictureTask(metrics.score_relaxed, of_chartqa, "HuggingFaceM4/ChartQA"),
    "textvqa": PictureTask(vqa, of_vqa, "lmms-lab/textvqa"),
    "vqav2": PictureTask(vqa, of_vqa, "HuggingFaceM4/VQAv2"),
    "docvqa": PictureTask(anls, of_vqa, "HuggingFaceM4/DocumentVQA"),
    "pictures": PictureTask(reading, of_pair),  # any file with the columns of one's own data
}


def is_picture_task(name):
    return name.split(":")[0] in TASKS


# ----------------------------------------------------------------------------------------------
# Where pictures lie


@dataclass(frozen=True)
class Held:
    """A picture inside a data set of the `datasets` library, read when it is asked for."""

    records: Any
    column: str
    number: int

    def load(self):
        value = self.records[self.number][self.column]
        return value["bytes"] or value["path"] if isinstance(value, dict) else value

    def __repr__(self):  # goes into the hash of the rows
        return f"{self.column} {self.number} {getattr(self.records, '_fingerprint', '')}"


def size_of(ref, where):
    """(width, height) of an entry of a row's `images`, from its header where that is enough."""
    if isinstance(ref, Drawn):
        return ref.size()
    ref = ref if isinstance(ref, str) else ref.load()
    return size_by_header(ref) or open_image(ref, where).size


def records_of(kind, splits, **options):
    """The records that `datasets` loads, their pictures as Held: split -> records."""
    import datasets

    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(kind, **options)
    except Exception as error:  # the library and those below it raise their own kinds
        why = str(error.__cause__ or error).split("\n")[0][:200]
        raise UserError(f"{options.get('data_files', kind)} could not be read: {why}") from None

    def records(part):
        held = []
        for name, kind in part.features.items():
            if isinstance(kind, datasets.Image):
                part = part.cast_column(name, datasets.Image(decode=False))
                held.append(name)
        for number, record in enumerate(part.remove_columns(held)):
            yield record | {name: Held(part, name, number) for name in held}

    return {splits[split]: records(found[split]) for split in splits if split in found}


def from_path(path):
    """(split, file, records) of each file of a path."""
    splits, _ = split_files(path)
    for split, file in [(name, file) for name in splits for file in splits[name]]:
        kind = os.path.splitext(file)[1][1:].lower()
        if kind == "json":  # LLaVA's: one list
            records = read_json(file, list, 2**32)
        elif kind == "jsonl":
            records = json_lines(file)
        elif kind in ("csv", "parquet"):
            texts = dict.fromkeys(("image", "source", "target"), str)  # "42" stays a text
            options = dict(keep_default_na=False, converters=texts) if kind == "csv" else {}
            records = records_of(kind, dict(train=split), data_files=[file], **options)[split]
        else:
            raise UserError(f"{file}: rows with pictures come as .jsonl, .json, .csv or .parquet")
        yield split, file, records


def read_rows(records, read, where):
    """Rows of records; UserError names the first that cannot be used."""
    rows = []
    for number, record in enumerate(records, 1):
        try:
            if isinstance(record, Exception):  # of a line that could not be read
                raise record
            rows += [check_row(row, where) for row in read(record)] if record is not None else []
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            why = f"column {error} is missing" if isinstance(error, KeyError) else error
            raise UserError(f"{where}, row {number} cannot be used: {why}") from None
    return rows


def check_row(row, where):
    """The row; relative paths of its pictures begin at the folder of the file `where`."""
    folder, images, source = os.path.dirname(where), row["images"], row["source"]
    if not isinstance(source, str) or not isinstance(row["target"], str) or not row["target"]:
        raise ValueError("its source or target is no text")
    if any(not isinstance(ref, (str, Held)) for ref in images):
        raise ValueError("its image is neither a path nor a picture")
    if IMAGE not in source:
        source = IMAGE * len(images) + source
    if (n := source.count(IMAGE)) != len(images):
        raise ValueError(f"its source has {n} {IMAGE} and it has {len(images)} pictures")
    images = [os.path.join(folder, x) if isinstance(x, str) else x for x in images]
    return row | dict(source=source, images=images)


def load_picture_task(name):
    """The PictureTask of --data with its rows; UserError for what is not there or of no use."""
    kind, _, path = name.partition(":") if is_picture_task(name) else ("pictures", "", name)
    task = replace(TASKS[kind], name=kind, splits={})
    if task.read is None:
        if path:
            raise UserError(f"--data={name}: {kind} is drawn on the spot and takes no path")
        task.splits = picture_rows(kind)
        return task
    if os.path.exists(path):
        parts = from_path(path)
    elif path and (path.count("/") != 1 or path[0] in "./~" or os.path.splitext(path)[1]):
        raise UserError(f"--data={name}: no such file, and none of {', '.join(TASKS)}")
    else:  # test is left out: its answers are often hidden
        hub = path or task.hub
        found = records_of(hub, dict(train="train", validation="val", val="val"))
        parts = [(split, hub, records) for split, records in found.items()]
    for split, where, records in parts:
        task.splits.setdefault(split, []).extend(read_rows(records, task.read, where))
    return hold_out(task, name, lambda row: repr(row["images"]))


# ----------------------------------------------------------------------------------------------
# Rows as batches


def open_pictures(cfg, vision, say, n_rows):
    """(train_set, valid_set) of cfg.data; n_rows: rows of a step, of all passes and processes."""
    task, sets = load_picture_task(cfg.data), []
    if cfg.tokenizer == "bpe":
        rows = list(task.splits["train"])
        if cfg.data == "tables":  # the questions on the same charts come later
            rows += picture_rows("charts", (500, 0, 0))["train"]
        texts = (row[side].replace(IMAGE, "") for row in rows for side in ("source", "target"))
        tokenizer = train_tokenizer(texts, cfg.vocab_size)
    else:
        tokenizer = load_tokenizer(cfg.tokenizer)
    for split in ("train", "val"):
        rows, lengths = task.splits[split], (cfg.src_len, cfg.tgt_len)
        pairs = PicturePairs(rows, tokenizer, *lengths, cfg.arch == "dec", vision)
        say(f"{task.name}, {split}: {pairs.describe()}")
        sets.append(PictureSet(task, pairs, n_rows, cfg))
    return sets


class PictureSet(TaskSet):
    def pictures(self, step, rows):
        """The Pictures of `batch(step, rows)`, in order."""
        return self.pairs.pictures(self.share(step, rows)[0])


class PicturePairs(Pairs):
    """Pairs whose sources have pictures. A source that is too long loses the end of its text, never
    part of a picture. `blank` shows an empty ground in the place of every picture."""

    blank = False

    def __init__(self, rows, tokenizer, src_len, tgt_len, decoder_only, vision):
        self.vision, self.room, self.sizes = vision, src_len - 1 - decoder_only, []
        for number, row in enumerate(tqdm(rows, "pictures", leave=False, disable=len(rows) < 2e4)):
            self.sizes.append([size_of(ref, named(ref, number)) for ref in row["images"]])
        super().__init__(rows, tokenizer, src_len, tgt_len, decoder_only)

    def encode(self, rows):
        counts = [[n_tokens(*size, self.vision) for size in sizes] for sizes in self.sizes]
        sources = encode_sources([row["source"] for row in rows], counts, self.tokenizer)
        for number, source in enumerate(sources, 1):
            if self.tokenizer.image in source[self.room :]:
                raise UserError(
                    f"row {number}: --src_len has room for {self.room} tokens, fewer than its "
                    "pictures have: raise it, lower --grid, or use --tokens=variance"
                )
        return sources

    def background(self):
        """The median of each channel, from 0 to 1, over at most 32 pictures."""
        rows = range(0, len(self.rows), max(1, len(self.rows) // 32))
        pixels = [picture.tiles[0].reshape(-1, 3) for picture in self.pictures(rows)]
        return (np.median(np.concatenate(pixels), axis=0) / 255).tolist() if pixels else None

    def pictures(self, rows):
        """The Pictures of these rows, in order."""
        made = []
        for row in rows:
            refs = zip(self.rows[row]["images"], self.sizes[row])
            made += [self.picture(row, ref, size) for ref, size in refs]
        return made

    def picture(self, row, ref, size):
        if self.blank:
            ground = tuple(round(255 * value) for value in self.vision.mean)
            return prepare_image(Image.new("RGB", size, ground), self.vision)
        image = open_image(ref if isinstance(ref, str) else ref.load(), named(ref, row))
        if image.size != size:
            raise UserError(f"{named(ref, row)} has changed since its size was read")
        return prepare_image(image, self.vision)


def encode_sources(texts, counts, tokenizer):
    """Ids of texts in which each IMAGE has become as many placeholders as its picture has tokens:
    counts[row][k] of the k-th."""
    parts = [part for text in texts for part in text.split(IMAGE)]
    ids, sources = iter(tokenizer.encode_batch(parts)), []
    for row in counts:
        sources.append(next(ids))
        for n in row:
            sources[-1] = [*sources[-1], *[tokenizer.image] * n, *next(ids)]
    return sources


def named(ref, row):
    """What a picture is called in messages."""
    return ref if isinstance(ref, str) else f"the picture of row {row + 1}"
