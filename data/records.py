"""Files, folders and Hub data sets -> records, which are dicts. Needs no torch.

Tables (.csv, .tsv, .parquet) and the Hub are read by the `datasets` library. A task's JSON is
read here, a line at a time, so that a line that cannot be used has a number."""

import contextlib
import glob
import json
import os
import re
from dataclasses import dataclass
from typing import Any

from lib.settings import UserError, read_json

# What a file's ending says; anything else is plain text.
KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
PICTURES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")  # what rows name
SPLITS = dict(train="train", val="val", valid="val", validation="val", dev="val", test="test")


def is_hub_id(name):
    """Whether a name that is no path here may be a Hub data set: owner/name."""
    is_path = name.startswith((".", "/", "~")) or os.path.splitext(name)[1] in (*KINDS, ".txt")
    return name.count("/") == 1 and not is_path


def split_of(path):
    """The split that the words of a path tell, the first of them: train/a.jsonl, qa-test.jsonl;
    training data where they tell none."""
    words = re.split(r"[^a-z]+", path.lower())
    told = [SPLITS[word] for word in words if word in SPLITS]
    return told[0] if told else "train"


def split_files(path):
    """(split -> the files of a path, their kind)."""
    files = [path]
    if os.path.isdir(path):
        files = sorted(glob.glob(os.path.join(glob.escape(path), "**", "[!.]*"), recursive=True))
    files = [f for f in files if os.path.isfile(f) and not f.lower().endswith(PICTURES)]
    splits = {"train": files, "val": [], "test": []}
    if len(files) > 1:
        told = [split_of(os.path.relpath(f, path)) for f in files]
        splits = {split: [f for f, s in zip(files, told) if s == split] for split in splits}
    if not splits["train"]:
        raise UserError(f"--data={path}: no training files there")
    if not any(os.path.getsize(name) for name in splits["train"]):
        raise UserError(f"--data={path}: {'the file is' if len(files) == 1 else 'all are'} empty")
    kinds = {KINDS.get(os.path.splitext(name)[1].lower(), "text") for name in files}
    if len(kinds) > 1:
        raise UserError(f"--data={path}: keep one kind of files there, not {sorted(kinds)}")
    return splits, kinds.pop()


def read_text(path):
    """The text of a file as it stands, carriage returns included, a byte order mark left out."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (at byte {error.start})") from None


# ----------------------------------------------------------------------------------------------
# JSON


def json_records(path):
    """Records of a file: one a line; or a list of them, as LLaVA's; or a list under the key "data",
    as SQuAD's. A line that cannot be read gives the ValueError instead, an empty one None."""
    with open(path, "rb") as file:
        first = file.read(99).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]  # behind a BOM
    if first == b"[":
        return read_json(path, list, 2**32)
    if path.lower().endswith(".json"):
        rows = read_json(path, dict, 2**30).get("data")
        return rows if isinstance(rows, list) else []
    return json_lines(path)


def json_lines(path):
    with open(path, "rb") as file:
        for line in file:
            try:
                yield json.loads(line.decode("utf-8-sig")) if line.strip() else None
            except (ValueError, RecursionError) as error:  # 6,000 digits are a ValueError
                yield ValueError(f"no usable JSON, {type(error).__name__}")


# ----------------------------------------------------------------------------------------------
# Two files, line by line


def aligned_files(path, columns):
    """Pairs of files of a folder that differ in their endings alone, which are the columns."""
    files = glob.glob(os.path.join(glob.escape(path), "*.*"))
    stems = [{f.removesuffix(f".{c}") for f in files if f.endswith(f".{c}")} for c in columns]
    if stems[0] != stems[1]:
        alone = ", ".join(sorted(stems[0] ^ stems[1]))
        raise UserError(f"{alone} is not there as both .{columns[0]} and .{columns[1]}")
    pairs = [[f"{stem}.{column}" for column in columns] for stem in sorted(stems[0])]
    return [pair for pair in pairs if all(map(os.path.isfile, pair))]


def aligned_records(files, columns):
    texts = [read_text(path).removesuffix("\n").split("\n") for path in files]
    if len(texts[0]) != len(texts[1]):
        told = f"{files[0]} has {len(texts[0])} lines and {files[1]} has {len(texts[1])}"
        raise UserError(f"{told}: they must match line by line")
    return [dict(zip(columns, [line.rstrip("\r") for line in pair])) for pair in zip(*texts)]


# ----------------------------------------------------------------------------------------------
# The `datasets` library


def load_dataset(kind, files, columns=(), **options):
    """datasets.load_dataset of files, or of the Hub data set `kind` where there are none. The
    columns named are texts as they stand: "NA" and "42" too."""
    import datasets

    datasets.disable_progress_bars()
    if files:
        options["data_files"] = [glob.escape(file) for file in files]
    if files and kind in ("csv", "tsv"):
        options |= dict(keep_default_na=False, converters=dict.fromkeys(columns, str))
        options["sep"] = "," if kind == "csv" else "\t"
        kind = "csv"
    return datasets.load_dataset(kind, **options)


@contextlib.contextmanager
def in_one_line(kind, files):
    """The errors of `datasets` and of the readers behind it, which are of many kinds."""
    try:
        yield
    except Exception as error:
        why = (str(error.__cause__ or error).splitlines() or [""])[0][:300]
        if files:
            raise UserError(f"{' or '.join(files[:9])} could not be read: {why}") from None
        raise UserError(
            f"{kind} is no path here, and as a Hub data set it could not be loaded "
            f"({type(error).__name__}); give the path of a local copy: --data=PATH, or "
            "--data=TASK:PATH for a task"
        ) from None


def stream(kind, files, columns=()):
    """Records of files of one kind, or of the training split of the Hub data set `kind`."""
    with in_one_line(kind, files):
        yield from load_dataset(kind, files, columns, split="train", streaming=True)


def tables(kind, files=None):
    """split -> records, their pictures as Held."""
    with in_one_line(kind, files):
        found = load_dataset(kind, files)
    return {SPLITS[split]: records_in(part) for split, part in found.items() if split in SPLITS}


def records_in(part):
    import datasets

    names = [name for name, kind in part.features.items() if isinstance(kind, datasets.Image)]
    for name in names:
        part = part.cast_column(name, datasets.Image(decode=False))
    for number, record in enumerate(part.remove_columns(names)):
        yield record | {name: Held(part, name, number) for name in names}


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


def local_records(path, columns):
    """(split, file, records) of each file of a path, or of each pair of line-aligned files."""
    if pairs := aligned_files(path, columns):
        for pair in pairs:
            split = split_of(os.path.basename(pair[0])) if len(pairs) > 1 else "train"
            yield split, pair[0], aligned_records(pair, columns)
        return
    splits, kind = split_files(path)
    if kind == "text":
        raise UserError(
            f"--data={path}: rows come as .jsonl, .json, .csv, .tsv or .parquet, or as two "
            "line-aligned files in a folder: NAME.en and NAME.de with --source_col=en "
            "--target_col=de"
        )
    for split, file in [(split, file) for split, files in splits.items() for file in files]:
        records = json_records(file) if kind == "json" else stream(kind, [file], columns)
        if kind == "parquet":  # with pictures
            records = tables(kind, [file])["train"]
        yield split, file, records
