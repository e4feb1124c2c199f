"""How an answer is scored against its reference: a number from 0 to 1, by name or by a user's function.

`choice` is the odd one out: the answer is the likeliest of the given choices, and it is right or wrong.
"""

import pkgutil
import re
from collections import Counter
from collections.abc import Callable, Mapping
from inspect import Parameter, signature

from sentei.errors import SenteiError

Score = Callable[[str, str], float]
CHOICE = "choice"


class MetricError(SenteiError, ValueError):
    """A metric that cannot serve; the message says why and what is allowed."""


def exact_match(answer: str, reference: str) -> float:
    """Score 1 if both are the same text; only the white space around them does not count."""
    return float(answer.strip() == reference.strip())


def contains(answer: str, reference: str) -> float:
    """Score 1 if the reference stands anywhere in the answer; stretches of white space are alike."""
    return float(" ".join(reference.split()) in " ".join(answer.split()))


def f1(answer: str, reference: str) -> float:
    """Score by shared words: the harmonic mean of precision and recall, without case and punctuation."""
    own, wanted = Counter(_words(answer)), Counter(_words(reference))
    shared = sum((own & wanted).values())
    if not own or not wanted:
        return float(own == wanted)
    return 2 * shared / (own.total() + wanted.total())


def regex(answer: str, reference: str) -> float:
    """Score 1 if the reference, a Python regular expression, is found in the answer."""
    return float(re.search(reference, answer) is not None)


METRICS: Mapping[str, Score] = {"exact_match": exact_match, "contains": contains, "f1": f1, "regex": regex}
NAMES = (*METRICS, CHOICE)


def find_metric(name: str) -> Score:
    """Return a metric by name, or the function that "package.module:function" points to.

    Only a function that takes `answer` and `reference` by name is called, so that a task file cannot run
    whatever is installed. Raises MetricError.
    """
    if name in METRICS:
        return METRICS[name]
    if ":" not in name:
        raise MetricError(f'allowed: {", ".join(NAMES)}, or a function as "package.module:function"')
    module = name.partition(":")[0]
    try:
        function = pkgutil.resolve_name(name)
    except Exception as error:  # importing a module of the user's may raise anything; all of it is one fault
        raise MetricError(
            f"cannot be imported ({type(error).__name__}: {error}); put the folder of {module!r} on "
            f"PYTHONPATH, or use one of {', '.join(NAMES)}"
        ) from error
    if not callable(function) or not _takes_both(function):
        raise MetricError(f"is no function of (answer, reference); define it so in {module!r}")
    return _checked(name, function)


def _takes_both(function: Callable[..., object]) -> bool:
    try:
        parameters = signature(function).parameters
    except (TypeError, ValueError):
        return False
    needed = {n for n, p in parameters.items() if p.default is Parameter.empty and p.kind not in _VARIADIC}
    return {"answer", "reference"} <= set(parameters) and needed <= {"answer", "reference"}


_VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def _checked(name: str, function: Callable[..., object]) -> Score:
    def score(answer: str, reference: str) -> float:
        try:
            value = function(answer=answer, reference=reference)
        except Exception as error:  # the user's own code; its error is told with the name of the metric
            raise MetricError(f"{name} failed ({type(error).__name__}: {error})") from error
        if not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
            raise MetricError(f"{name} gave {value!r}; it must give a number from 0 to 1")
        return float(value)

    return score


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
