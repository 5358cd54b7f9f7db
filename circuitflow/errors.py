"""Mistakes a user can make, told in one sentence."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend: one sentence naming the key, file or value, what was expected and the fix."""


def nearest(value: object, choices: Iterable[object], limit: int = 12) -> str:
    """A clause that names the valid choices, the nearest first: "did you mean 'topk'? valid: topk, random"."""
    valid = [str(choice) for choice in choices]
    close = difflib.get_close_matches(str(value), valid, n=1, cutoff=0.5)
    shown = ", ".join(valid[:limit]) + (f", … ({len(valid)} in all)" if len(valid) > limit else "")
    listing = f"valid: {shown or 'none'}"
    return f"did you mean '{close[0]}'? {listing}" if close else listing
