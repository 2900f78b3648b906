"""Fixtures of the tests of evaluation (a tiny untrained model) and of curation."""

from tests.curation.conftest import outputs  # noqa: F401  # fixtures
from tests.evaluation.conftest import make_checkpoint, noise, tiny_checkpoint  # noqa: F401  # fixtures
