"""How a command of the command line fails."""


class CommandFailed(Exception):
    """A command cannot do what it is asked for; the text is one sentence for the user, the exit status is 1."""
