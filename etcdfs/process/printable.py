"""Foreign text on its way to a terminal or into a log.

Knows: which characters only stand for themselves. Does not know: whose text it is. Names of files,
and what etcd says, may hold anything: an escape sequence would rule the terminal, and a newline
would begin a line of the log that nobody logged.

Concurrency: none; pure functions.
"""


def printable(text: str) -> str:
    """Return a text in one line, with an escape in the place of all that cannot be seen in it."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
