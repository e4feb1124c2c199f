"""The one root of all that we raise on purpose: the command line turns each into one line and an exit code.

Each folder draws its own small tree at the top of the file that defines it.
"""


class SenteiError(Exception):
    """What we raise on purpose; the message names the thing, its value and the way out."""

    is_absent = False  # a server, a database or a model is not there: exit code 3, else 2
