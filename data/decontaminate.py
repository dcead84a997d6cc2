"""Keeps evaluation rows out of a pretraining corpus, by the rule of Tulu 3 (Lambert et al., 2024): 8-grams. Needs no torch."""
import json
import os

from tqdm import tqdm

N, SHARE = 8, 0.5


def grams(text):
    """The 8-grams of a text's words (split at whitespace, lower case), in order."""
    words = text.lower().split()
    return [tuple(words[i:i + N]) for i in range(len(words) - N + 1)]


class Contamination:
    """Evaluation texts, by their 8-grams. Texts of fewer than 8 words have none and cannot be looked for: `short` counts them."""

    def __init__(self, texts):
        self.texts, self.index, self.short = texts, {}, 0
        for number, text in enumerate(texts):
            found = grams(text)
            self.short += not found
            for place, gram in enumerate(found):
                self.index.setdefault(gram, []).append((number, place))

    def find(self, document):
        """The evaluation text of which more than half of the words lie in 8-grams that the document has too, with that
        share; None if there is none."""
        covered = {}
        for gram in set(grams(document)) & self.index.keys():
            for number, place in self.index[gram]:
                covered.setdefault(number, set()).update(range(place, place + N))
        shares = [(len(places) / len(self.texts[number].split()), number) for number, places in covered.items()]
        share, number = max(shares, default=(0, None))
        return (number, share) if share > SHARE else None


def clean(documents, contamination, folder, log):
    """The documents without those that contain an evaluation text; FOLDER/dropped.jsonl reports what went."""
    total = dropped = 0
    path = os.path.join(folder, "dropped.jsonl")
    try:
        with open(path, "w", encoding="utf-8") as report:
            for total, text in enumerate(tqdm(documents, desc="decontaminating", unit=" documents"), 1):
                if found := contamination.find(text):
                    dropped += 1
                    report.write(json.dumps(dict(document=total, share=round(found[1], 3), evaluation=contamination.texts[found[0]][:200], begins=text[:200])) + "\n")
                else:
                    yield text
    finally:  # also where no more documents are asked for
        log(f"decontaminated against {len(contamination.texts):,} evaluation texts ({contamination.short:,} of them shorter than {N} words, which cannot "
            f"be looked for): {dropped:,} of {total:,} documents dropped, see {path}")
