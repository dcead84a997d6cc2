"""The files of a run folder: what produced it, its log and plot, its checkpoint. Needs torch only
for checkpoints."""

import contextlib
import dataclasses
import glob
import json
import os
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


def can_write(path):
    """Whether a file may be written there: so that it is said before hours of work."""
    return os.access(os.path.dirname(os.path.abspath(path)), os.W_OK) and not os.path.isdir(path)


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
        shutil.rmtree(path, True) if os.path.isdir(path) else os.remove(path)
    return file


def new_run(name, cfg, world, train_set, valid_set, **more):
    """Makes the folder of a new run, --out or one in out/ by this name, and returns it: run.json,
    the tokenizer, sample rows, and the source that runs."""
    folder = cfg.out
    if world.rank == 0:
        free = (f"out/{name}{end}" for end in ["", *range(-2, -(10**6), -1)])
        folder = folder or next(path for path in free if not os.path.exists(path))
        if glob.glob(os.path.join(glob.escape(folder), "*")):
            raise UserError(f"--out={folder}: not empty; change or clear it, or --init_from=resume")
        os.makedirs(folder, exist_ok=True)
        world.lock = lock_folder(folder)
        write_run(folder, dataclasses.asdict(cfg), corpus_of(train_set, valid_set, world), **more)
        train_set.tokenizer.save(folder)
        write_json(os.path.join(folder, "samples.json"), valid_set.samples())
    return world.agree(folder)


def corpus_of(train_set, valid_set, world):
    """What the rows of a step follow from: the data and the number of processes."""
    return f"{train_set.hash} {valid_set.hash}" + f" {world.size}" * (world.size > 1)


def restore(folder, model, optimizers, train_set, valid_set, world):
    """Puts a checkpoint into model and optimizers and returns its state. UserError where the data
    or the number of processes is not what the run was begun with: it could not go on as if it had
    never stopped."""
    import torch

    if world.rank == 0:
        world.lock = lock_folder(folder)
    if read_run(folder).get("corpus") != corpus_of(train_set, valid_set, world):
        raise UserError(f"{folder} cannot go on: its data has changed, or the number of processes")
    path = os.path.join(folder, "train_state.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state.pop("model"))
        world.scale, world.good_steps = state.pop("scaling", (1.0, 0))
        for optimizer, saved in zip(optimizers, state.pop("optimizers"), strict=True):
            optimizer.load_state_dict(saved)
        return state
    except Exception as error:  # pickle, zipfile and torch raise their own kinds
        raise UserError(f"{path} is missing, truncated or of other code ({error})"[:300]) from None


def write_run(folder, settings, corpus, **more):
    """run.json, and source/, a copy of the code. `corpus` is the hash of the data."""
    kinds = "*.py", "data/*.py", "lib/*.py", "lib/*.html"
    for name in [name for kind in kinds for name in glob.glob(kind, root_dir=ROOT)]:
        target = os.path.join(folder, "source", name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with replacing(target) as new:
            shutil.copyfile(os.path.join(ROOT, name), new)
    write_json(f"{folder}/run.json", dict(more, command=sys.argv, settings=settings, corpus=corpus))


def read_run(folder):
    """What run.json holds: "settings", "corpus" and more. UserError if the folder is no run."""
    about = read_json(os.path.join(folder, "run.json"))
    settings = about.get("settings")
    if type(settings) is not dict or type(settings.get("objective")) is not str:
        raise UserError(f"{folder}/run.json is damaged or was not written by this project")
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
            advice = f"drop it, or begin a new run with --init_from={cfg.out}"
            raise UserError(f"--{name}={value} differs from the run's own {was}: {advice}")
        setattr(old, name, value)
    if old.tokenizer not in ("bpe", "gpt2", "bytes"):
        old.tokenizer = f"{cfg.out}/"  # its copy: the file it came from may be gone
    return old


def newest_run():
    runs = glob.glob(os.path.join("out", "*", "model.safetensors"))
    if not runs:
        raise UserError("there is no run in out/ yet: name one, or make one with train.py")
    return os.path.dirname(max(runs, key=os.path.getmtime))


# ----------------------------------------------------------------------------------------------
# Checkpoints


def save_model(folder, model, weights="model.safetensors", **metadata):
    """model.save into a fresh folder beside, then each file takes its place at once and whole."""
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder) as new:
        model.save(new, weights, **metadata)
        for name in os.listdir(new):
            with replacing(os.path.join(folder, name)) as whole:
                os.replace(os.path.join(new, name), whole)


def save_checkpoint(folder, model, optimizers, state, world):
    """Writes model.safetensors, which everything else loads, then train_state.pt, from which a run
    is resumed: the same weights, the optimizers and `state`. Each is written whole or not at all;
    where there is a train_state.pt, there is a model."""
    import torch

    if world.rank > 0:
        return
    state = dict(state, scaling=(world.scale, world.good_steps), model=model.state_dict())
    state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    try:
        save_model(folder, model, step=str(state["step"]))
        with replacing(os.path.join(folder, "train_state.pt")) as new:
            torch.save(state, new)
    except Exception as error:  # OSError, or what torch and safetensors make of one
        what = f"saving step {state['step']} to {folder} failed ({str(error).splitlines()[0]})"
        raise UserError(f"{what}: free some space, then --init_from=resume") from None


def save_best(folder, model, step, world):
    """Writes best.safetensors, which Transformer.load prefers to the last weights."""
    if world.rank == 0:
        save_model(folder, model, "best.safetensors", step=str(step))


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
                rows = filter(None, map(log_row, file))
                self.rows = [row for row in rows if row["step"] < step + ("val_loss" in row)]
        with replacing(path) as new, open(new, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.rows)
        # Our own plain file, since the line above. Each row is written at once.
        self.file = open(path, "a", buffering=1, encoding="utf-8")

    def add(self, row):
        if self.quiet:
            return
        self.rows.append({key: round(value, 8) for key, value in row.items()})
        self.file.write(json.dumps(self.rows[-1]) + "\n")

    def plot(self, metric=None):
        """loss.png. With the name of a metric that evaluations have: its curve, on its own axis."""
        if self.quiet:
            return
        from matplotlib.figure import Figure

        axes = Figure(figsize=(7, 4)).subplots()
        right = axes.twinx() if metric else axes
        curves = (axes, "loss", ""), (axes, "kd", ""), (axes, "val_loss", "o"), (right, metric, "o")
        for number, (side, key, marker) in enumerate(curves):
            points = [(row["step"], row[key]) for row in self.rows if key in row]
            side.plot(*zip(*points), lw=0.8, ms=3, marker=marker, color=f"C{number}", label=key)
        axes.set(xlabel="step", ylabel="loss, nats a target token")
        axes.figure.legend(loc="upper center", ncols=4)
        with replacing(os.path.join(self.folder, "loss.png")) as new:
            axes.figure.savefig(new, dpi=120)


def log_row(line):
    """A line of log.jsonl as a dict with numbers alone; None for anything else."""
    try:
        row = json.loads(line)
        return row if "step" in row and max(map(abs, row.values())) < 2**53 else None
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
