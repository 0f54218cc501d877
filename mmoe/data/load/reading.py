"""Read bytes that somebody else wrote, so that whatever a decoder raises over them becomes one sentence."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from mmoe.errors import DataError, MmoeError, Refused

_TERSE = (LookupError, TypeError, AttributeError, ArithmeticError)  # whose messages say little without their type


@contextmanager
def reading(what: str, where: str, remedy: str, refusal: str = "") -> Iterator[None]:
    """Turn whatever is raised within the context into a DataError that names the bytes, the fault and the remedy.

    With a class that it is to be counted under, `refusal`, it is a `Refused` of that.

    Decoders raise anything over damaged bytes (Pillow alone a dozen types), so the type says nothing: the context
    does, and is to hold nothing but the decoder's calls. `what` is the kind of payload, `where` the file and key.
    """
    try:
        yield
    except MmoeError:
        raise
    except Exception as error:
        raise unreadable(what, where, error, remedy, refusal) from error


def unreadable(what: str, where: str, error: Exception, remedy: str, refusal: str = "") -> DataError:
    """Return a DataError that says in a sentence what a decoder's exception says."""
    # decord's messages may quote the whole file; the sentence keeps the readable end of it.
    reason = re.sub(r"Error opening <.*?>: ", "", re.sub(r"[^\x20-\x7e\xa1-\ud7ff]+", " ", str(error)))
    reason = re.sub(r" at 0x[0-9a-f]+", "", reason)  # an address would make the list of each attempt another
    reason = reason.strip().removeprefix("Error: ")
    if not reason or isinstance(error, _TERSE):
        reason = f"{type(error).__name__}: {reason}".removesuffix(": ")
    reason = reason if len(reason) <= 160 else f"...{reason[-160:]}"
    message = f"{where} cannot be read as {'an' if what[0] in 'aeiou' else 'a'} {what} ({reason}); {remedy}"
    return Refused(refusal, message) if refusal else DataError(message)
