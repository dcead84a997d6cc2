"""The files of a run folder: what produced it, its log and plot, its checkpoint. Needs torch only
for checkpoints."""

import contextlib
import dataclasses
import glob
import json
import os
import platform
import shutil
import sys
import tempfile

from lib.settings import UserError, from_dict, given, read_json

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


def lock_folder(folder, wait=False):
    """Holds a folder for this process until the returned file is closed. Where another process has
    it: UserError, or `wait` for it. A killed process leaves no lock behind, and the files that it
    left unfinished are removed here."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    file = os.fdopen(os.open(os.path.join(folder, ".lock"), flags, 0o644), "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise UserError(f"{folder} is in use by another process: wait for it or stop it") from None
    for path in glob.glob(os.path.join(glob.escape(folder), UNFINISHED + "*")):
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    return file


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


def new_run(name, cfg, world, train_set, valid_set, **more):
    """Makes the folder of a new run, --out or one in out/ by this name, and returns it: run.json,
    the tokenizer, sample rows, and the source that runs."""
    folder = None
    if world.rank == 0:
        folder = free_folder(cfg.out or os.path.join("out", name), cfg.out is not None)
        os.makedirs(folder, exist_ok=True)
        world.lock = lock_folder(folder)
        write_run(folder, dataclasses.asdict(cfg), f"{train_set.hash} {valid_set.hash}", **more)
        train_set.tokenizer.save(folder)
        write_json(os.path.join(folder, "samples.json"), valid_set.samples())
    return world.agree(folder)


def restore(folder, model, optimizers, train_set, valid_set, world):
    """Puts a checkpoint into model and optimizers and returns its state. UserError where the data
    is not what the run was begun with: it could not go on as if it had never stopped."""
    if world.rank == 0:
        world.lock = lock_folder(folder)
    if read_run(folder).get("corpus") != f"{train_set.hash} {valid_set.hash}":
        raise UserError(
            f"the data has changed since {folder} was begun, or lies on another machine: it "
            "cannot be resumed exactly"
        )
    state = load_checkpoint(folder)
    try:
        model.load_state_dict(state.pop("model"))
        for optimizer, saved in zip(optimizers, state.pop("optimizers"), strict=True):
            optimizer.load_state_dict(saved)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}/train_state.pt does not fit the run ({error})"[:300]) from None
    return state


def write_run(folder, settings, corpus, **more):
    """run.json, and source/, a copy of the code. `corpus` is the hash of the data."""
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


def resumed(cfg, free):
    """The settings of the run in cfg.out, with what the command line may change: the keys `free`.
    UserError for another key that differs."""
    if not cfg.out:
        raise UserError("--init_from=resume needs --out=FOLDER of the run")
    old = from_dict(type(cfg), read_run(cfg.out)["settings"], f"{cfg.out}/run.json")
    for name in given():
        value, was = getattr(cfg, name), getattr(old, name)
        if name not in free and value != was:
            raise UserError(
                f"--{name}={value} differs from the {was} that {cfg.out} was begun with; drop it, "
                f"or begin a new run from its weights with --init_from={cfg.out}"
            )
        setattr(old, name, value)
    if old.tokenizer not in ("bpe", "gpt2", "bytes"):
        old.tokenizer = cfg.out  # its copy: the file it came from may be gone
    return old


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


def save_checkpoint(folder, model, optimizers, state, world):
    """Writes train_state.pt, from which a run is resumed: weights, optimizers and `state`, whole or
    not at all. Then model.safetensors with the same weights, which everything else loads."""
    import torch

    if world.rank > 0:
        return
    state = dict(state, model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers])
    try:
        with replacing(os.path.join(folder, "train_state.pt")) as new:
            torch.save(state, new)
        save_model(folder, model, step=str(state["step"]))
    except Exception as error:  # OSError, or what torch and safetensors make of one
        raise UserError(
            f"saving step {state['step']} to {folder} failed ({str(error).splitlines()[0]}): free "
            "some space, then go on from the last checkpoint with --init_from=resume"
        ) from None


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


def save_best(folder, model, step, world):
    """Writes best.safetensors, which Transformer.load prefers to the last weights."""
    if world.rank == 0:
        save_model(folder, model, "best.safetensors", step=str(step))


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
    a kill cut off. Only the first process writes."""

    def __init__(self, folder, step, world):
        self.folder, self.rows, self.quiet = folder, [], world.rank > 0
        if self.quiet:
            return
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
        if self.quiet:
            return
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def plot(self, metric=None):
        """loss.png. With the name of a metric that evaluations have: its curve, on its own axis."""
        if self.quiet:
            return
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 4))
        right = axes.twinx() if metric else axes
        curves = (axes, "loss"), (axes, "kd"), (axes, "val_loss"), (right, metric)
        for number, (side, key) in enumerate(curves):
            points = [(row["step"], row[key]) for row in self.rows if key in row]
            style = dict(lw=0.8, ms=3, marker="o" if number > 1 else None, color=f"C{number}")
            if points:
                side.plot(*zip(*points), label=key, **style)
        axes.set(xlabel="step", ylabel="loss, nats a target token")
        figure.legend(loc="upper center", ncols=4)
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
