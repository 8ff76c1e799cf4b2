"""The one exception that means: the user's input is wrong, and here is how to mend it."""


class UserError(ValueError):
    """Wrong input: `ling` prints the message as one line and exits with code 2.

    The message says what is wrong, where (the key or path), and what to do.
    """
