"""The command line, JSON files of strangers, progress, and errors that a user can mend. Needs no
torch."""

import dataclasses
import difflib
import json
import os
import sys

SWITCH = {"true": True, "1": True, "false": False, "0": False}


class UserError(Exception):
    """Something the user can mend: one line that says what is wrong, where, and what to do."""


def setting(default, help, choices=None, low=0, high=2**31 - 1):
    """A field of a settings dataclass. A default of None means: decided later, as `help` says.
    Numbers must lie from `low` to `high`, both included."""
    metadata = dict(help=help, choices=choices, low=low, high=high)
    return dataclasses.field(default=default, metadata=metadata)


def read_settings(kind, about, argv=None):
    """Fills the dataclass `kind` from --key=value or --key value. UserError for an unknown key, a
    wrong type, a value out of bounds. --help prints `about` and every key, and leaves."""
    words = list(sys.argv[1:] if argv is None else argv)
    fields, values = {f"--{field.name}": field for field in dataclasses.fields(kind)}, {}
    if "--help" in words or "-h" in words:
        print(about)
        for name, field in fields.items():
            default = "" if field.default is None else f" [{field.default}]"
            print(f"  {f'{name}={kinds_of(field)}':<32} {field.metadata['help']}{default}")
        sys.exit(0)
    while words:
        key, equals, text = words.pop(0).partition("=")
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            hint = f"did you mean {near[0]}?" if near else "see --help for those there are"
            raise UserError(f"unknown key {key}: {hint}")
        if not equals and words and not words[0].startswith("--"):
            text = words.pop(0)
        elif not equals and fields[key].type is bool:
            text = "true"  # --static is --static=true
        values[key[2:]] = read_value(fields[key], text)
    return kind(**values)


def kinds_of(field):
    """What a key takes, for people."""
    names = {bool: "true|false", int: "INTEGER", float: "NUMBER", str: "TEXT"}
    return "|".join(field.metadata["choices"] or [names[field.type]])


def read_value(field, text):
    """The value that a word of the command line means."""
    low, high, choices = (field.metadata[name] for name in ("low", "high", "choices"))
    try:
        value = SWITCH[text.lower()] if field.type is bool else field.type(text)
    except (KeyError, ValueError):
        value = None
    if value in (None, "") or (choices and value not in choices):
        raise UserError(f"--{field.name}={text}: this key takes {kinds_of(field)}")
    if field.type in (int, float) and not low <= value <= high:  # NaN is not either
        raise UserError(f"--{field.name}={text} must be a number from {low} to {high}")
    return value


def given():
    """Names of the keys that stand on the command line."""
    return [word[2:].split("=")[0] for word in sys.argv[1:] if word.startswith("--")]


def read_json(path, kind=dict, most_bytes=2**26):
    """The value in a JSON file, which must be of type `kind`. The file may come from a stranger:
    UserError for anything that is no plain file of a bounded size and depth."""
    # A pipe would wait for its writer.
    if not os.path.isfile(path) or os.path.getsize(path) > most_bytes:
        raise UserError(f"{path} is missing, or no plain file of at most {most_bytes:,} bytes")
    try:
        with open(path, encoding="utf-8-sig") as file:
            value = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({type(error).__name__})") from None
    if type(value) is not kind:
        raise UserError(f"{path} should hold a JSON {kind.__name__}, not a {type(value).__name__}")
    return value


def from_dict(kind, values, where):
    """A dataclass from a dict out of a file. UserError, which names `where`, for fields that are
    missing or unknown and for values of another type. A whole number may stand for a float; None
    may stand where it is the default."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(values.keys() - fields.keys()):
        raise UserError(f"{where}: unknown field {unknown[0][:60]!r}")
    for name, field in fields.items():
        value = values.get(name, field.default)
        if value is dataclasses.MISSING:
            raise UserError(f"{where}: the field {name} is missing")
        if value is None and field.default is None:
            continue
        spec = dict(low=-(2**53), high=2**53, choices=None) | field.metadata
        number = type(value) in (int, float)
        fits = type(value) is field.type or (field.type is float and number)
        fits = fits and (not number or spec["low"] <= value <= spec["high"])
        if not fits or (spec["choices"] and value not in spec["choices"]):
            raise UserError(f"{where}: {name} should be a usable {field.type.__name__}")
    return kind(**values)


class Lines:
    """Standard error for a progress bar that no terminal shows: each state is a line."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr)


def progress(rows=None, what=None, **more):
    """A tqdm bar that is redrawn at most twice a second. Where standard error is no terminal, it
    is a line every ten seconds."""
    bar, lines = dict(mininterval=0.5), dict(mininterval=10, delay=10, file=Lines())
    from tqdm import tqdm  # an export answers without it

    return tqdm(rows, what, **(bar if sys.stderr.isatty() else lines), **more)


def printable(text):
    """Text for a terminal: control characters are shown instead of obeyed, but for line breaks
    and tabs."""
    return "".join(c if c in "\n\t" or c.isprintable() else ascii(c)[1:-1] for c in text)


def script(main):
    """Runs a script's main(). A UserError, a ModelError of model.py or a file that cannot be used
    becomes one line on standard error and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        message = f"{error.strerror or error} ({error.filename or 'a file'})"
    except BaseException as error:
        kind, message = type(error).__name__, " ".join(str(error).split())
        full = "MemoryError" in kind or "allocate memory" in message or "of memory" in message
        # Some are known by their names, because their modules are not imported here.
        if not (full or kind in ("UserError", "ModelError", "PanicException")):
            raise
        message = f"not enough memory for this ({message[:200]})" if full else message
    print("error: " + printable(message), file=sys.stderr)
    sys.exit(2)
