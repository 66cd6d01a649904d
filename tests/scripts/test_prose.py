"""The rule for sentences is held by a check of our own."""

import pytest

from scripts.checks.prose import avoided_words, silent_fields


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("The handler te" + "lls its caller.", id="a verb with eight meanings"),
        pytest.param("def _te" + "ll(self) -> None: ...", id="a name"),
        pytest.param("reply.to" + "ld_cause", id="a part of a name"),
        pytest.param("It is late, " + "so it is dropped.", id="so for thus"),
        pytest.param("Besides a name there i" + "s none.", id="nothing there"),
        pytest.param("WHAT" + "EVER happens", id="capitals"),
    ],
)
def test_an_avoided_word_is_found(text: str) -> None:
    """In sentences and in names."""
    assert len(list(avoided_words(text))) == 1


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("if value is None:", id="Python's None"),
        pytest.param("It is signed, so that the peer can verify it.", id="so that"),
        pytest.param("Intel sold a bedside table in a stellar runaway.", id="inside other words"),
    ],
)
def test_other_words_are_left_in_peace(text: str) -> None:
    """The check must not make people write around it."""
    assert list(avoided_words(text)) == []


def test_a_field_without_a_sentence_is_found() -> None:
    """In dataclasses and models; private fields and other classes are exempt."""
    source = '''
@dataclass(frozen=True)
class Point:
    x: int
    """To the right."""
    y: int
    _z: int

class Model(BaseModel):
    name: str

class Plain:
    name: str
'''
    assert list(silent_fields(source)) == ["6: Point.y has no sentence", "10: Model.name has no sentence"]
