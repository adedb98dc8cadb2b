from pathlib import Path

import pytest
from voc.dataset.toy import toy_voc


@pytest.fixture(scope="session")
def toy_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy data set of 12 training and 4 test images; read only."""
    return toy_voc(tmp_path_factory.mktemp("data"), num_train=12, num_val=4, seed=1)
