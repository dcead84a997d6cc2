"""Tasks: rows of a source and a target, where they come from, how they are scored. Needs no torch.

--data names a task of TASKS, whose rows come from this machine or the Hub; or TASK:PATH, the same
rows from a local copy; or, with --source_col and --target_col, any data set: a .jsonl, .csv, .tsv
or .parquet file, a folder of them, a Hub id, or two line-aligned files whose endings are the
columns: train.en, train.de, val.en, val.de with --source_col=en --target_col=de.

To add a task, add an entry to TASKS: what it asks, its score of data/metrics.py, and where its rows
come from. A row is a dict with `source` and `target`, and for SQuAD `question`, `context`,
`answers`."""

import ast
import glob
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

from tqdm import tqdm

import data.corpus
from data import metrics
from data.corpus import KINDS, open_rows, python_files, split_files
from lib.runs import replacing
from lib.settings import UserError, read_json

VAL_EVERY = 20  # where a data set brings no held-out split, every 20th row is held out
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"}
SPLITS |= {"test": "test"}


@dataclass
class Task:
    about: str
    score: Callable  # of data/metrics.py
    hub: str | None = None  # where its rows lie on the Hub
    columns: tuple = ("source", "target")  # --source_col and --target_col turn it round
    read: Callable | None = None  # record of the data set -> row; default: the two columns
    extract: Callable | None = None  # text of a Python file -> rows
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
        doc = node.body[0]
        if (
            ast.get_docstring(node) is None
            or len(node.body) < 2
            or node.body[1].lineno <= doc.end_lineno
            or doc.lineno <= node.lineno
        ):
            continue
        sentence = re.split(
            r"(?<=[.!?])\s", " ".join(inspect.cleandoc(doc.value.value).split("\n\n")[0].split())
        )[0]
        body = lines[node.lineno - 1 : doc.lineno - 1] + lines[doc.end_lineno : node.end_lineno]
        if 3 <= len(sentence.split()) <= 40:
            yield dict(source=textwrap.dedent("\n".join(body)), target=sentence)


def own_names(node):
    """Parameters and assigned names of a function in the order in which they are first bound, self
    and cls left out. What is bound in other ways (except ... as, imports, nested functions' names)
    keeps its name."""
    names, foreign = {}, {"self", "cls"}
    for part in ast.walk(node):
        if isinstance(part, (ast.Global, ast.Nonlocal)):
            foreign.update(part.names)
        elif (
            isinstance(part, ast.arg)
            or isinstance(part, ast.Name)
            and isinstance(part.ctx, ast.Store)
        ):
            name, place = (
                part.arg if isinstance(part, ast.arg) else part.id,
                (part.lineno, part.col_offset),
            )
            names[name] = min(names.get(name, place), place)
    return sorted(names.keys() - foreign, key=names.get)


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
    Docstrings and comments, which would give them away, go. Functions inside of it are renamed with
    it and are no rows of their own."""
    for _, node in functions(text):
        names = own_names(node)
        if not 2 <= len(names) <= 12 or any(re.fullmatch(r"v\d+", name) for name in names):
            continue
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        source = ast.unparse(Rename({name: f"v{i}" for i, name in enumerate(names)}).visit(node))
        if len(source) <= 2000:
            yield dict(source=source, target=" ".join(names))


def python_rows(name, extract, full):
    """The rows of a built-in task. Files are split as the corpora pycode and pycode-full split
    them, what those hold out in two halves, val and test; a source that stands in another file
    already is dropped. Cached."""
    files = python_files(full)
    code = [inspect.getsource(part) for part in (functions, own_names, Rename, extract)]
    key = json.dumps([4, name, code, [about["sha256"] for about in files]])
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    path = os.path.join(data.corpus.CACHE, f"{name}-{digest}.jsonl")
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with replacing(path) as new, open(new, "w", encoding="utf-8") as out:
            seen = set()
            in_order = sorted(files, key=lambda about: about["split"])
            for about in tqdm(in_order, f"{name}: reading Python files", mininterval=0.5):
                half = "val" if int(about["sha256"][8:16], 16) % 2 else "test"
                split = "train" if about["split"] == "train" else half
                with open(about["path"], encoding="utf-8") as file:
                    rows = [row for row in extract(file.read()) if row["source"] not in seen]
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
    """SQuAD 1.1 and 2.0, as the Hub has it and as its own JSON does."""
    answers = record["answers"]
    answers = (
        answers["text"] if isinstance(answers, dict) else [answer["text"] for answer in answers]
    )
    if not all(isinstance(text, str) for text in (record["question"], record["context"], *answers)):
        raise ValueError("its question, context and answers must be texts")
    return dict(
        source=f"question: {record['question']} context: {record['context']}",
        target=answers[0] if answers else metrics.UNANSWERABLE,
        question=record["question"],
        context=record["context"],
        answers=list(answers),
    )


def squad_records(path):
    """The questions in SQuAD's own JSON, flattened to the Hub's columns."""
    try:
        articles = read_json(path, most_bytes=2**30)["data"]
        for article in articles:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield dict(
                        question=question["question"],
                        context=paragraph["context"],
                        answers=[] if question.get("is_impossible") else question["answers"],
                    )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not SQuAD's JSON ({type(error).__name__}: {error})") from None


def json_lines(path):
    """Records of a .jsonl file. A line that cannot be read gives the ValueError instead, an empty
    one None."""
    with open(path, "rb") as file:
        for line in file:
            if not line.strip():
                yield None
                continue
            try:
                record = json.loads(line.decode("utf-8"))
                yield record if isinstance(record, dict) else ValueError("no JSON object")
            except (ValueError, RecursionError) as error:  # 6,000 digits are a ValueError
                yield ValueError(f"no usable JSON, {type(error).__name__}")


def text_lines(path):
    with open(path, "rb") as file:
        for line in file.read().removesuffix(b"\n").split(b"\n"):
            try:
                yield line.decode("utf-8").rstrip("\r")
            except UnicodeDecodeError:
                yield ValueError("not UTF-8")


def aligned(files, columns):
    """Records of two files, line by line."""
    texts = [list(text_lines(path)) for path in files]
    if len(texts[0]) != len(texts[1]):
        told = f"{files[0]} has {len(texts[0])} lines and {files[1]} has {len(texts[1])}"
        raise UserError(f"{told}: they must match line by line")
    for pair in zip(*texts):
        bad = [value for value in pair if isinstance(value, ValueError)]
        yield bad[0] if bad else dict(zip(columns, pair))


def check_row(row):
    for name in ("source", "target"):
        if not isinstance(row[name], str):
            raise ValueError(f"its {name} is {type(row[name]).__name__}, not text")
        if not row[name].strip():
            raise ValueError(f"its {name} is empty")
        row[name].encode()  # a UnicodeEncodeError, of half a character, is a ValueError


def rows_of(records, task, where):
    """Reads records into rows. UserError naming the first rows that cannot be used."""
    rows, bad, known, number = [], [], set(), 0
    for number, record in enumerate(records, 1):
        if record is None:
            continue
        try:
            if isinstance(record, ValueError):
                raise record
            known.update(map(str, record))
            if task.read:
                row = task.read(record)
            else:
                row = {side: record[key] for side, key in zip(("source", "target"), task.columns)}
            for one in row if isinstance(row, list) else [row]:
                check_row(one)
                rows.append(one)
        except KeyError as error:
            bad.append((number, f"column {error} is missing"))
        except (ValueError, TypeError) as error:
            bad.append((number, str(error)[:200]))
    if bad and len(bad) == number and not task.read and not set(task.columns) <= known:
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


def hub_records(name, task):
    """split -> records of a Hub data set."""
    import datasets

    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # no network, no such data set: the library raises its own kinds
        copy = f"{task}:PATH" if task else "PATH"
        raise UserError(
            f"the Hub data set {name} could not be reached ({type(error).__name__}); to use a "
            f"local copy, pass its path: --data={copy}"
        ) from None
    return {SPLITS[split]: found[split] for split in found if split in SPLITS}


def aligned_files(path, columns):
    """split -> the two files of a folder of line-aligned files; empty if there are none."""
    files = sorted(glob.glob(os.path.join(glob.escape(path), "*.*")))
    stems = []
    for column in columns:
        names = [os.path.basename(name) for name in files if name.endswith(f".{column}")]
        stems.append({os.path.splitext(name)[0] for name in names})
    if stems[0] != stems[1]:
        alone = ", ".join(sorted(stems[0] ^ stems[1]))
        raise UserError(f"{path}: {alone} is not there as both .{columns[0]} and .{columns[1]}")
    if len(stems[0]) > 1 and not stems[0] & SPLITS.keys():
        raise UserError(f"{path}: no name tells what is train, val or test: {sorted(stems[0])}")
    used = [stem for stem in sorted(stems[0]) if stem in SPLITS or len(stems[0]) == 1]
    place = {stem: [os.path.join(path, f"{stem}.{column}") for column in columns] for stem in used}
    return {SPLITS.get(stem, "train"): pair for stem, pair in place.items()}


def local_records(path, task):
    """split -> [(where, records)] of a local file or folder."""
    if pairs := aligned_files(path, task.columns):
        return {split: [(two[0], aligned(two, task.columns))] for split, two in pairs.items()}
    (splits, kind), found = split_files(path), {}
    for split, files in splits.items():
        for name in files:
            if kind == "json" and task.read is read_squad and name.endswith(".json"):
                records = squad_records(name)
            elif kind == "json":
                records = json_lines(name)
            elif kind != "text":
                records = open_rows(kind, [name], task.columns)
            else:
                raise UserError(
                    f"--data={path}: rows come as .jsonl, .csv, .tsv, .parquet or as two "
                    f"line-aligned files NAME.{task.columns[0]} and NAME.{task.columns[1]} in a "
                    "folder; choose with --source_col and --target_col"
                )
            found.setdefault(split, []).append((name, records))
    return found


def is_task(name):
    """Whether --data names a task, so that --objective=seq2seq goes without saying."""
    return name.split(":")[0] in TASKS


def load_task(name, source_col=None, target_col=None, say=print):
    """The Task of --data with its rows. UserError for what is not there or cannot be used."""
    kind, _, path = name.partition(":") if is_task(name) else ("", "", name)
    named = kind or os.path.basename(path.rstrip("/"))
    task = replace(TASKS[kind or "pairs"], name=named, splits={})
    task.columns = (source_col or task.columns[0], target_col or task.columns[1])
    if kind == "reverse":
        task.splits = reversed_words()
        return task
    if task.extract:
        if path:
            raise UserError(f"--data={name}: {kind} is made on this machine and takes no path")
        task.splits = python_rows(kind, task.extract, full=kind.endswith("-full"))
        return task
    if not path and not task.hub:
        raise UserError(f"--data={name} needs a path: --data={name}:FOLDER")
    if path and os.path.exists(path):
        found = local_records(path, task)
    else:
        is_path = path.startswith((".", "/", "~")) or os.path.splitext(path)[1] in (*KINDS, ".txt")
        if path and (kind or is_path or path.count("/") != 1):
            known = "" if kind else f", and no task ({', '.join(TASKS)})"
            raise UserError(f"--data={name}: no such file or folder{known}")
        splits = hub_records(path or task.hub, kind)
        found = {split: [(f"{path or task.hub}, {split}", rows)] for split, rows in splits.items()}
    for split, parts in found.items():
        task.splits[split] = [row for where, part in parts for row in rows_of(part, task, where)]
    return hold_out(task, name, say=say)


def hold_out(task, name, group=None, say=print):
    """Sees to it that a task has rows to train on, and some that are held out; rows of which
    group(row) is the same stay together. Counts the rows that stand on both sides."""
    splits = task.splits
    if not splits.get("train"):
        raise UserError(f"--data={name}: there are no rows to train on")
    if not splits.get("val"):
        groups = {}
        for number, row in enumerate(splits["train"]):
            groups.setdefault(group(row) if group else number, []).append(row)
        parts = list(groups.values())
        parts = parts if len(parts) > 1 else [[row] for row in splits["train"]]
        every = min(VAL_EVERY, len(parts))
        splits["val"] = [row for part in parts[every - 1 :: every] for row in part]
        kept = [part for i, part in enumerate(parts) if i % every != every - 1]
        splits["train"] = [row for part in kept for row in part]
    if not splits["train"]:
        raise UserError(
            f"--data={name}: one row is too few, to train and to hold one out takes two"
        )
    if group is None:
        known = {row["source"] for row in splits["train"]}
        both = sum(row["source"] in known for row in splits["val"])
        if both:
            say(f"{task.name}: {both} of {len(splits['val'])} held-out sources are in train, too")
    return task


HUB_CODE = "google/code_x_glue_cc_code_to_code_trans"
HUB_IELTS = "chillies/IELTS-writing-task-2-evaluation"
TASKS = {
    "reverse": Task("words -> the same words backwards", metrics.score_plain),
    "docstring": Task("function -> docstring", metrics.score_text, extract=docstring_rows),
    "names": Task("function -> its names", metrics.score_names, extract=names_rows),
    "squad": Task("question -> answer", metrics.score_squad, "rajpurkar/squad_v2", read=read_squad),
    "xsum": Task(
        "article -> line", metrics.score_text, "EdinburghNLP/xsum", ("document", "summary")
    ),
    "codexglue": Task("Java -> C#", metrics.score_code, HUB_CODE, ("java", "cs")),
    "ielts": Task("question -> essay", metrics.score_text, HUB_IELTS, ("prompt", "essay")),
    "translate": Task("one language -> another", metrics.score_translation),
    "pairs": Task("any data set with --source_col and --target_col", metrics.score_text),
}
TASKS |= {f"{name}-full": TASKS[name] for name in ("docstring", "names")}  # from pycode-full
