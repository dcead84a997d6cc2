"""Tasks: rows of a source and a target, where they come from, how they are scored. Needs no torch.

--data names a task of TASKS, whose rows are made here or come from the Hub; or TASK:PATH, the same
rows from a local copy; or, with --source_col and --target_col, any data set: a .jsonl, .json, .csv,
.tsv or .parquet file, a folder of them, a Hub id, or a folder of line-aligned files whose endings
are the columns: train.en, train.de, val.en, val.de with --source_col=en --target_col=de.

To add a task, add an entry to TASKS: its score of data/metrics.py, and where its rows come from. A
row is a dict with `source` and `target`, for SQuAD also `question`, `context` and `answers`, and
`images` where the source has pictures: data/picture_tasks.py has those tasks."""

import ast
import hashlib
import inspect
import json
import os
import random
import re
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import data.corpus
from data import metrics
from data.corpus import VAL_EVERY, python_files
from data.records import is_hub_id, local_records, tables
from lib.runs import replacing
from lib.settings import UserError, progress

IMAGE = "<image>"  # in a source: here stands a picture
SIDES = ("source", "target")


@dataclass
class Task:
    """Where rows come from: `make` gives the splits of what is built in. Other rows are made of the
    records of a data set by `read`, one or a list of each, or are two of their columns."""

    score: Callable  # of data/metrics.py
    hub: str | None = None  # where its records lie on the Hub
    columns: tuple = SIDES  # --source_col and --target_col turn it round
    read: Callable | None = None
    make: Callable | None = None
    name: str = ""
    splits: dict = field(default_factory=dict)  # train, val and perhaps test -> list of rows


# ----------------------------------------------------------------------------------------------
# Built in: words, and what Python source gives

WORDS = """
time year people way day man thing woman life child world school state family student group
country problem hand part place case week company system program question work night point home
water room mother area money story fact month lot right study book eye job word business issue
side kind head house service friend father power hour game line end member law car city
""".split()


def reversed_words():
    """The rows of `reverse`: three to eight words -> the same words from the last to the first."""
    rng, found = random.Random(0), {}
    while len(found) < 4400:
        words = rng.sample(WORDS, rng.randint(3, 8))
        found[" ".join(words)] = " ".join(reversed(words))
    rows = [dict(source=source, target=target) for source, target in found.items()]
    return dict(train=rows[:4000], val=rows[4000:4200], test=rows[4200:])


def functions(text):
    """(lines, node) of every function in a Python file; none if it does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes in other people's strings
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return
    lines = text.split("\n")
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield lines, node


def docstring_rows(text):
    """A function without its docstring -> the docstring's first sentence."""
    for lines, node in functions(text):
        if ast.get_docstring(node) is None or len(node.body) < 2:
            continue
        doc, rest = node.body[:2]
        if rest.lineno <= doc.end_lineno or doc.lineno <= node.lineno:  # it shares a line
            continue
        paragraph = inspect.cleandoc(doc.value.value).split("\n\n")[0]
        sentence = re.split(r"(?<=[.!?])\s", " ".join(paragraph.split()))[0]
        body = lines[node.lineno - 1 : doc.lineno - 1] + lines[doc.end_lineno : node.end_lineno]
        if 3 <= len(sentence.split()) <= 40:
            yield dict(source=textwrap.dedent("\n".join(body)), target=sentence)


def own_names(node):
    """Parameters and assigned names of a function in the order in which they are first bound, self
    and cls left out. What is bound in other ways (except ... as, imports, nested functions' names)
    keeps its name."""
    places, foreign = {}, {"self", "cls"}
    for part in ast.walk(node):
        if isinstance(part, (ast.Global, ast.Nonlocal)):
            foreign.update(part.names)
            continue
        if isinstance(part, ast.arg):
            name = part.arg
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            name = part.id
        else:
            continue
        places.setdefault(name, []).append((part.lineno, part.col_offset))
    return sorted(places.keys() - foreign, key=lambda name: min(places[name]))


class Rename(ast.NodeTransformer):
    def __init__(self, new):
        self.new = new

    def visit_Name(self, node):
        node.id = self.new.get(node.id, node.id)
        return node

    def visit_arg(self, node):
        node.arg = self.new.get(node.arg, node.arg)
        return node


def names_rows(text):
    """A function whose parameters and local names became v0, v1, ... -> those names in order.
    Its docstring and all comments, which would give them away, go. Functions inside of it are
    renamed with it, keep their docstrings and are no rows of their own."""
    for _, node in functions(text):
        names = own_names(node)
        if not 2 <= len(names) <= 12 or any(re.fullmatch(r"v\d+", name) for name in names):
            continue
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        source = ast.unparse(Rename({name: f"v{i}" for i, name in enumerate(names)}).visit(node))
        if len(source) <= 2000:
            yield dict(source=source, target=" ".join(names))


def python_rows(extract, full):
    """The splits of a task that extract(text of a Python file) gives. Files are split as the
    corpora pycode and pycode-full split them, what those hold out in two halves, val and test; a
    source that stands in another file already is dropped. Cached."""
    files = sorted(python_files(full), key=lambda about: about["split"])
    code = [inspect.getsource(part) for part in (functions, own_names, Rename, extract)]
    key = json.dumps([5, code, [about["sha256"] for about in files]])
    name = f"{extract.__name__}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.jsonl"
    path = os.path.join(data.corpus.CACHE, name)
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with replacing(path) as new, open(new, "w", encoding="utf-8") as out:
            seen = set()
            for about in progress(files, "reading Python files"):
                half = "val" if int(about["sha256"][8:16], 16) % 2 else "test"
                split = "train" if about["split"] == "train" else half
                with open(about["path"], encoding="utf-8") as file:
                    rows = list(extract(file.read()))
                for row in rows:
                    if row["source"] not in seen:
                        seen.add(row["source"])
                        out.write(json.dumps(dict(row, split=split)) + "\n")
    splits = {"train": [], "val": [], "test": []}
    with open(path, encoding="utf-8") as file:
        for row in map(json.loads, file):
            splits[row.pop("split")].append(row)
    return splits


# ----------------------------------------------------------------------------------------------
# Records of a data set -> rows


def read_squad(record):
    """The row of a question as the Hub has it, or the rows of an article of SQuAD's own JSON."""
    if "paragraphs" in record:
        parts = [(part["context"], qa) for part in record["paragraphs"] for qa in part["qas"]]
        return [read_squad(qa | dict(context=context)) for context, qa in parts]
    answers = [] if record.get("is_impossible") else record["answers"]
    answers = answers["text"] if isinstance(answers, dict) else [a["text"] for a in answers]
    question, context = record["question"], record["context"]
    if not all(isinstance(text, str) for text in (question, context, *answers)):
        raise ValueError("its question, context and answers must be texts")
    target = answers[0] if answers else metrics.UNANSWERABLE
    row = dict(source=f"question: {question} context: {context}", target=target)
    return row | dict(question=question, context=context, answers=list(answers))


def check_row(row, folder):
    """The row, with the paths of its pictures counted from `folder`; ValueError for one that cannot
    be used."""
    if "images" in row:
        row = place_pictures(row, folder)
    for name in SIDES:
        if not isinstance(row[name], str):
            raise ValueError(f"its {name} is {type(row[name]).__name__}, not text")
        if not row[name].strip():
            raise ValueError(f"its {name} is empty")
        row[name].encode()  # a UnicodeEncodeError, of half a character, is a ValueError
    return row


def place_pictures(row, folder):
    """The row with an IMAGE for each of its pictures, in front where the source has none."""
    images, source = row["images"], row["source"]
    if any(not isinstance(ref, str) and not hasattr(ref, "load") for ref in images):
        raise ValueError("its image is neither a path nor a picture")
    if IMAGE not in source:
        source = IMAGE * len(images) + source
    if (n := source.count(IMAGE)) != len(images):
        raise ValueError(f"its source has {n} {IMAGE} and it has {len(images)} pictures")
    images = [os.path.join(folder, ref) if isinstance(ref, str) else ref for ref in images]
    return row | dict(source=source, images=images)


def rows_of(records, task, where):
    """Reads records into rows. UserError naming the first rows that cannot be used."""
    rows, bad, known, number = [], [], set(), 0
    for number, record in enumerate(records, 1):
        if record is None:
            continue
        try:
            if isinstance(record, ValueError):  # of a line that could not be read
                raise record
            if not isinstance(record, dict):
                raise ValueError(f"it is a {type(record).__name__}, not an object")
            known.update(map(str, record))
            if task.read:
                found = task.read(record)
            else:
                found = {name: record[key] for name, key in zip(SIDES, task.columns)}
            for row in found if isinstance(found, list) else [found]:
                rows.append(check_row(row, os.path.dirname(where)))
        except KeyError as error:
            bad.append((number, f"column {error} is missing"))
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            bad.append((number, str(error)[:200]))
    if known and len(bad) == number and not task.read and not set(task.columns) <= known:
        raise UserError(
            f"{where} has the columns {', '.join(sorted(known))}, not "
            f"{' and '.join(task.columns)}: choose with --source_col and --target_col"
        )
    if bad:
        first = ", ".join(str(number) for number, _ in bad[:3])
        raise UserError(
            f"{where}: {len(bad)} of {number} rows cannot be used, the first are {first} "
            f"({bad[0][1]}): mend or remove them"
        )
    return rows


def is_task(name):
    """Whether --data names a task, so that --objective=seq2seq goes without saying."""
    return name.split(":")[0] in TASKS


def load_task(name, source_col=None, target_col=None, say=print):
    """The Task of --data with its rows. UserError for what is not there or cannot be used."""
    kind, _, path = name.partition(":") if is_task(name) else ("pairs", "", name)
    task = replace(TASKS[kind], name=kind, splits={})
    if kind == "pairs":
        task.name = os.path.basename(path.rstrip("/"))
    task.columns = (source_col or task.columns[0], target_col or task.columns[1])
    return fill(task, name, path, say)


def fill(task, name, path, say, hub_splits=("train", "val", "test")):
    """The task with the rows of its splits, from `path` if there is one."""
    if task.make:
        if path:
            raise UserError(f"--data={name}: {task.name} is made on this machine, without a path")
        task.splits = task.make()
        return task
    hub = path or task.hub
    if not hub:
        raise UserError(f"--data={name} needs a path: --data={name}:FOLDER")
    if path and os.path.exists(path):
        parts = local_records(path, task.columns)
    elif is_hub_id(hub):
        found = tables(hub).items()
        parts = [(split, f"{hub}, {split}", part) for split, part in found if split in hub_splits]
    else:
        raise UserError(f"--data={name}: no such file or folder, and no task of this script")
    for split, where, records in parts:
        task.splits.setdefault(split, []).extend(rows_of(records, task, where))
    return hold_out(task, name, say)


def hold_out(task, name, say):
    """Sees to it that a task has rows to train on, and some that are held out; rows on the same
    pictures stay together. Counts the rows that stand on both sides."""
    splits = task.splits
    if not splits.get("train"):
        raise UserError(f"--data={name}: there are no rows to train on")
    if not splits.get("val"):
        groups = {}
        for number, row in enumerate(splits["train"]):
            groups.setdefault(repr(row.get("images", number)), []).append(row)
        parts = list(groups.values())
        if len(parts) == 1:
            parts = [[row] for row in splits["train"]]
        every = min(VAL_EVERY, len(parts))
        splits["val"] = [row for part in parts[every - 1 :: every] for row in part]
        kept = [part for i, part in enumerate(parts) if i % every != every - 1]
        splits["train"] = [row for part in kept for row in part]
    if not splits["train"]:
        raise UserError(
            f"--data={name}: one row is too few, to train and to hold one out takes two"
        )
    known = {(row["source"], repr(row.get("images"))) for row in splits["train"]}
    both = sum((row["source"], repr(row.get("images"))) in known for row in splits["val"])
    if both:
        say(f"{task.name}: {both} of {len(splits['val'])} held-out sources are in train, too")
    return task


HUB_CODE = "google/code_x_glue_cc_code_to_code_trans"
HUB_IELTS = "chillies/IELTS-writing-task-2-evaluation"
TASKS = {
    "reverse": Task(metrics.score_plain, make=reversed_words),
    "docstring": Task(metrics.score_text, make=partial(python_rows, docstring_rows, False)),
    "docstring-full": Task(metrics.score_text, make=partial(python_rows, docstring_rows, True)),
    "names": Task(metrics.score_names, make=partial(python_rows, names_rows, False)),
    "names-full": Task(metrics.score_names, make=partial(python_rows, names_rows, True)),
    "squad": Task(metrics.score_squad, "rajpurkar/squad_v2", read=read_squad),
    "xsum": Task(metrics.score_text, "EdinburghNLP/xsum", ("document", "summary")),
    "codexglue": Task(metrics.score_code, HUB_CODE, ("java", "cs")),
    "ielts": Task(metrics.score_text, HUB_IELTS, ("prompt", "essay")),
    "translate": Task(metrics.score_translation),  # translate:FOLDER of line-aligned files
    "pairs": Task(metrics.score_text),  # any data set, by --source_col and --target_col
}
