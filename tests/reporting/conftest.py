"""The small run of the evaluation's tests."""

from tests.evaluation.conftest import build_run, prepared  # noqa: F401
