"""How answers are scored: each score_* takes predictions and rows of a task, and returns
percentages. Needs no torch."""

import collections
import re
import string

from lib.settings import UserError

UNANSWERABLE = "unanswerable"  # what is said where a SQuAD 2.0 question has no answer


def score(task, predictions, rows):
    """All metrics of a task. The first one decides which checkpoint is the best. All tasks have
    `exact`, those with pictures `rouge_lsum`, which the paper's table 3 shows."""
    if len(predictions) != len(rows):
        raise UserError(f"there are {len(predictions)} predictions for {len(rows)} references")
    if not rows:
        raise UserError("there is nothing to score: no rows")
    found = task.score(predictions, rows)
    found.setdefault("exact", exact(predictions, targets(rows)))
    if "images" in rows[0]:
        found |= rouge(predictions, targets(rows), rouge_lsum="rougeLsum")
    return {name: round(value, 3) for name, value in found.items()}


def mean(values):
    """Mean in percent."""
    values = list(values)
    return 100 * sum(values) / max(1, len(values))


def targets(rows):
    return [row["target"] for row in rows]


def answers_of(row):
    """All right answers: data sets of questions about pictures have several."""
    return row.get("answers") or [row["target"]]


def one_line(text):
    return " ".join(text.split())


def exact(predictions, references):
    return mean(one_line(p) == one_line(r) for p, r in zip(predictions, references))


def rouge(predictions, references, **kinds):
    """Mean F1 with stemming, as XSum is scored; kinds: our name=the rouge-score package's name. Its
    words are of a-z and 0-9: texts of other scripts score 0."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(kinds.values()), use_stemmer=True)
    scores = [scorer.score(r, p) for p, r in zip(predictions, references)]
    return {name: mean(score[kind].fmeasure for score in scores) for name, kind in kinds.items()}


def bleu(predictions, references, tokenize):
    import sacrebleu

    return sacrebleu.corpus_bleu(predictions, [references], tokenize=tokenize, force=True).score


def words_f1(prediction, reference):
    """F1 of two lists of words, as bags: 1 where both are empty, 0 where one is (SQuAD 2.0's rule
    for no answer)."""
    if not prediction or not reference:
        return float(prediction == reference)
    same = sum((collections.Counter(prediction) & collections.Counter(reference)).values())
    return 2 * same / (len(prediction) + len(reference))


# ----------------------------------------------------------------------------------------------
# Texts


def score_plain(predictions, rows):
    return dict(exact=exact(predictions, targets(rows)))


ROUGE = dict(rouge_l="rougeL", rouge_1="rouge1", rouge_2="rouge2")


def score_text(predictions, rows):
    return rouge(predictions, targets(rows), **ROUGE)


def score_translation(predictions, rows):
    """BLEU as sacrebleu computes it by default (13a, cased)."""
    return dict(bleu=bleu(predictions, targets(rows), "13a"))


def score_code(predictions, rows):
    """CodeXGLUE's: BLEU on words split at whitespace, and exact match."""
    lines = [[one_line(text) for text in texts] for texts in (predictions, targets(rows))]
    return dict(bleu=bleu(*lines, "none"), exact=exact(*lines)) | rouge(*lines, **ROUGE)


def plain_words(text):
    """SQuAD's normalization: lower case, no punctuation, no articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def score_squad(predictions, rows):
    """SQuAD 2.0's exact match and F1, the best over a question's answers; a question without an
    answer is right when the prediction is empty. has_ans_f1 and no_ans_f1 are over the questions of
    either kind."""
    ems, f1s = [], []
    for prediction, row in zip(predictions, rows):
        said = [] if prediction.strip() == UNANSWERABLE else plain_words(prediction)
        golds = [plain_words(answer) for answer in row["answers"]] or [[]]
        ems.append(max(float(said == gold) for gold in golds))
        f1s.append(max(words_f1(said, gold) for gold in golds))
    found = dict(f1=mean(f1s), exact=mean(ems))
    for name, has in (("has_ans_f1", True), ("no_ans_f1", False)):
        if some := [f1 for f1, row in zip(f1s, rows) if bool(row["answers"]) == has]:
            found[name] = mean(some)
    return found | rouge(predictions, targets(rows), rouge_l="rougeL")


def score_names(predictions, rows):
    """exact: the share of all names that stand right at their place; f1: of a row's names as a bag,
    mean over rows."""
    pairs = [(p.split(), r.split()) for p, r in zip(predictions, targets(rows))]
    right = sum(p == r for said, names in pairs for p, r in zip(said, names))
    n_names = sum(len(names) for _, names in pairs)
    return dict(f1=mean(words_f1(*pair) for pair in pairs), exact=100 * right / max(1, n_names))


# ----------------------------------------------------------------------------------------------
# Questions about pictures


def edits(a, b):
    """Levenshtein distance: the fewest characters to insert, delete or change."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def score_reading(predictions, rows):
    """The share of characters that stand right: 1 - edits over the reference's length, at least
    0."""
    pairs = zip(predictions, targets(rows))
    return dict(characters=mean(max(0.0, 1 - edits(p, r) / max(1, len(r))) for p, r in pairs))


def similarity(a, b):
    a, b = one_line(a.lower()), one_line(b.lower())
    distance = edits(a, b) / max(1, len(a), len(b))
    return 1 - distance if distance < 0.5 else 0.0


def score_anls(predictions, rows):
    """Average normalized Levenshtein similarity (Biten et al., 2019), DocVQA's: of the nearest
    answer, 0 where half of the characters or more differ."""
    pairs = zip(predictions, rows)
    return dict(anls=mean(max(similarity(p, a) for a in answers_of(row)) for p, row in pairs))


def number(text):
    """A number as charts write it ("1,204", "12.5%"); None for what is none."""
    text = text.strip().replace(",", "")
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if abs(value) < float("inf") else None


def relaxed(prediction, target):
    """ChartQA's (Masry et al., 2022): a number may be off by 5%, a text must be the same but for
    its case."""
    said, right = number(prediction), number(target)
    if said is None or right is None:
        return one_line(prediction.lower()) == one_line(target.lower())
    return abs(said - right) <= 0.05 * abs(right)


def score_relaxed(predictions, rows):
    """relaxed, over all rows and, where they have a `kind`, over those of each."""
    right = [relaxed(p, r) for p, r in zip(predictions, targets(rows))]
    found = dict(relaxed=mean(right))
    for kind in sorted({row["kind"] for row in rows if "kind" in row}):
        found[f"relaxed_{kind}"] = mean(r for r, row in zip(right, rows) if row.get("kind") == kind)
    return found


def score_worked(predictions, rows):
    """score_relaxed and exact of what stands after the last "=", where there is one."""
    said = [text.rpartition("=")[2].strip() for text in predictions]
    rows = [row | dict(target=row["target"].rpartition("=")[2].strip()) for row in rows]
    return score_relaxed(said, rows) | dict(exact=exact(said, targets(rows)))


def score_vqa(predictions, rows):
    """VQA accuracy (Antol et al., 2015): an answer that three people gave is right, one that fewer
    did in part; the mean over all choices of nine of the ten. Texts are compared by SQuAD's
    normalization, which is simpler than the official one."""

    def right(said, answers):
        same = [plain_words(answer) == plain_words(said) for answer in answers]
        if len(same) == 1:
            return float(same[0])
        return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(same)

    return dict(vqa=mean(right(p, answers_of(row)) for p, row in zip(predictions, rows)))
