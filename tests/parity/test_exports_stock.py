"""Exports that stock transformers loads, with no code of ours."""

import pytest

from tests.parity.export_checks import *  # noqa: F403

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", params=["transformer", "mamba", "mamba2"])
def family(request):
    return request.param
