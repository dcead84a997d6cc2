"""Reading the command line, and errors that a user can cause. Needs no torch."""
import argparse
import dataclasses
import difflib
import errno
import sys


class UserError(Exception):
    """Something the user can mend: one line that says what is wrong, where, and what to do. Exit status 2."""


def setting(default, help, choices=None, type=None):
    """A field of a settings dataclass. A default of None means: decided later, as `help` says."""
    metadata = dict(help=help, choices=choices, type=type)
    return dataclasses.field(default=default, metadata=metadata)


def parse(settings_class, description, argv=None):
    """Fills a dataclass whose fields are `setting`s from --key=value (or --key value). Anything that does not fit ends
    at once with one line and exit status 2."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {}
    for field in dataclasses.fields(settings_class):
        spec = field.metadata
        kind = spec["type"] or (str if field.default is None else type(field.default))
        shown = "" if field.default is None else f" [{str(field.default).lower() if kind is bool else field.default}]"
        name = kind.__name__ if not spec["choices"] else "|".join(map(str, spec["choices"]))
        parser.add_argument(f"--{field.name}", metavar=name, default=field.default, type=reader(kind),
                            **(dict(nargs="?", const=True) if kind is bool else {}),  # --static is --static=true
                            choices=spec["choices"], help=f"{spec['help']}{shown}".replace("%", "%%"))
        known[field.name] = kind

    def error(message):
        for word in (argv if argv is not None else sys.argv[1:]):
            key = word.split("=")[0].lstrip("-").replace("-", "_")
            if word.startswith("--") and key not in known and key != "help":
                near = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean --{near[0]}?" if near else "see --help for those there are"
                message = f"unknown key --{key}: {hint}"
                break
        raise UserError(message)

    parser.error = error
    return settings_class(**vars(parser.parse_args(argv)))


def given(argv=None):
    """Names of the keys that stand on the command line."""
    return [word[2:].split("=")[0] for word in (argv or sys.argv[1:]) if word.startswith("--")]


def reader(kind):
    if kind is not bool:
        return kind

    def read_bool(text):
        if text.lower() in ("true", "1", "yes", "on"):
            return True
        if text.lower() in ("false", "0", "no", "off"):
            return False
        raise ValueError(text)
    read_bool.__name__ = "true or false"
    return read_bool


def script(main):
    """Runs a script's main(); a UserError (or model.ModelError, told by its name because importing it would import torch) becomes one
    line on stderr and exit status 2."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        full = ": free some space and go on" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        print(f"error: {error.strerror or error} ({error.filename or 'a file'}){full}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if not isinstance(error, UserError) and type(error).__name__ != "ModelError":
            raise
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
