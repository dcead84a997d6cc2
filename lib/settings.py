"""The command line, JSON files of strangers, and errors that a user can mend. Needs no torch."""

import argparse
import dataclasses
import difflib
import errno
import json
import math
import os
import stat
import sys


class UserError(Exception):
    """Something the user can mend: one line that says what is wrong, where, and what to do."""


def setting(default, help, choices=None, type=None, low=0, high=2**31 - 1):
    """A field of a settings dataclass. A default of None means: decided later, as `help` says.
    Numbers must lie from `low` to `high`, both included; a default of None needs a `type`."""
    metadata = dict(help=help, choices=choices, type=type, low=low, high=high)
    return dataclasses.field(default=default, metadata=metadata)


def read_settings(kind, about, argv=None):
    """Fills the dataclass `kind` from --key=value or --key value. UserError for an unknown key, a
    wrong type, a value out of bounds."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=about, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in dataclasses.fields(kind):
        add_key(parser, field)

    def refuse(message):
        raise UserError(message)

    parser.error = refuse
    known = [field.name for field in dataclasses.fields(kind)]
    for key in given(argv):
        if key not in known and key != "help":
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean --{near[0]}?" if near else "see --help for those there are"
            raise UserError(f"unknown key --{key}: {hint}")
    cfg = kind(**vars(parser.parse_args(argv)))
    for field in dataclasses.fields(kind):
        check_bounds(field, getattr(cfg, field.name))
    return cfg


def add_key(parser, field):
    spec = field.metadata
    of_default = str if field.default is None else type(field.default)
    kind = spec["type"] or of_default
    name = "|".join(map(str, spec["choices"])) if spec["choices"] else kind.__name__
    shown = "" if field.default is None else f" [{field.default}]"
    more = dict(nargs="?", const=True) if kind is bool else {}  # --static is --static=true
    parser.add_argument(
        f"--{field.name}",
        metavar=name,
        default=field.default,
        type=read_bool if kind is bool else kind,
        choices=spec["choices"],
        help=f"{spec['help']}{shown}".replace("%", "%%"),
        **more,
    )


def read_bool(text):
    if text.lower() in ("true", "1", "yes", "on"):
        return True
    if text.lower() in ("false", "0", "no", "off"):
        return False
    raise ValueError(text)


read_bool.__name__ = "true or false"  # argparse names the type in its messages


def check_bounds(field, value):
    if type(value) not in (int, float):
        return
    low, high = field.metadata["low"], field.metadata["high"]
    if not math.isfinite(value) or not low <= value <= high:
        raise UserError(f"--{field.name}={value} must be a number from {low} to {high}")


def given(argv=None):
    """Names of the keys that stand on the command line."""
    words = sys.argv[1:] if argv is None else argv
    return [word[2:].split("=")[0] for word in words if word.startswith("--")]


def read_json(path, kind=dict, most_bytes=2**26):
    """The value in a JSON file, which must be of type `kind`. The file may come from a stranger:
    UserError for anything that is no plain file of a bounded size and depth."""
    try:
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):
            raise UserError(f"{path} is no plain file")
        if about.st_size > most_bytes:
            raise UserError(f"{path} has {about.st_size:,} bytes, at most {most_bytes:,} are read")
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
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
        if name not in values:
            if field.default is dataclasses.MISSING:
                raise UserError(f"{where}: the field {name} is missing")
            continue
        value = values[name]
        if value is None and field.default is None:
            continue
        if field.type is float and type(value) is int and abs(value) < 2**53:
            value = float(value)
        if type(value) is not field.type:
            raise UserError(f"{where}: {name} should be of type {field.type.__name__}")
        if type(value) in (int, float) and not abs(value) < 2**53:
            raise UserError(f"{where}: {name} is no usable number")
    return kind(**values)


def printable(text):
    """Text for a terminal: control characters are shown instead of obeyed, but for line breaks
    and tabs."""
    return "".join(
        c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


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
        no_space = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = ": free some space and go on" if no_space else ""
        message = f"{error.strerror or error} ({error.filename or 'a file'}){advice}"
    except Exception as error:
        # ModelError is known by its name, because importing model.py would import torch.
        if not isinstance(error, UserError) and type(error).__name__ != "ModelError":
            raise
        message = " ".join(str(error).split())
    print("error: " + printable(message), file=sys.stderr)
    sys.exit(2)
