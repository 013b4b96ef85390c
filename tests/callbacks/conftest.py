import learning_rate_drops
import pytest


@pytest.fixture
def nothing_recorded():
    """Forget the learning rates and the active steps that an earlier test recorded."""
    learning_rate_drops.RATES.clear()
    learning_rate_drops.ACTIVE.clear()
