"""Recall tasks: sized to the limit, seeded, and scored by whole words."""

from typing import Any

import pytest

from sentei.pipeline.tasks import MAKERS
from sentei.pipeline.tasks.notes import make_key_value
from sentei.pipeline.tasks.prompt import WORDS, RecallTask, TaskError, TaskName, is_correct
from sentei.pipeline.text.corpus import Document
from tests.fakes_tokenizer import WordTokenizer

NEEDLES: tuple[TaskName, ...] = ("passkey", "key_value", "copy", "multi_key")

FILLER = (Document(path="a", name="a", text="some filler text\n" * 400),)


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


@pytest.mark.parametrize("name", NEEDLES)
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


def test_multi_key_hides_several_passkeys_under_names_of_their_own() -> None:
    """Four notes of one form stand in the text, and the question names the one whose passkey is asked for."""
    task = make("multi_key")

    notes = [line for line in task.prompt.splitlines() if line.startswith("Remember the passkey of ")]
    key = task.prompt.rsplit(" ", 1)[1]
    assert len(notes) == 4
    assert f"Remember the passkey of {key} {task.answer}." in notes
    assert len({note.split()[4] for note in notes}) == 4


def follow(prompt: str) -> dict[str, str]:
    """Run the assignments in the order of the text: each name must be given a number or a known name."""
    known: dict[str, str] = {}
    for line in prompt.splitlines():
        if line.startswith("Remember the variable "):
            name, source = line.removeprefix("Remember the variable ").rstrip(".").split(" = ")
            known[name] = source if source.isdigit() else known[source]
    return known


@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_a_chain_leads_from_the_last_name_to_its_number(depth: float) -> None:
    """Followed from top to bottom, the asked name holds the answer, and each chain has three names."""
    task = make("variable_value", depth=depth)

    held = follow(task.prompt)
    asked = task.prompt.splitlines()[-1].removeprefix("Now follow the variables: ").removesuffix(" =")
    assert held[asked] == task.answer
    assert sorted(list(held.values()).count(value) for value in set(held.values())) == [3, 3]


def test_all_names_of_a_number_are_asked_for() -> None:
    """The answer is every name that holds the asked number."""
    task = make("variable_names", num_chains=3, num_hops=4)

    asked = task.prompt.splitlines()[-1].removeprefix("Now list the variables that hold ").removesuffix(":")
    assert set(task.answer.split()) == {name for name, value in follow(task.prompt).items() if value == asked}
    assert len(task.answer.split()) == 5


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        (" lemon maple river.\n", True),
        ("\nriver, lemon, and maple are the ones", True),
        (" lemon river", False),
        (" lemon lemon river", False),
        (" walnut lemon maple river", False),
    ],
)
def test_names_count_in_any_order(generated: str, expected: bool) -> None:
    """A list of names is right when its first words are the wanted ones, whatever stands between."""
    task = RecallTask("variable_names", "", "lemon maple river", 0.5, 0, 3, is_ordered=False)

    assert is_correct(task, generated) is expected


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("multi_key", {"num_needles": 1}, r"num_needles is 1; .* 2 to \d+ needles"),
        ("variable_value", {"num_hops": 0}, r"num_hops is 0; at least one hop"),
        ("variable_names", {"num_chains": 1000}, r"num_chains is 1000"),
        ("variable_names", {"depth": -0.1}, r"depth is -0\.1"),
    ],
)
def test_impossible_chains_and_needles_are_refused(
    name: TaskName, given: dict[str, Any], message: str
) -> None:
    """A number of needles, hops or chains that cannot be made is named with what can."""
    with pytest.raises(TaskError, match=message):
        make(name, **given)


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
