"""The pool of two processes, in which an extension's module is imported as any other."""

from tests.distributed.conftest import two as two
