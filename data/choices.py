"""Multiple-choice questions for scoring pretrained runs by likelihood: MMLU and ARC, from the Hub or a local copy. Needs no torch."""
import os

from lib.settings import UserError
from data.tasks import json_lines

CHOICES = {"mmlu": ("cais/mmlu", "all"), "arc_easy": ("allenai/ai2_arc", "ARC-Easy"), "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge")}


def is_choice(name):
    return name.split(":")[0] in CHOICES


def read_choice(record):
    """A record of MMLU (choices is a list, answer a number) or ARC (choices has text and label, answerKey is a label) ->
    (question, choices, number of the right one)."""
    if "answerKey" in record:
        choices, answer = record["choices"]["text"], list(record["choices"]["label"]).index(record["answerKey"])
    else:
        choices, answer = record["choices"], int(record["answer"])
    if not all(isinstance(text, str) for text in (record["question"], *choices)) or not 0 <= answer < len(choices):
        raise ValueError("question and choices must be texts, and the answer one of them")
    return record["question"], list(choices), answer


def load_choices(name, split="test"):
    """The questions of --data=mmlu, arc_easy, arc_challenge, or NAME:PATH of a local .jsonl or .parquet with the same columns."""
    import datasets
    kind, _, path = name.partition(":")
    if path and not os.path.isfile(path):
        raise UserError(f"--data={name}: no such file")
    try:
        if path.endswith(".parquet"):
            records = datasets.load_dataset("parquet", data_files=[path], split="train")
        elif path:
            records = list(json_lines(path))
        else:
            records = datasets.load_dataset(*CHOICES[kind], split={"val": "validation"}.get(split, split))
    except Exception as error:  # no network, or what the reader behind `datasets` raises
        if path:
            raise UserError(f"{path} cannot be read ({type(error).__name__})") from None
        raise UserError(f"the Hub data set {CHOICES[kind][0]} could not be reached ({type(error).__name__}); to use a local copy, pass its "
                        f"path: --data={kind}:FILE") from None
    questions = []
    for number, record in enumerate(records, 1):
        if record is None:  # an empty line
            continue
        try:
            if isinstance(record, ValueError):
                raise record
            questions.append(read_choice(record))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"--data={name}: row {number} is no multiple-choice question ({type(error).__name__}: {error})") from None
    if not questions:
        raise UserError(f"--data={name}: there are no questions")
    return questions
