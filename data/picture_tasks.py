"""Tasks whose sources have pictures, as rows and as batches. Needs no torch.

A row is a dict with `source`, in which every <image> stands for a picture, `target`, `images` (a
path, a drawing of data/pictures.py, or a place in a data set) and, where a question has several
right answers, `answers`.

`--data` names a task that is drawn on the spot (shapes, docs, charts, tables), a data set of the
paper from the Hub, TASK:PATH (a local copy with the same columns), or a .jsonl, .json, .csv, .tsv
or .parquet file with the columns image, source and target.
"""

import json
from dataclasses import replace
from functools import partial

import numpy as np
from PIL import Image

from data import metrics
from data.images import n_tokens, open_image, prepare_image, size_by_header
from data.pictures import Drawn, picture_rows
from data.sets import Pairs, TaskSet, decoder_only, task_tokenizer
from data.tasks import IMAGE, Task, fill
from lib.settings import UserError, progress

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
    said, rows, images = "", [], record.get("image") or []
    images = images if isinstance(images, list) else [images]
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


def drawn(kind, score):
    return Task(score, make=partial(picture_rows, kind))


reading, vqa, anls = metrics.score_reading, metrics.score_vqa, metrics.score_anls
TASKS = {
    "shapes": drawn("shapes", metrics.score_plain),
    "docs": drawn("docs", anls),
    "charts": drawn("charts", metrics.score_worked),
    "tables": drawn("tables", reading),
    "llava-pretrain": Task(reading, "liuhaotian/LLaVA-Pretrain", read=of_conversation),
    "llava-instruct": Task(reading, "liuhaotian/LLaVA-Instruct-150K", read=of_conversation),
    "ureader": Task(anls, "Mizukiluke/ureader-instruction-1.0", read=of_conversation),
    "synthdog": Task(reading, "naver-clova-ix/synthdog-en", read=of_synthdog),
    "chartqa": Task(metrics.score_relaxed, "HuggingFaceM4/ChartQA", read=of_chartqa),
    "textvqa": Task(vqa, "lmms-lab/textvqa", read=of_vqa),
    "vqav2": Task(vqa, "HuggingFaceM4/VQAv2", read=of_vqa),
    "docvqa": Task(anls, "HuggingFaceM4/DocumentVQA", read=of_vqa),
    "pictures": Task(reading, columns=("image", "source", "target"), read=of_pair),  # one's own
}


def is_picture_task(name):
    return name.split(":")[0] in TASKS


def load_picture_task(name, say=print):
    """The Task of --data with its rows; UserError for what is not there or of no use."""
    kind, _, path = name.partition(":") if is_picture_task(name) else ("pictures", "", name)
    task = replace(TASKS[kind], name=kind, splits={})
    return fill(task, name, path, say, ("train", "val"))  # on the Hub, answers of test are hidden


# ----------------------------------------------------------------------------------------------
# Rows as batches


def open_pictures(cfg, vision, say, n_rows):
    """(train_set, valid_set) of cfg.data; n_rows: rows of a step, of all passes and processes."""
    task, sets = load_picture_task(cfg.data, say), []
    rows = task.splits["train"]
    if cfg.data == "tables":  # the questions on the same charts come later
        rows = rows + picture_rows("charts", (500, 0, 0))["train"]
    tokenizer = task_tokenizer(cfg, rows, say)
    for split in ("train", "val"):
        shape = tokenizer, cfg.src_len, cfg.tgt_len, decoder_only(cfg)
        pairs = PicturePairs(task.splits[split], *shape, vision)
        say(f"{task.name}, {split}: {pairs.describe()}")
        sets.append(PictureSet(task, pairs, n_rows, cfg))
    return sets


class PictureSet(TaskSet):
    def pictures(self, step, rows):
        """The Pictures of `batch(step, rows)`, in order."""
        return self.pairs.pictures(self.share(step, rows)[0])


class PicturePairs(Pairs):
    """Pairs whose sources have pictures. A source that is too long loses what stands behind its
    pictures, never part of one, and keeps its end: there, after earlier turns, the question is.
    `blank` shows an empty ground in the place of every picture."""

    blank = False

    def __init__(self, rows, tokenizer, src_len, tgt_len, decoder_only, vision):
        self.vision, self.room, self.sizes = vision, src_len - 1 - bool(decoder_only), []
        shown = progress(rows, "pictures", leave=False, disable=len(rows) < 2e4)
        for number, row in enumerate(shown):
            self.sizes.append([size_of(ref, named(ref, number)) for ref in row["images"]])
        super().__init__(rows, tokenizer, src_len, tgt_len, decoder_only)

    def encode(self, rows):
        counts = [[n_tokens(*size, self.vision) for size in sizes] for sizes in self.sizes]
        sources = encode_sources([row["source"] for row in rows], counts, self.tokenizer)
        for number, ids in enumerate(sources, 1):
            if self.tokenizer.image in ids[self.room :]:
                raise UserError(
                    f"row {number}: --src_len has room for {self.room} tokens, fewer than its "
                    "pictures and the text before them: raise it, or use --tokens=variance"
                )
            if (more := len(ids) - self.room) > 0:  # moved to the end, where Pairs cuts
                start = len(ids) - [*ids[::-1], self.tokenizer.image].index(self.tokenizer.image)
                ids[start:] = ids[start + more :] + ids[start : start + more]
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


def size_of(ref, where):
    """(width, height) of an entry of a row's `images`, from its header where that is enough."""
    if isinstance(ref, Drawn):
        return ref.size()
    ref = ref if isinstance(ref, str) else ref.load()
    return size_by_header(ref) or open_image(ref, where).size
