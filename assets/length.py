"""Sources longer than a model was trained on: RoPE's base stretched (NTK-aware, as model.py does
it), positions squeezed instead (linear), or neither. The paper's section 3.1.

    python assets/length.py --run=RUN,RUN2 [--windows=256,512,1024,2048] [--rows=256]

For each run of train.py on text: nats a token of the last 63 tokens of held-out windows, given all
before them. A longer window of a text holds the same last tokens: only how much is read before them
differs.
"""

import json
import os
import sys
from dataclasses import dataclass
from types import SimpleNamespace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

import model as lm
from bench import continuation_loss, numbers, table
from data.corpus import prepare
from data.sets import TextSet
from lib.device import start
from lib.runs import read_run
from lib.settings import UserError, read_settings, script, setting


@dataclass
class Settings:
    run: str = setting("", "run folders, separated by commas")
    windows: str = setting("256,512,1024,2048", "tokens read before the answer")
    rows: int = setting(256, "held-out windows", low=1)
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = setting("auto", "of matrix products", ("auto", "float32", "bfloat16"))
    threads: int = setting(0, "CPU threads; 0 is torch's choice", high=4096)
    seed = 1337  # lib.device.start wants one; nothing is drawn here


stretched, tables = lm.stretch_of, lm.rope_tables


def squeezed(positions, cfg, stretch=1.0):
    """rope_tables of positions that are squeezed into the trained length."""
    return tables(positions / stretch, cfg)


KINDS = dict(
    ntk=(stretched, tables),
    linear=(stretched, squeezed),
    none=(lambda lengths, longest, trained: 1.0, tables),
)


def main():
    cfg = read_settings(Settings, __doc__)
    world, rows = start(cfg), []
    windows, after = numbers(cfg, "windows"), 63
    if not cfg.run:
        raise UserError("--run is missing: runs of train.py on text, separated by commas")
    for run in [run.rstrip("/") for run in cfg.run.split(",")]:
        about = SimpleNamespace(**read_run(run)["settings"])
        if about.objective == "seq2seq" or not hasattr(about, "max_tokens"):
            raise UserError(f"--run={run} is no run of train.py on text")
        model = world.place(lm.Transformer.load(run, device=world.device)).eval()
        corpus = prepare(about.data, f"{run}/", log=world.say, most=about.max_tokens)
        valid_set = TextSet(corpus, "val", about)
        last = len(valid_set.tokens) - after
        if last < max(windows):
            raise UserError(f"{run}: its held-out text is shorter than --windows={cfg.windows}")
        starts = np.linspace(max(windows), last, cfg.rows).astype(int)
        for kind, (lm.stretch_of, lm.rope_tables) in KINDS.items():
            row = dict(run=os.path.basename(run), rope=kind)
            for n in windows:
                loss = continuation_loss(model, valid_set, about, starts, (n, after), world)
                row[str(n)] = round(loss, 4)
            rows.append(row)
            print(json.dumps(row), file=sys.stderr)
    table(f"nats a token, {cfg.rows} windows; tokens read before it", rows)


if __name__ == "__main__":
    script(main)
