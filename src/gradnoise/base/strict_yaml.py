"""YAML as registrations need it: nothing silent, nothing executable, nothing ambiguous."""

import math
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.tokens import AliasToken, AnchorToken, ScalarToken, TagToken

from gradnoise.base.errors import InputError


def load(path: Path | str) -> dict[str, object]:
    """Read one YAML 1.2 mapping of plain JSON values.

    Refused with `InputError`: a file that is missing, cannot be read or is no UTF-8 text; duplicate keys,
    anchors, aliases, tags, merge keys, NaN and infinities, dates, keys that are not strings, and a document
    that is not a mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(str(path), "missing", "give the path of an existing YAML file") from error
    except OSError as error:
        raise InputError(str(path), error.strerror, "give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise InputError(str(path), "is no UTF-8 text", "save it as UTF-8") from error
    yaml = YAML(typ="safe", pure=True)
    try:
        for token in yaml.scan(text):
            if isinstance(token, AnchorToken | AliasToken | TagToken):
                where = f"line {token.start_mark.line + 1}"
                raise InputError(f"{path}, {where}", "anchor, alias or tag", "write the value out")
            if isinstance(token, ScalarToken) and token.plain and token.value == "<<":
                where = f"line {token.start_mark.line + 1}"
                raise InputError(f"{path}, {where}", "merge key <<", "write the values out")
        value = yaml.load(text)
    except InputError:
        raise
    except (YAMLError, ValueError, RecursionError) as error:  # also impossible dates and endless nesting
        reason = " ".join(str(error).split())[:300]
        raise InputError(str(path), reason, "mend the YAML") from error
    if not isinstance(value, dict):
        raise InputError(str(path), type(value).__name__, "the file must be one mapping of keys to values")
    _check(value, str(path))
    return value


def _check(value: object, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise InputError(where, repr(key), "keys must be strings")
            _check(item, f"{where}: {key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check(item, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise InputError(where, value, "must be a finite number")
    elif not isinstance(value, str | int | float | bool | None):
        raise InputError(where, repr(value), "must be a string, number, true, false or null")
