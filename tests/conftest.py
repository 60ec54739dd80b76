"""Before any test imports Triton: without a GPU, its kernels run in its interpreter."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings

from megatron_prune.device import has_cuda

settings.register_profile("patient", deadline=None)  # how long an example takes says how busy the machine is
settings.load_profile("patient")
if not has_cuda():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# MaxText keeps what XLA has compiled in ~/jax_cache; here the programs are small and made many times.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--nightly`: also what is marked so."""
    parser.addoption("--nightly", action="store_true", help="run what is marked `nightly`, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `nightly` unless it is asked for; before fixtures see what runs."""
    if config.getoption("--nightly"):
        return
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("nightly")])
    items[:] = [item for item in items if not item.get_closest_marker("nightly")]


@pytest.fixture(scope="module", autouse=True)
def room(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[None]:
    """What a module's fixtures wrote goes when the module is done, unless something failed: all of it is tens of GB."""
    failed, here = request.session.testsfailed, os.getcwd()
    before = set(tmp_path_factory.getbasetemp().iterdir())
    yield
    back = os.path.samefile(".", here)
    os.chdir(here)
    assert back, "a test of this module left the process in another folder, which goes with the test"
    if request.session.testsfailed == failed:
        for made in set(tmp_path_factory.getbasetemp().iterdir()) - before:
            shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def use_threads() -> Iterator[Callable[[int], None]]:
    """`torch.set_num_threads`, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
