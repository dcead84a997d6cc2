"""The files of a run folder that need no torch: its name, what produced it, its log and plot."""
import contextlib
import glob
import json
import os
import platform
import shutil
import sys

from lib.settings import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def free_folder(name, chosen):
    """`name` itself, which must not hold a run if the user has `chosen` it; else the first free of name, name-2, name-3 ..."""
    number, free = 1, name
    while glob.glob(os.path.join(glob.escape(free), "*")):
        if chosen:
            raise UserError(f"--out={name} is not empty: go on with --init_from=resume, or choose another folder")
        number += 1
        free = f"{name}-{number}"
    return free


def record(folder, settings, versions, **more):
    """Writes run.json (command, settings, versions) and copies the source that runs into source/."""
    for name in [*glob.glob("*.py", root_dir=ROOT), *glob.glob("data/*.py", root_dir=ROOT), *glob.glob("lib/*.py", root_dir=ROOT)]:
        target = os.path.join(folder, "source", name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copyfile(os.path.join(ROOT, name), target)
    versions = dict(python=platform.python_version(), machine=f"{platform.machine()}, {os.cpu_count()} cores", **versions)
    write_json(os.path.join(folder, "run.json"), dict(command=sys.argv, settings=settings, versions=versions, **more))


def read_record(folder):
    """What run.json holds; UserError if the folder is no run."""
    path = os.path.join(folder, "run.json")
    try:
        with open(path, encoding="utf-8") as f:
            values = json.load(f)
        values["settings"]["objective"]
        return values
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {folder} is no run folder") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} cannot be read: it is damaged or not written by this project") from None


def newest_run():
    runs = glob.glob(os.path.join("out", "*", "model.safetensors"))
    if not runs:
        raise UserError("there is no run in out/ yet: python train.py --arch=encdec makes one in minutes, or name one with --run")
    return os.path.dirname(max(runs, key=os.path.getmtime))


def write_json(path, value):
    """Writes a JSON file so that it is there whole or not at all."""
    with open(path + ".new", "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1)
    os.replace(path + ".new", path)


class Log:
    """log.jsonl and loss.png. Resuming drops the lines written after the checkpoint."""

    def __init__(self, folder, step):
        self.path, self.rows = os.path.join(folder, "log.jsonl"), []
        if os.path.exists(self.path):
            with open(self.path, encoding="utf-8") as f:
                for line in f:
                    with contextlib.suppress(json.JSONDecodeError):  # a line cut off by a kill
                        self.rows.append(json.loads(line))
        self.rows = [row for row in self.rows if row["step"] < step + ("val_loss" in row)]
        with open(self.path + ".new", "w", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n" for row in self.rows)
        os.replace(self.path + ".new", self.path)

    def add(self, row):
        row = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}
        self.rows.append(row)
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")

    def plot(self, metric=None):
        """loss.png; with the name of a metric that evaluations have, its curve too, on an axis of its own."""
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        figure, axes = plt.subplots(figsize=(7, 4))
        axes.plot(*zip(*[(r["step"], r["loss"]) for r in self.rows if "loss" in r]), lw=0.8, alpha=0.6, label="training")
        for name, label in (("cross_entropy", "its cross-entropy"), ("divergence", "its divergence from the teacher")):  # of distill.py
            if any(name in r for r in self.rows):
                axes.plot(*zip(*[(r["step"], r[name]) for r in self.rows if name in r]), lw=0.8, alpha=0.6, label=label)
        axes.plot(*zip(*[(r["step"], r["val_loss"]) for r in self.rows if "val_loss" in r]), "o-", ms=3, label="held out")
        axes.set(xlabel="step", ylabel="loss, nats a target token")
        axes.grid(alpha=0.3)
        if scored := [(r["step"], r[metric]) for r in self.rows if metric in r]:
            right = axes.twinx()
            right.plot(*zip(*scored), "s-", ms=4, color="tab:green", label=metric)
            right.set(ylabel=metric, ylim=(0, 100))
            axes.plot([], [], "s-", ms=4, color="tab:green", label=metric)
        axes.legend(loc="center right")
        figure.tight_layout()
        figure.savefig(os.path.join(os.path.dirname(self.path), "loss.png"), dpi=120)
        plt.close(figure)
