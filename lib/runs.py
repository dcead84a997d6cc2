"""The files of a run folder: what produced it, its log and plot, its checkpoint. Needs torch only
for checkpoints."""

import contextlib
import glob
import json
import os
import platform
import shutil
import sys
import tempfile

from lib.settings import UserError, read_json

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
UNFINISHED = ".new-"  # how the names of files begin that are still being written


@contextlib.contextmanager
def replacing(path):
    """Every file of this project is written through this one door. Yields a fresh name in the same
    folder, which mkstemp opens with O_EXCL and O_NOFOLLOW; what was written there takes the place
    of `path` at once and whole, even of a symbolic link. After an error it is removed."""
    folder, name = os.path.split(os.path.abspath(path))
    handle, new = tempfile.mkstemp(prefix=UNFINISHED, suffix=f"-{name}", dir=folder)
    os.close(handle)
    try:
        yield new
        with open(new, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(new, 0o644)  # mkstemp's files are for their owner alone
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(new)
        raise


def write_json(path, value):
    with replacing(path) as new, open(new, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)


@contextlib.contextmanager
def locked(folder):
    """Holds a folder for this process; UserError where another one has it. A killed process leaves
    no lock behind, and the files that it left unfinished are removed here."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    handle = os.open(os.path.join(folder, ".lock"), flags, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"{folder} is in use by another process: wait for it or stop it") from None
    try:
        for path in glob.glob(os.path.join(glob.escape(folder), UNFINISHED + "*")):
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
        yield
    finally:
        os.close(handle)


def free_folder(name, chosen):
    """`name` itself, which must be empty if the user has `chosen` it; else the first free one of
    name, name-2, name-3."""
    number, free = 1, name
    while glob.glob(os.path.join(glob.escape(free), "*")):
        if chosen:
            raise UserError(
                f"--out={name} is not empty: go on with --init_from=resume, or choose another"
            )
        number += 1
        free = f"{name}-{number}"
    return free


def write_run(folder, settings, corpus, **more):
    """Makes the folder, writes run.json, and copies the source that runs into source/. `corpus` is
    the hash of the data, by which a resumed run knows that it is still the same."""
    for name in [*glob.glob("*.py", root_dir=ROOT), *glob.glob("[dl]*/*.py", root_dir=ROOT)]:
        target = os.path.join(folder, "source", name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with replacing(target) as new:
            shutil.copyfile(os.path.join(ROOT, name), new)
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    about = dict(command=sys.argv, settings=settings, corpus=corpus)
    about |= dict(python=platform.python_version(), machine=machine, **more)
    write_json(os.path.join(folder, "run.json"), about)


def read_run(folder):
    """What run.json holds: "settings", "corpus" and more. UserError if the folder is no run."""
    path = os.path.join(folder, "run.json")
    if not os.path.exists(path):
        raise UserError(f"{path} is missing: {folder} is no run folder")
    about = read_json(path)
    settings = about.get("settings")
    if type(settings) is not dict or type(settings.get("objective")) is not str:
        raise UserError(f"{path} is damaged or was not written by this project")
    return about


def newest_run():
    runs = glob.glob(os.path.join("out", "*", "model.safetensors"))
    if not runs:
        raise UserError(
            "there is no run in out/ yet: python train.py --arch=encdec makes one in minutes, "
            "or name one with --run"
        )
    return os.path.dirname(max(runs, key=os.path.getmtime))


# ----------------------------------------------------------------------------------------------
# Checkpoints


def save_model(folder, model, weights="model.safetensors", **metadata):
    """model.save into a fresh folder beside, then each file takes its place at once and whole."""
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder) as new:
        model.save(new, weights, **metadata)
        for name in os.listdir(new):
            with open(os.path.join(new, name), "rb+") as file:
                os.fsync(file.fileno())
            os.replace(os.path.join(new, name), os.path.join(folder, name))


def save_checkpoint(folder, model, optimizers, state):
    """Writes train_state.pt, from which a run is resumed: weights, optimizers and `state`, whole or
    not at all. Then model.safetensors with the same weights, which everything else loads."""
    import torch

    state = dict(state, model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers])
    with explained(folder, state["step"]):
        with replacing(os.path.join(folder, "train_state.pt")) as new:
            torch.save(state, new)
        save_model(folder, model, step=str(state["step"]))


def load_checkpoint(folder):
    """What save_checkpoint wrote: the dict `state` with "model" and "optimizers" added."""
    import torch

    path = os.path.join(folder, "train_state.pt")
    if not os.path.isfile(path):
        raise UserError(f"{folder} has no checkpoint to resume from (train_state.pt is missing)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["step"], state["model"], state["optimizers"]
        return state
    except Exception:  # pickle, zipfile and torch raise their own kinds
        raise UserError(f"{path} cannot be read: it is truncated or was altered") from None


def save_best(folder, model, step):
    """Writes best.safetensors, which Transformer.load prefers to the last weights."""
    with explained(folder, step):
        save_model(folder, model, "best.safetensors", step=str(step))


@contextlib.contextmanager
def explained(folder, step):
    try:
        yield
    except Exception as error:  # OSError, or what torch and safetensors make of one
        raise UserError(
            f"saving step {step} to {folder} failed ({str(error).splitlines()[0]}): free some "
            "space, then go on from the last checkpoint with --init_from=resume"
        ) from None


def is_better(new, best, metric):
    """Whether an evaluation beats the best one so far. Ties go to the lower loss: a metric that
    stays at zero must not keep the first weights."""
    if best is None:
        return True
    return (new[metric], -new["val_loss"]) > (best[metric], -best["val_loss"])


# ----------------------------------------------------------------------------------------------
# log.jsonl and loss.png


class Log:
    """One JSON object a line. Resuming drops the lines written after the checkpoint, and lines that
    a kill cut off."""

    def __init__(self, folder, step):
        self.folder, self.rows = folder, []
        path = os.path.join(folder, "log.jsonl")
        if os.path.isfile(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                self.rows = [row for row in map(log_row, file) if row]
        self.rows = [row for row in self.rows if row["step"] < step + ("val_loss" in row)]
        with replacing(path) as new, open(new, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.rows)
        self.file = open(path, "a", encoding="utf-8")  # our own plain file, since the line above

    def add(self, row):
        row = {key: round_off(value) for key, value in row.items()}
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def plot(self, metric=None):
        """loss.png. With the name of a metric that evaluations have: its curve, on its own axis."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 4))
        for key, label in (("loss", "training"), ("kd", "divergence"), ("val_loss", "held out")):
            points = [(row["step"], row[key]) for row in self.rows if key in row]
            if points:
                style = "o-" if key == "val_loss" else "-"
                axes.plot(*zip(*points), style, ms=3, lw=0.8, label=label)
        axes.set(xlabel="step", ylabel="loss, nats a target token")
        axes.grid(alpha=0.3)
        if scored := [(row["step"], row[metric]) for row in self.rows if metric in row]:
            right = axes.twinx()
            right.plot(*zip(*scored), "s-", ms=4, color="tab:green")
            right.set(ylabel=metric, ylim=(0, 100))
        if axes.lines:
            axes.legend(loc="center right")
        figure.tight_layout()
        with replacing(os.path.join(self.folder, "loss.png")) as new:
            figure.savefig(new, dpi=120)
        plt.close(figure)


def log_row(line):
    """A line of log.jsonl as a dict with numbers alone; None for anything else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    usable = type(row) is dict and type(row.get("step")) is int
    return row if usable and all(type(x) in (int, float) for x in row.values()) else None


def round_off(value):
    return float(f"{value:.6g}") if isinstance(value, float) else value
