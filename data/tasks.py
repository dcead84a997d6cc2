"""Tasks: rows of a source and a target, where they come from, how they read, how they are scored. Needs no torch.

`--data` names a task (its rows come from the Hub, or from this machine), TASK:PATH (the same rows from a local copy), or
any data set with --source_col and --target_col: a .jsonl, .csv or .parquet file, a folder of them, a Hub id, or two
line-aligned files, whose extensions are the columns (train.en, train.de, val.en, val.de: --source_col=en --target_col=de).

A row is a dict with `source` and `target`, and for SQuAD `question`, `context` and `answers`.
"""
import ast
import glob
import hashlib
import inspect
import json
import os
import re
import textwrap
import warnings
from dataclasses import dataclass, field, replace
from typing import Callable

from tqdm import tqdm

import data.corpus
from data import metrics
from lib.settings import UserError
from data.corpus import open_rows, python_files, split_files

VAL_EVERY = 20  # where a data set brings no held-out split, every 20th row is held out


@dataclass
class Task:
    about: str
    score: Callable                            # of data/metrics.py
    hub: str | None = None                     # where its rows lie on the Hub
    columns: tuple = ("source", "target")      # of its source and its target; --source_col and --target_col turn it round
    read: Callable | None = None               # record of the data set -> row; default: the two columns
    extract: Callable | None = None            # text of a Python file -> rows: the rows come from this machine's own source
    name: str = ""
    splits: dict = field(default_factory=dict)  # train, val and perhaps test -> list of rows


# ---------------------------------------------------------------------------------------------------------------------
# Built in: what Python source gives

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
        if ast.get_docstring(node) is None or len(node.body) < 2 or node.body[1].lineno <= doc.end_lineno or doc.lineno <= node.lineno:
            continue
        sentence = re.split(r"(?<=[.!?])\s", " ".join(inspect.cleandoc(doc.value.value).split("\n\n")[0].split()))[0]
        body = lines[node.lineno - 1:doc.lineno - 1] + lines[doc.end_lineno:node.end_lineno]
        if 3 <= len(sentence.split()) <= 40:
            yield dict(source=textwrap.dedent("\n".join(body)), target=sentence)


def own_names(node):
    """Parameters and assigned names of a function in the order in which they are first bound, self and cls left out. What is bound in other ways
    (except ... as, imports, nested functions' names) keeps its name."""
    names, foreign = {}, {"self", "cls"}
    for part in ast.walk(node):
        if isinstance(part, (ast.Global, ast.Nonlocal)):
            foreign.update(part.names)
        elif isinstance(part, ast.arg) or isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            name, place = part.arg if isinstance(part, ast.arg) else part.id, (part.lineno, part.col_offset)
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
    """A function whose parameters and local names became v0, v1, ... -> those names in order. Docstrings and comments, which
    would give them away, go. Functions inside of it are renamed with it and are no rows of their own."""
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
    """The rows of a built-in task. Files are split as the corpora pycode and pycode-full split them, what those hold out in
    two halves, val and test; a source that stands in another file already is dropped. Cached."""
    files = python_files(full)
    source = [inspect.getsource(part) for part in (functions, own_names, Rename, extract)]
    key = json.dumps([3, name, source, [file["sha256"] for file in files]])
    path = os.path.join(data.corpus.CACHE, f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.jsonl")
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        seen = set()
        with open(path + ".new", "w", encoding="utf-8") as out:
            for file in tqdm(sorted(files, key=lambda file: file["split"]), desc=f"{name}: reading Python files", unit=" files"):
                half = "val" if int(file["sha256"][8:16], 16) % 2 else "test"
                with open(file["path"], encoding="utf-8") as f:
                    rows = list(extract(f.read()))
                for row in rows:
                    if row["source"] not in seen:
                        seen.add(row["source"])
                        out.write(json.dumps(dict(row, split="train" if file["split"] == "train" else half)) + "\n")
        os.replace(path + ".new", path)
    splits = {"train": [], "val": [], "test": []}
    with open(path, encoding="utf-8") as f:
        for line in f:
            row = json.loads(line)
            splits[row.pop("split")].append(row)
    return splits


# ---------------------------------------------------------------------------------------------------------------------
# Records of a data set -> rows

def read_squad(record):
    """SQuAD 1.1 and 2.0, as the Hub has it and as its own JSON does."""
    answers = record["answers"]
    answers = answers["text"] if isinstance(answers, dict) else [answer["text"] for answer in answers]
    if not all(isinstance(text, str) for text in (record["question"], record["context"], *answers)):
        raise ValueError("its question, context and answers must be texts")
    return dict(source=f"question: {record['question']} context: {record['context']}",
                target=answers[0] if answers else metrics.UNANSWERABLE,
                question=record["question"], context=record["context"], answers=list(answers))


def squad_records(path):
    """The questions in SQuAD's own JSON, flattened to the Hub's columns."""
    try:
        with open(path, encoding="utf-8") as f:
            articles = json.load(f)["data"]
        for article in articles:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield dict(question=question["question"], context=paragraph["context"],
                               answers=[] if question.get("is_impossible") else question["answers"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not SQuAD's JSON ({type(error).__name__}: {error})") from None


def json_lines(path):
    """Records of a .jsonl file; a line that cannot be read gives the ValueError instead, an empty one None."""
    with open(path, "rb") as f:
        for line in f:
            if not line.strip():
                yield None
                continue
            try:
                record = json.loads(line.decode("utf-8"))
                yield record if isinstance(record, dict) else ValueError("not a JSON object")
            except UnicodeDecodeError:
                yield ValueError("not UTF-8")
            except json.JSONDecodeError as error:
                yield ValueError(f"not JSON: {error.msg}")


def text_lines(path):
    with open(path, "rb") as f:
        for line in f.read().removesuffix(b"\n").split(b"\n"):
            try:
                yield line.decode("utf-8").rstrip("\r")
            except UnicodeDecodeError:
                yield ValueError("not UTF-8")


def aligned(files, columns):
    """Records of two files, line by line."""
    texts = [list(text_lines(path)) for path in files]
    if len(texts[0]) != len(texts[1]):
        raise UserError(f"{files[0]} has {len(texts[0])} lines and {files[1]} has {len(texts[1])}: they must match line by line")
    for pair in zip(*texts):
        bad = [value for value in pair if isinstance(value, ValueError)]
        yield bad[0] if bad else dict(zip(columns, pair))


def rows_of(records, task, where, skip_bad, log):
    """Reads records into rows. Rows that cannot be used are named, or with skip_bad counted and left out."""
    rows, bad, known = [], [], set()
    for number, record in enumerate(records, 1):
        if record is None:
            continue
        try:
            if isinstance(record, ValueError):
                raise record
            known.update(record)
            found = task.read(record) if task.read else dict(zip(("source", "target"), (record[column] for column in task.columns)))
            found = found if isinstance(found, list) else [found]
            for row, name in ((row, name) for row in found for name in ("source", "target")):
                if not isinstance(row[name], str):
                    raise ValueError(f"its {name} is {type(row[name]).__name__}, not text")
                if not row[name].strip():
                    raise ValueError(f"its {name} is empty")
                try:
                    row[name].encode()
                except UnicodeEncodeError:
                    raise ValueError(f"its {name} holds half of a character (a lone surrogate)") from None
            rows += found
        except KeyError as error:
            bad.append((number, f"column {error} is missing"))
        except (ValueError, TypeError) as error:
            bad.append((number, str(error)))
    if bad and len(bad) == number and known and not task.read and not set(task.columns) <= known:
        raise UserError(f"{where} has the columns {', '.join(sorted(known))}, not {' and '.join(task.columns)}: choose with "
                        "--source_col and --target_col")
    if bad and not skip_bad:
        lines = ", ".join(str(number) for number, _ in bad[:3])
        raise UserError(f"{where}: {len(bad)} of {number} rows cannot be used, the first {'is' if len(bad) == 1 else 'are'} {lines} "
                        f"({bad[0][1]}); mend them, or leave them out with --skip_bad=true")
    if bad:
        log(f"{where}: {len(bad)} of {number} rows cannot be used and were left out, the first ones: {', '.join(str(n) for n, _ in bad[:3])}")
    return rows


def hub_records(name, task):
    """split -> records of a Hub data set."""
    import datasets
    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # no network, no such data set: the library and those below it raise their own kinds
        raise UserError(f"the Hub data set {name} could not be reached ({type(error).__name__}); to use a local copy, pass its path: "
                        f"--data={task + ':' if task else ''}PATH") from None
    names = {"train": "train", "validation": "val", "valid": "val", "dev": "val", "test": "test"}
    return {names[split]: found[split] for split in found if split in names}


def local_records(path, task):
    """split -> [(where, records)] of a local file or folder."""
    files = [f for f in sorted(glob.glob(os.path.join(glob.escape(path), "*"))) if os.path.isfile(f)]
    sides = [[f for f in files if f.endswith("." + column)] for column in task.columns]
    if any(sides):
        stems = [{os.path.splitext(os.path.basename(f))[0] for f in side} for side in sides]
        if stems[0] != stems[1]:
            raise UserError(f"{path}: {', '.join(sorted(stems[0] ^ stems[1]))} is there as .{task.columns[0]} or .{task.columns[1]}, not as both")
        names = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
        if len(stems[0]) > 1 and not stems[0] & names.keys():
            raise UserError(f"{path}: none of {', '.join(sorted(stems[0]))} tells by its name that it is train, val or test")
        pairs = [(names.get(stem, "train"), [os.path.join(path, f"{stem}.{column}") for column in task.columns]) for stem in sorted(stems[0])
                 if stem in names or len(stems[0]) == 1]
        return {split: [(pair[0], aligned(pair, task.columns))] for split, pair in pairs}
    splits, kind = split_files(path)
    found = {}
    for split, files in splits.items():
        for file in files:
            if kind == "json" and task.read is read_squad and file.endswith(".json"):
                records = squad_records(file)
            elif kind == "json":
                records = json_lines(file)
            elif kind == "csv":
                records = open_rows(kind, [file], keep_default_na=False, converters=dict.fromkeys(task.columns, str))  # "None" and "42" are texts like any other
            elif kind == "parquet":
                records = open_rows(kind, [file])
            else:
                raise UserError(f"--data={path}: a task's rows come as .jsonl, .csv, .parquet or two line-aligned files NAME.{task.columns[0]} and "
                                f"NAME.{task.columns[1]} in a folder (choose with --source_col and --target_col)")
            found.setdefault(split, []).append((file, records))
    return found


def is_task(name):
    """Whether --data names a task, so that --objective=seq2seq goes without saying."""
    return name.split(":")[0] in TASKS


def load_task(name, source_col=None, target_col=None, say=print, skip_bad=False):
    """The Task of --data with its rows. Raises UserError for what is not there, cannot be reached or cannot be used."""
    kind, _, path = name.partition(":") if is_task(name) else ("", "", name)
    task = replace(TASKS[kind or "pairs"], name=kind or os.path.basename(path.rstrip("/")), splits={})
    task.columns = (source_col or task.columns[0], target_col or task.columns[1])
    if task.extract and path:
        raise UserError(f"--data={name}: {kind} is made from this machine's Python source and takes no path")
    if task.extract:
        task.splits = python_rows(kind, task.extract, full=kind.endswith("-full"))
        return task
    if path and not os.path.exists(path) and (kind or path.count("/") != 1 or path.startswith((".", "/", "~")) or
                                                os.path.splitext(path)[1] in (".jsonl", ".json", ".csv", ".parquet", ".txt")):
        raise UserError(f"--data={name}: no such file or folder{'' if kind else ', and no task (' + ', '.join(TASKS) + ')'}")
    if not path and not task.hub:
        raise UserError(f"--data={name} needs a path: --data={name}:FOLDER")
    if path and os.path.exists(path):
        found = local_records(path, task)
    else:
        found = {split: [(f"{path or task.hub}, {split}", records)] for split, records in hub_records(path or task.hub, kind).items()}
    task.splits = {split: [row for where, records in parts for row in rows_of(records, task, where, skip_bad, say)] for split, parts in found.items()}
    return hold_out(task, name)


def hold_out(task, name, group=None):
    """Sees to it that a task has rows to train on, and some that are held out. Rows of which group(row) is the same stay together."""
    if not task.splits.get("train"):
        raise UserError(f"--data={name}: there are no rows to train on")
    if not task.splits.get("val"):
        groups = {}
        for number, row in enumerate(task.splits["train"]):
            groups.setdefault(group(row) if group else number, []).append(row)
        groups = list(groups.values()) if len(groups) > 1 else [[row] for row in task.splits["train"]]
        every = min(VAL_EVERY, len(groups))
        task.splits["val"] = [row for rows in groups[every - 1::every] for row in rows]
        task.splits["train"] = [row for i, rows in enumerate(groups) if i % every != every - 1 for row in rows]
    if not task.splits["train"]:
        raise UserError(f"--data={name}: one row is too few, to train and to hold one out takes two")
    return task


def evaluation_texts(names):
    """Sources and targets of the held-out rows of tasks (`names`, separated by commas), for decontaminating a corpus."""
    texts = []
    for name in names.split(","):
        splits = load_task(name).splits
        rows = splits.get("val", []) + splits.get("test", [])
        texts += [row[side] for row in rows for side in ("source", "target")]
    return texts


TASKS = {
    "docstring": Task("a Python function -> the first sentence of its docstring", metrics.score_text, extract=docstring_rows),
    "names": Task("a Python function with its names replaced -> the names", metrics.score_names, extract=names_rows),
    "squad": Task("question and paragraph -> answer, or that there is none", metrics.score_squad, "rajpurkar/squad_v2", read=read_squad),
    "xsum": Task("news article -> one sentence", metrics.score_text, "EdinburghNLP/xsum", ("document", "summary")),
    "codexglue": Task("Java method -> C# method; --source_col=cs --target_col=java: back", metrics.score_code,
                      "google/code_x_glue_cc_code_to_code_trans", ("java", "cs")),
    "ielts": Task("essay question -> essay", metrics.score_text, "chillies/IELTS-writing-task-2-evaluation", ("prompt", "essay")),
    "translate": Task("one language -> another, scored by BLEU", metrics.score_translation),
    "pairs": Task("any data set with --source_col and --target_col", metrics.score_text),
}
TASKS |= {f"{name}-full": TASKS[name] for name in ("docstring", "names")}  # from pycode-full
