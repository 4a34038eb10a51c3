"""A file that is no plain YAML mapping is refused in one line that names it."""

from pathlib import Path

import pytest

from gradnoise.base import strict_yaml
from gradnoise.base.errors import InputError


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        strict_yaml.load(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(str(path))


def test_a_mapping_of_plain_values_is_read(tmp_path: Path) -> None:
    path = tmp_path / "plain.yaml"
    path.write_text("# comment\na: {b: [1, 0.5, yes, 'no', true, null]}\n")
    assert strict_yaml.load(path) == {"a": {"b": [1, 0.5, "yes", "no", True, None]}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: 1\na: 2\n", "duplicate key"),
        ("a: &b 1\n", ", line 1: anchor, alias or tag"),
        ("a: !!python/object:os.system 1\n", "anchor, alias or tag"),
        ("a: {b: 1, <<: {c: 2}}\n", ", line 1: merge key"),
        ("a: .nan\n", ": a: nan: must be a finite number"),
        ("a: [1, -.inf]\n", ": a[1]: -inf: must be a finite number"),
        ("a: 2026-01-01\n", "must be a string, number"),
        ("a: 2026-99-99\n", "mend the YAML"),
        ("1: a\n", ": 1: keys must be strings"),
        ("- a\n", ": list: the file must be one mapping"),
        ("", ": NoneType: the file must be one mapping"),
        ("a: [\n", "mend the YAML"),
        ("[" * 1000, "mend the YAML"),
        ("a: \x01\n", "special characters are not allowed"),
    ],
)
def test_what_is_ambiguous_or_executable_is_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    assert said in refused(path)


@pytest.mark.parametrize("content", ["a: 1\n".encode("utf-16"), b"\x80\xff\x00"])
def test_a_file_that_is_no_utf_8_text_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(content)
    assert refused(path) == ": is no UTF-8 text: save it as UTF-8"


def test_a_path_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    assert refused(loop).endswith("symbolic links: give the path of a YAML file")
    assert refused(tmp_path) == ": Is a directory: give the path of a YAML file"
    assert refused(tmp_path / "absent.yaml") == ": missing: give the path of an existing YAML file"
