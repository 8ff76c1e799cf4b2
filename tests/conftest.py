"""What all tests share: worlds of ranks on the CPU."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest

from tests.dist.ranks import RankError, Ranks


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "ranks(n): the test's body runs on every rank of a world of n processes with megatron-core"
    )


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("ranks"):
            item.fixturenames.append("ranks")


@pytest.fixture(scope="session")
def ranks(tmp_path_factory) -> Iterator[Ranks]:
    """`ranks.run(n, function, *args)` calls a module's function on every rank of a world of n processes."""
    pool = Ranks(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run tests marked with `ranks` over there, with the same (pickled) arguments on each rank."""
    marker = pyfuncitem.get_closest_marker("ranks")
    if marker is None:
        return None
    pool = pyfuncitem.funcargs["ranks"]
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.function).parameters}
    problem = None
    try:
        pool.run(marker.args[0], pyfuncitem.function, **arguments)
    except RankError as error:
        problem = str(error)
    if problem is not None:  # outside of the handler: the text has the traceback already
        pytest.fail(problem, pytrace=False)
    return True
