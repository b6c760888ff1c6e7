"""The one error a user is meant to read."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: the message names the file, the key, the value, the rule and the fix.

    The command line prints it without a traceback and exits with code 2.
    """
