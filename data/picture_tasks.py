"""Tasks whose sources have pictures, as rows and as batches. Needs no torch.

A row is a dict with `source`, in which every <image> stands for a picture, `target`, `images` (what `load` opens: a path, bytes, a drawing of
data/pictures.py, a place in a data set), and where a question has several right answers `answers`.

`--data` names a built-in task (shapes, docs, charts, tables: drawn on the spot), a data set of the paper from the Hub, TASK:PATH (a local copy with the same
columns), or a .jsonl, .csv or .parquet file with the columns image, source and target.
"""
import json
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import metrics
from lib.settings import UserError
from data.corpus import open_rows, split_files
from data.images import layout, n_tokens, open_image, prepare_image, size_by_header
from data.pairs import IMAGE, Pairs, encode_sources
from data.pictures import READINGS, Drawn, draw_charts_once, picture_rows
from data.tasks import Task, hold_out, json_lines, rows_of

# ---------------------------------------------------------------------------------------------------------------------
# Records of a data set -> rows. The columns are those of the published data sets.


def of_pair(record):
    """image, source, target: the columns of one's own data."""
    images = record["image"] if isinstance(record["image"], list) else [record["image"]]
    return [dict(source=record["source"], target=record["target"], images=images)]


def of_conversation(record):
    """LLaVA's and UReader's: every answer is a target, and what was said before it its source."""
    said, rows = "", []
    images = [] if record.get("image") is None else record["image"] if isinstance(record["image"], list) else [record["image"]]
    for turn in record["conversations"]:
        text = turn["value"].strip()
        if turn["from"] in ("gpt", "assistant"):
            rows.append(dict(source=said.strip(), target=text, images=images))
        said += text + "\n"
    return rows


def of_synthdog(record):
    text = json.loads(record["ground_truth"])["gt_parse"]["text_sequence"]
    return [dict(source=f"{IMAGE}Read it.", target=text, images=[record["image"]])]


def of_chartqa(record):
    label = record["label"]
    return [dict(source=f"{IMAGE}{record['query']}", target=label[0] if isinstance(label, list) else label, images=[record["image"]])]


def of_vqa(record):
    """TextVQA, VQAv2, DocVQA: several people's answers, as texts or as records with `answer`; the commonest is the target."""
    answers = [answer["answer"] if isinstance(answer, dict) else answer for answer in record["answers"]]
    target = record.get("multiple_choice_answer") or max(answers, key=answers.count)
    return [dict(source=f"{IMAGE}{record['question']}", target=target, answers=answers, images=[record["image"]])]


def of_choices(record):
    """AI2D: the number of the right option."""
    options = "".join(f"\n{letter}. {option}" for letter, option in zip("ABCDEFGH", record["options"]))
    return [dict(source=f"{IMAGE}{record['question']}{options}", target="ABCDEFGH"[int(record["answer"])], images=[record["image"]])]


def of_question(record):
    """GQA, with its pictures joined."""
    return [dict(source=f"{IMAGE}{record['question']}", target=record["answer"], images=[record["image"]])]


def of_regions(record):
    """Visual Genome: questions about a picture, or phrases for parts of it."""
    if "qas" in record:
        return [dict(source=f"{IMAGE}{pair['question']}", target=pair["answer"], images=[record["image"]]) for pair in record["qas"]]
    return [dict(source=f"{IMAGE}What is at {r['x']}, {r['y']}, {r['width']} wide and {r['height']} high?", target=r["phrase"], images=[record["image"]])
            for r in record["regions"]]


@dataclass
class PictureTask(Task):
    drawn: bool = False             # by data/pictures.py
    others: tuple = ()              # texts that the vocabulary should know, too
    config: str | None = None       # of the Hub data set
    join: tuple | None = None       # (configuration with the pictures, its key, our key): the Hub keeps them apart


TASKS = {
    "shapes": PictureTask("shapes on a ground -> what is there", metrics.score_exact, drawn=True),
    "docs": PictureTask("a line or two of text -> the text", metrics.score_reading, drawn=True),
    "charts": PictureTask("a bar chart and a question -> a value, a name, a colour", metrics.score_worked, drawn=True),
    "tables": PictureTask("a bar chart -> all that it shows (stage ocr, before charts)", metrics.score_reading, drawn=True),
    "llava-pretrain": PictureTask("a picture -> its caption (stage align)", metrics.score_reading, "liuhaotian/LLaVA-Pretrain", read=of_conversation),
    "llava-instruct": PictureTask("a picture and a question -> an answer (stage instruct)", metrics.score_reading, "liuhaotian/LLaVA-Instruct-150K", read=of_conversation),
    "ureader": PictureTask("documents and questions (stage ocr)", metrics.score_anls, "Mizukiluke/ureader-instruction-1.0", read=of_conversation),
    "synthdog": PictureTask("a drawn document -> its text (stage ocr)", metrics.score_reading, "naver-clova-ix/synthdog-en", read=of_synthdog),
    "chartqa": PictureTask("a chart and a question -> an answer", metrics.score_relaxed, "HuggingFaceM4/ChartQA", read=of_chartqa),
    "textvqa": PictureTask("a photograph and a question on its text -> an answer", metrics.score_vqa, "lmms-lab/textvqa", read=of_vqa),
    "vqav2": PictureTask("a photograph and a question -> an answer", metrics.score_vqa, "HuggingFaceM4/VQAv2", read=of_vqa),
    "docvqa": PictureTask("a document and a question -> an answer", metrics.score_anls, "HuggingFaceM4/DocumentVQA", read=of_vqa),
    "ai2d": PictureTask("a diagram, a question and options -> the letter of one", metrics.score_exact, "lmms-lab/ai2d", read=of_choices),
    "gqa": PictureTask("a photograph and a question -> a word", metrics.score_exact, "lmms-lab/GQA", read=of_question, config="train_balanced_instructions",
                  join=("train_balanced_images", "id", "imageId")),
    "vg": PictureTask("Visual Genome: a photograph and a question -> an answer", metrics.score_reading, "ranjaykrishna/visual_genome", read=of_regions, config="question_answers_v1.2.0"),
    "pictures": PictureTask("any data set with the columns image, source and target", metrics.score_reading, read=of_pair),
}


def is_picture_task(name):
    return name.split(":")[0] in TASKS


# ---------------------------------------------------------------------------------------------------------------------
# Where pictures lie

@dataclass(frozen=True)
class Held:
    """A picture inside a data set of the `datasets` library: read when it is asked for."""
    records: Any
    column: str
    number: int

    def load(self):
        value = self.records[self.number][self.column]
        return value["bytes"] or value["path"] if isinstance(value, dict) else value

    def __repr__(self):  # goes into the hash of the rows
        return f"{self.column} of {self.number} of {getattr(self.records, '_fingerprint', '')}"


def load(ref, where):
    """The PIL image of an entry of a row's `images`."""
    if isinstance(ref, (Drawn, Held)):
        ref = ref.load()
    if isinstance(ref, dict):
        ref = ref.get("bytes") or ref.get("path")
    return open_image(ref, where)


def size_of(ref, where):
    """Its (width, height), from the file's header alone where that is enough."""
    if isinstance(ref, Drawn):
        return ref.size()
    ref = ref.load() if isinstance(ref, Held) else ref
    ref = (ref.get("bytes") or ref.get("path")) if isinstance(ref, dict) else ref
    return (isinstance(ref, (str, bytes)) and size_by_header(ref)) or load(ref, where).size


def undecoded(records):
    """A data set whose columns of pictures give bytes and paths."""
    import datasets
    for name, feature in records.features.items():
        if isinstance(feature, datasets.Image):
            records = records.cast_column(name, datasets.Image(decode=False))
    return records


def records_of(records, task, images_of=None):
    """Records of a `datasets` data set, with their pictures as references."""
    import datasets
    records = undecoded(records)
    held = [name for name, feature in records.features.items() if isinstance(feature, datasets.Image) or (
        name == "image" and isinstance(feature, dict) and "bytes" in feature)]
    for number, record in enumerate(records.remove_columns(held)):
        record = dict(record) | {name: Held(records, name, number) for name in held}
        if images_of is not None:
            record["image"] = images_of[record[task.join[2]]]
        yield record


def from_hub(name, task):
    """split -> [(where, records)]."""
    import datasets
    names = {"train": "train", "testdev": "val", "dev": "val", "valid": "val", "val": "val", "validation": "val", "test": "test"}  # the last that is there
    try:
        found = datasets.load_dataset(name, task.config)
        images = {}
        if task.join:
            for part in datasets.load_dataset(name, task.join[0]).values():
                part = undecoded(part)
                images |= {key: Held(part, "image", number) for number, key in enumerate(part[task.join[1]])}
    except Exception as error:  # no network, no such data set: the library and those below it raise their own kinds
        raise UserError(f"the Hub data set {name} could not be reached ({type(error).__name__}); to use a local copy, pass its path: --data={task.name}:PATH") from None
    return {names[split]: [(f"{name}, {split}", records_of(found[split], task, images if task.join else None))] for split in names if split in found}


def from_path(path, task):
    """split -> [(where, records)] of a local file or folder. Paths of pictures inside are taken from the folder that the file lies in."""
    import datasets
    if path.endswith(".json"):  # LLaVA's: one list
        splits, kind = {"train": [path]}, "list"
    else:
        splits, kind = split_files(path)
    found = {}
    for split, files in splits.items():
        for file in files:
            if kind == "parquet":
                try:
                    records = records_of(datasets.load_dataset("parquet", data_files=[file], split="train"), task)
                except Exception as error:  # the readers behind `datasets` raise their own kinds
                    raise UserError(f"reading {file} failed: {str(error.__cause__ or error).splitlines()[0]}") from None
            elif kind == "csv":
                records = open_rows("csv", [file], keep_default_na=False, converters=dict.fromkeys(("image", "source", "target"), str))
            elif kind == "list":
                with open(file, encoding="utf-8") as f:
                    try:
                        records = json.load(f)
                    except ValueError as error:
                        raise UserError(f"{file} is not JSON ({error})") from None
            elif kind == "json":
                records = json_lines(file)
            else:
                raise UserError(f"--data={path}: rows with pictures come as .json, .jsonl, .csv or .parquet")
            found.setdefault(split, []).append((file, placed(records, os.path.dirname(file))))
    return found


def placed(records, folder):
    """Makes relative paths of pictures absolute."""
    def full(ref):
        return os.path.join(folder, ref) if isinstance(ref, str) else ref
    for record in records:
        if isinstance(record, dict) and "image" in record:
            image = record["image"]
            record = record | dict(image=[full(ref) for ref in image] if isinstance(image, list) else full(image))
        yield record


def check_row(row):
    for name in ("source", "target"):
        if not isinstance(row[name], str):
            raise ValueError(f"its {name} is {type(row[name]).__name__}, not text")
    if any(not isinstance(ref, (str, bytes, dict, Held, Drawn, Image.Image)) for ref in row["images"]):
        raise ValueError("its image is neither a path nor a picture")
    n = row["source"].count(IMAGE)
    if n == 0 and row["images"]:
        row["source"], n = IMAGE * len(row["images"]) + row["source"], len(row["images"])
    if n != len(row["images"]):
        raise ValueError(f"its source has {n} {IMAGE} and it has {len(row['images'])} pictures")
    return row


def load_picture_task(name, skip_bad=False, log=print):
    """The PictureTask of --data with its rows. Raises UserError for what is not there, cannot be reached or cannot be used."""
    kind, _, path = name.partition(":") if is_picture_task(name) else ("pictures", "", name)
    task = replace(TASKS[kind], name=kind, splits={})
    if task.drawn:
        if path:
            raise UserError(f"--data={name}: {kind} is drawn on the spot and takes no path")
        task.splits = picture_rows(kind)
        if READINGS.get(kind, kind) == "charts":
            draw_charts_once()
        if kind == "tables":
            task.others = tuple(text for row in picture_rows("charts", (500, 0, 0))["train"] for text in (row["source"].removeprefix(IMAGE), row["target"]))
        return task
    if path and not os.path.exists(path) and (kind != "pictures" or path.count("/") != 1 or path[0] in "./~" or os.path.splitext(path)[1]):
        raise UserError(f"--data={name}: no such file or folder, and no task with pictures ({', '.join(TASKS)})")
    if not path and not task.hub:
        raise UserError(f"--data={name} needs a path: --data={name}:FOLDER")
    read = task.read

    def many(record):
        try:
            return [check_row(row) for row in read(record)]
        except (AttributeError, LookupError) as error:  # a KeyError names its column
            raise error if isinstance(error, KeyError) else ValueError(f"it is not as {kind}'s are ({error})") from None
    found = from_path(path, task) if path and os.path.exists(path) else from_hub(path or task.hub, task)
    task.splits = {}
    for split, parts in found.items():
        try:
            task.splits[split] = [row for where, records in parts for row in rows_of(records, replace(task, read=many), where, skip_bad, log)]
        except UserError as error:
            if split != "test":
                raise
            log(f"test is left out, as its answers may be hidden: {error}")
    return hold_out(task, name, lambda row: repr(row["images"]))


# ---------------------------------------------------------------------------------------------------------------------
# Rows as batches

class PicturePairs(Pairs):
    """Pairs whose sources have pictures, each as long as its number of tokens. A source that is too long loses the end of its text, never part
    of a picture. `blank` shows an empty ground in the place of each. With skip_bad, rows whose pictures cannot be read, or take more than all the room, are left out; those whose
    pictures break only when they are unpacked are shown empty and noted in `bad`."""

    blank = False

    def __init__(self, rows, tokenizer, src_len, tgt_len, decoder_only, vision, skip_bad=False, log=print):
        self.vision, self.skip_bad, self.bad, room = vision, skip_bad, set(), src_len - 1 - decoder_only
        known, kept, self.sizes, self.n_tokens = {}, [], [], []
        for number, row in enumerate(tqdm(rows, desc="sizes of pictures", leave=False, disable=len(rows) < 20000), 1):
            try:
                for ref in row["images"]:
                    if id(ref) not in known:
                        known[id(ref)] = size_of(ref, named(ref, f"the picture of row {number}"))
                sizes = [known[id(ref)] for ref in row["images"]]
                counts = [n_tokens(*size, vision) for size in sizes]
                before = tokenizer.encode(row["source"].rpartition(IMAGE)[0].replace(IMAGE, "")) if not row["source"].startswith(IMAGE * len(counts)) else ()
                if sum(counts) + len(before) > room:
                    raise UserError(f"row {number}: its pictures are {sum(counts)} tokens, and --src_len={src_len} has no room for them: raise it, or take fewer with a smaller "
                                    "--grid or --tokens=variance")
            except UserError:
                if not skip_bad:
                    raise
                continue
            kept.append(row)
            self.sizes.append(sizes)
            self.n_tokens.append(counts)
        if len(kept) < len(rows):
            log(f"{len(rows) - len(kept)} of {len(rows)} rows have pictures that cannot be used and were left out")
        if not kept:
            raise UserError("no row has pictures that can be used")
        super().__init__(kept, tokenizer, src_len, tgt_len, decoder_only)

    def encode(self, rows):
        return encode_sources([row["source"] for row in rows], self.tokenizer, self.n_tokens)

    def describe(self):
        counts = [n for row in self.n_tokens for n in row]
        pictures = f"; {len(counts):,} pictures of {np.mean(counts):.0f} tokens on average, at most {max(counts)}" if counts else "; no pictures"
        return super().describe() + pictures

    def tiles(self):
        """How many inputs of the tower a row has, of at most 500 rows evenly spaced."""
        some = self.sizes[::max(1, len(self) // 500)]
        return [sum(1 + int(np.prod(layout(*size, self.vision).grid)) for size in sizes) for sizes in some]

    def background(self):
        """The middle value of each channel from 0 to 1, over at most 32 pictures: of drawings and documents, their ground. None without pictures."""
        rows = [row for row in range(0, len(self), max(1, len(self) // 32)) if self.sizes[row]][:32]
        pixels = [picture.tiles[0].reshape(-1, 3) for picture in self.pictures(rows)] if rows else []
        return (np.median(np.concatenate(pixels), axis=0) / 255).tolist() if pixels else None

    def pictures(self, rows):
        """The Pictures of these rows, in order."""
        return [self.picture(row, ref, size) for row in rows for ref, size in zip(self.rows[row]["images"], self.sizes[row])]

    def picture(self, row, ref, size):
        if self.blank or row in self.bad:
            return self.nothing(size)
        where = named(ref, f"the picture of row {row + 1}")
        try:
            image = load(ref, where)
            if image.size != size:
                raise UserError(f"{where} has changed: it is {image.size[0]} x {image.size[1]}, and was {size[0]} x {size[1]}")
        except UserError:
            if not self.skip_bad:
                raise
            self.bad.add(row)
            return self.nothing(size)
        return prepare_image(image, self.vision)

    def nothing(self, size):
        """A picture of this size that is zero to the tower."""
        return prepare_image(Image.new("RGB", size, tuple(round(255 * value) for value in self.vision.mean)), self.vision)

    def shown(self, model, rows):
        pictures = self.pictures(rows)
        return dict(images=model.see(pictures)[0]) if pictures else {}


def named(ref, where):
    """What a picture is called in messages."""
    return ref if isinstance(ref, str) else where
