"""How answers are scored: each function takes predictions and rows of a task, and returns
percentages. Needs no torch."""

import collections
import re
import string

from lib.settings import UserError


def words_f1(prediction, reference):
    """F1 of two lists of words, as bags: 1 where both are empty, 0 where one is (SQuAD 2.0's rule
    for no answer)."""
    if not prediction or not reference:
        return float(prediction == reference)
    same = sum((collections.Counter(prediction) & collections.Counter(reference)).values())
    return 2 * same / (len(prediction) + len(reference))


def rouge(predictions, references):
    """Mean F1 of ROUGE-1, -2 and -L, with stemming, as XSum is scored (the rouge-score package)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = [
        scorer.score(reference, prediction)
        for prediction, reference in zip(predictions, references)
    ]
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


def score_plain(predictions, rows):
    return dict(exact=exact(predictions, targets(rows)))


def score_translation(predictions, rows):
    """BLEU as sacrebleu computes it by default (13a, cased)."""
    return dict(
        bleu=bleu(predictions, targets(rows), "13a"), exact=exact(predictions, targets(rows))
    )


def score_code(predictions, rows):
    """CodeXGLUE's: BLEU on words split at whitespace, and exact match."""
    split = [[" ".join(text.split()) for text in texts] for texts in (predictions, targets(rows))]
    return dict(bleu=bleu(*split, "none"), exact=exact(*split), **rouge(*split))


def squad_words(text):
    """SQuAD's normalization: lower case, no punctuation, no articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def score_squad(predictions, rows):
    """SQuAD 2.0's exact match and F1, the best over a question's answers; a question without an
    answer is right when the prediction is empty. has_ans_f1 and no_ans_f1 are over the questions of
    either kind."""
    ems, f1s = [], []
    for prediction, row in zip(predictions, rows):
        said = [] if prediction.strip() == UNANSWERABLE else squad_words(prediction)
        golds = [squad_words(answer) for answer in row["answers"]] or [[]]
        ems.append(max(float(said == gold) for gold in golds))
        f1s.append(max(words_f1(said, gold) for gold in golds))
    kinds = dict(
        has_ans_f1=[f for f, row in zip(f1s, rows) if row["answers"]],
        no_ans_f1=[f for f, row in zip(f1s, rows) if not row["answers"]],
    )
    return dict(
        f1=mean(f1s),
        exact=mean(ems),
        **{name: mean(values) for name, values in kinds.items() if values},
        rouge_l=rouge(predictions, targets(rows))["rouge_l"],
    )


def score_names(predictions, rows):
    """exact: the share of all names that stand right at their place; f1: of a row's names as a bag,
    mean over rows."""
    pairs = [
        (prediction.split(), row["target"].split()) for prediction, row in zip(predictions, rows)
    ]
    right = sum(p == r for said, names in pairs for p, r in zip(said, names))
    return dict(
        f1=mean(words_f1(*pair) for pair in pairs),
        exact=100 * right / max(1, sum(len(names) for _, names in pairs)),
    )


# ----------------------------------------------------------------------------------------------
# Of questions about pictures


def rouge_lsum(predictions, references):
    """ROUGE-Lsum, what the paper's table 3 shows: the longest common subsequences line by line,
    their union scored."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeLsum"], use_stemmer=True)
    return mean(
        scorer.score(reference, prediction)["rougeLsum"].fmeasure
        for prediction, reference in zip(predictions, references)
    )


def score_exact(predictions, rows):
    return dict(
        exact=exact(predictions, targets(rows)), rouge_lsum=rouge_lsum(predictions, targets(rows))
    )


def edits(a, b):
    """Levenshtein distance: the fewest characters to insert, delete or change."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def score_reading(predictions, rows):
    """exact, and the share of characters that stand right (1 - edits over the reference's length,
    at least 0)."""
    right = mean(
        max(0.0, 1 - edits(p, r) / max(1, len(r))) for p, r in zip(predictions, targets(rows))
    )
    return dict(
        rouge_lsum=rouge_lsum(predictions, targets(rows)),
        exact=exact(predictions, targets(rows)),
        characters=right,
    )


def score_anls(predictions, rows):
    """Average normalized Levenshtein similarity (Biten et al., 2019), DocVQA's: of the nearest
    answer, 0 where over half of the characters differ."""

    def similarity(a, b):
        a, b = " ".join(a.lower().split()), " ".join(b.lower().split())
        distance = edits(a, b) / max(1, len(a), len(b))
        return 1 - distance if distance < 0.5 else 0.0

    return dict(
        anls=mean(
            max(similarity(p, answer) for answer in row.get("answers") or [row["target"]])
            for p, row in zip(predictions, rows)
        ),
        exact=exact(predictions, targets(rows)),
        rouge_lsum=rouge_lsum(predictions, targets(rows)),
    )


def number(text):
    """A number as charts write it ("1,204", "12.5%"); None for what is none."""
    text = text.strip().replace(",", "")
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if value == value and abs(value) != float("inf") else None


def relaxed(prediction, target):
    """ChartQA's (Masry et al., 2022): a number may be off by 5%, a text must be the same but for
    its case."""
    said, right = number(prediction), number(target)
    if said is None or right is None or right == 0:
        return " ".join(prediction.lower().split()) == " ".join(target.lower().split()) or (
            said is not None and said == right
        )
    return abs(said - right) <= 0.05 * abs(right)


def score_relaxed(predictions, rows):
    """relaxed, over all rows and, where they have a `kind`, over those of each; exact."""
    right = [relaxed(p, r) for p, r in zip(predictions, targets(rows))]
    kinds = sorted({row["kind"] for row in rows if "kind" in row})
    return dict(
        relaxed=mean(right),
        exact=exact(predictions, targets(rows)),
        rouge_lsum=rouge_lsum(predictions, targets(rows)),
        **{
            f"relaxed_{kind}": mean(r for r, row in zip(right, rows) if row.get("kind") == kind)
            for kind in kinds
        },
    )


def score_worked(predictions, rows):
    """score_relaxed of what stands after the last "=", where there is one."""
    return score_relaxed(
        [text.rpartition("=")[2].strip() for text in predictions],
        [row | dict(target=row["target"].rpartition("=")[2].strip()) for row in rows],
    )


CONTRACTIONS = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
how'll how's i'd i'm i've isn't it'd it'll let's ma'am might've mightn't must've mustn't needn't
not've o'clock oughtn't shan't she's should've shouldn't somebody's someone's something's that'd
that's there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll
what're what's what've when's where'd where's where've who'd who'll who's who've why'll why're
why's won't would've wouldn't y'all you'd you'll you're you've
""".split()
CONTRACTIONS = {word.replace("'", ""): word for word in CONTRACTIONS}
DIGITS = dict(
    zip(
        "none zero one two three four five six seven eight nine ten".split(),
        "0 0 1 2 3 4 5 6 7 8 9 10".split(),
    )
)


def vqa_words(text):
    """The VQA evaluation's normalization: no punctuation, lower case, digits for small numbers, no
    articles. Its rules are kept where they are odd: a number with a comma takes all other marks
    with it, and a full stop stays only in front of a digit."""
    text = " ".join(text.split())
    number, plain = re.search(r"\d,\d", text), text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        plain = plain.replace(
            mark, "" if number or f"{mark} " in text or f" {mark}" in text else " "
        )
    words = [DIGITS.get(word, word) for word in re.sub(r"\.(?!\d)", "", plain).lower().split()]
    return " ".join(
        CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the")
    )


def score_vqa(predictions, rows):
    """VQA accuracy (Antol et al., 2015): an answer that three people gave is right, one that fewer
    did in part; the mean over all choices of nine of the ten."""

    def right(prediction, answers):
        said, same = vqa_words(prediction), [vqa_words(answer) for answer in answers]
        if len(same) == 1:
            return float(said == same[0])
        same = [said == answer for answer in same]
        return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(same)

    return dict(
        vqa=mean(
            right(p, row.get("answers") or [row["target"]]) for p, row in zip(predictions, rows)
        ),
        exact=exact(predictions, targets(rows)),
        rouge_lsum=rouge_lsum(predictions, targets(rows)),
    )


# what a model is taught to say where a SQuAD 2.0 question has no answer
UNANSWERABLE = "unanswerable"


def score(task, predictions, rows):
    """All metrics of a task. The first one is the task's own: it decides which checkpoint is the
    best."""
    if len(predictions) != len(rows):
        raise UserError(f"there are {len(predictions)} predictions for {len(rows)} references")
    if not rows:
        raise UserError("there is nothing to score: no rows")
    return {name: round(value, 3) for name, value in task.score(predictions, rows).items()}
