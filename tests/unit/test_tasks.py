"""Recall tasks: sized to the limit, seeded, and scored by whole words."""

from typing import Any

import pytest

from sentei.pipeline.corpus import Document
from sentei.pipeline.tasks import MAKERS, WORDS, RecallTask, TaskError, TaskName, is_correct, make_key_value

FILLER = (Document(path="a", name="a", text="some filler text\n" * 400),)


class WordTokenizer:
    """One token for each run of non-spaces and for each newline, or two where `pieces` says so."""

    def __init__(self, pieces: int = 1) -> None:
        self._pieces = pieces

    def __call__(self, text: str | list[str], **_: Any) -> dict[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [self._encode(entry) for entry in text]}
        return {"input_ids": self._encode(text)}

    def _encode(self, text: str) -> list[int]:
        return [0] * (self._pieces * len(text.replace("\n", " N ").split()))


def make(name: TaskName, **given: Any) -> RecallTask:
    """Make a small task over plain filler."""
    options = {"prompt_tokens": 500, "depth": 0.5, "seed": 3, "documents": FILLER} | given
    return MAKERS[name](WordTokenizer(), **options)


@pytest.mark.parametrize("name", list(MAKERS))
@pytest.mark.parametrize("tokens", [150, 500, 2000])
def test_prompt_fits_and_nearly_fills(name: TaskName, tokens: int) -> None:
    """A prompt never exceeds its limit and leaves less than one line of it unused."""
    task = make(name, prompt_tokens=tokens)

    assert tokens - 8 <= task.prompt_tokens <= tokens


@pytest.mark.parametrize("name", list(MAKERS))
def test_note_is_there_once_and_question_last(name: TaskName) -> None:
    """The answer stands once in the prompt, at the depth asked for, and the question ends the prompt."""
    task = make(name, depth=0.25)

    assert task.prompt.count(task.answer) == 1
    assert 0.1 < task.prompt.index(task.answer) / len(task.prompt) < 0.4
    assert task.prompt.splitlines()[-1].startswith("Now repeat the ")


@pytest.mark.parametrize("name", list(MAKERS))
def test_seed_decides_the_task(name: TaskName) -> None:
    """The same seed gives the same task, another seed another."""
    assert make(name) == make(name)
    assert make(name) != make(name, seed=4)


def test_key_value_asks_for_one_of_many() -> None:
    """Every pair uses words of its own, so that each key has one value."""
    task = make("key_value", num_pairs=10)

    words = [
        w for line in task.prompt.splitlines() if line.startswith("Remember") for w in line[:-1].split()[3:]
    ]
    assert len(words) == len(set(words)) == 20


def test_classic_filler_repeats_one_line() -> None:
    """The classic filler is the well-known sentence, without corpus text."""
    task = make("passkey", filler="classic")

    assert "The grass is green." in task.prompt
    assert "some filler" not in task.prompt


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        (" river.\n", True),
        ("river", True),
        ("\nRiver bank", True),
        (" riverbed", False),
        (" rive", False),
        ("", False),
    ],
)
def test_scoring_wants_whole_words(generated: str, expected: bool) -> None:
    """An answer counts when the text starts with it as whole words, whatever follows."""
    task = RecallTask(
        name="key_value", prompt="", answer="river", depth=0.5, prompt_tokens=0, answer_tokens=1
    )

    assert is_correct(task, generated) is expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"depth": 1.5}, r"depth is 1\.5"),
        ({"prompt_tokens": 10}, r"prompt_tokens is 10, but notes and question take \d+"),
        ({"num_pairs": 1000}, r"num_pairs is 1000"),
        ({"filler": "lorem"}, r"filler is 'lorem'"),
    ],
)
def test_impossible_requests_are_refused_by_value(given: dict[str, Any], message: str) -> None:
    """What cannot be made is an error that names the value."""
    with pytest.raises(TaskError, match=message):
        make("key_value", **given)


def test_unsuited_tokenizer_is_refused() -> None:
    """A tokenizer that cuts every task word into many pieces is refused with the count."""
    with pytest.raises(TaskError, match=f"only 0 of {len(WORDS)} task words"):
        make_key_value(WordTokenizer(pieces=3), prompt_tokens=500, depth=0.5, seed=0)
