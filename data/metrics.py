"""How answers are scored: each function takes predictions and rows of a task, and returns percentages. Needs no torch."""
import collections
import re
import string

from data.cli import UserError


def words_f1(prediction, reference):
    """F1 of two lists of words, as bags: 1 where both are empty, 0 where one is (SQuAD 2.0's rule for no answer)."""
    if not prediction or not reference:
        return float(prediction == reference)
    same = sum((collections.Counter(prediction) & collections.Counter(reference)).values())
    return 2 * same / (len(prediction) + len(reference))


def rouge(predictions, references):
    """Mean F1 of ROUGE-1, -2 and -L, with stemming, as XSum is scored (the rouge-score package)."""
    from rouge_score.rouge_scorer import RougeScorer
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = [scorer.score(reference, prediction) for prediction, reference in zip(predictions, references)]
    names = dict(rouge_l="rougeL", rouge_1="rouge1", rouge_2="rouge2")
    return {name: mean(score[key].fmeasure for score in scores) for name, key in names.items()}


def bleu(predictions, references, tokenize):
    import sacrebleu
    return sacrebleu.corpus_bleu(predictions, [references], tokenize=tokenize, force=True).score


def mean(values):
    """Mean in percent."""
    values = list(values)
    return 100 * sum(values) / max(1, len(values))


def exact(predictions, references):
    return mean(" ".join(p.split()) == " ".join(r.split()) for p, r in zip(predictions, references))


def targets(rows):
    return [row["target"] for row in rows]


def score_text(predictions, rows):
    return dict(**rouge(predictions, targets(rows)), exact=exact(predictions, targets(rows)))


def score_translation(predictions, rows):
    """BLEU as sacrebleu computes it by default (13a, cased)."""
    return dict(bleu=bleu(predictions, targets(rows), "13a"), exact=exact(predictions, targets(rows)))


def score_code(predictions, rows):
    """CodeXGLUE's: BLEU on words split at whitespace, and exact match."""
    split = [[" ".join(text.split()) for text in texts] for texts in (predictions, targets(rows))]
    return dict(bleu=bleu(*split, "none"), exact=exact(*split), **rouge(*split))


def squad_words(text):
    """SQuAD's normalization: lower case, no punctuation, no articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def score_squad(predictions, rows):
    """SQuAD 2.0's exact match and F1, the best over a question's answers; a question without an answer is right when
    the prediction is empty. has_ans_f1 and no_ans_f1 are over the questions of either kind."""
    ems, f1s = [], []
    for prediction, row in zip(predictions, rows):
        said = [] if prediction.strip() == UNANSWERABLE else squad_words(prediction)
        golds = [squad_words(answer) for answer in row["answers"]] or [[]]
        ems.append(max(float(said == gold) for gold in golds))
        f1s.append(max(words_f1(said, gold) for gold in golds))
    kinds = dict(has_ans_f1=[f for f, row in zip(f1s, rows) if row["answers"]], no_ans_f1=[f for f, row in zip(f1s, rows) if not row["answers"]])
    return dict(f1=mean(f1s), exact=mean(ems), **{name: mean(values) for name, values in kinds.items() if values},
                rouge_l=rouge(predictions, targets(rows))["rouge_l"])


def score_names(predictions, rows):
    """exact: the share of all names that stand right at their place; f1: of a row's names as a bag, mean over rows."""
    pairs = [(prediction.split(), row["target"].split()) for prediction, row in zip(predictions, rows)]
    right = sum(p == r for said, names in pairs for p, r in zip(said, names))
    return dict(f1=mean(words_f1(*pair) for pair in pairs), exact=100 * right / max(1, sum(len(names) for _, names in pairs)))


UNANSWERABLE = "unanswerable"  # what a model is taught to say where a SQuAD 2.0 question has no answer


def score(task, predictions, rows):
    """All metrics of a task. The first one is the task's own: it decides which checkpoint is the best."""
    if len(predictions) != len(rows):
        raise UserError(f"there are {len(predictions)} predictions for {len(rows)} references: they must be the same rows")
    if not rows:
        raise UserError("there is nothing to score: no rows")
    return {name: round(value, 3) for name, value in task.score(predictions, rows).items()}
