"""The whole suite sees eight CPU devices; GPU tests run where there is one; torch keeps to one thread."""

import gc
import json
import os

import pytest

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch, whose threads otherwise fight with XLA's
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # `pytest -n`: the first process would take three quarters of a GPU


def pytest_addoption(parser):
    parser.addoption("--require-gpu", action="store_true", help="fail, rather than skip, what needs a GPU that is missing")
    parser.addoption("--part", metavar="K/N", help="only every N-th test, from the K-th (1 to N) on: parts for several processes, or a sample")
    parser.addoption("--by-driver", choices=("device", "interpreter"), help="native kernels of a GPU without XLA, on it or interpreted: driver_launches.py")
    parser.addoption("--results", metavar="FILE", help="append a line of JSON for each test as it ends: a run that is killed leaves what it had")


def pytest_configure(config):
    if (how := config.getoption("--by-driver")) is not None:
        if how == "device":
            os.environ["DSV4_SIM_TESTS"] = "device"
        import driver_launches  # not at the top: it reads what was just set

        driver_launches.install()
    if config.getoption("--results") and not hasattr(config, "workerinput"):  # xdist reports to its main process
        config.pluginmanager.register(Results(config.getoption("--results")))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if config.getoption("--part") is None:
        return
    k, n = map(int, config.getoption("--part").split("/"))
    if not 1 <= k <= n:
        raise pytest.UsageError(f"--part {k}/{n}: the first number must lie in 1..{n}")
    kept = items[k - 1 :: n]
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % n != k - 1])
    items[:] = kept


class Results:
    """Writes {"test", "outcome", "seconds", "message"} of each test into a file, at once."""

    def __init__(self, path):
        self.path = path

    def pytest_runtest_logreport(self, report):
        if report.when in ("setup", "teardown") and report.outcome == "passed":
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        skip = report.longrepr[-1] if report.skipped and isinstance(report.longrepr, tuple) else None
        message = "" if report.passed else (skip or (crash.message if crash else report.longreprtext))[:4000]
        with open(self.path, "a") as f:
            f.write(json.dumps(dict(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 3), message=message)) + "\n")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") is None or item.config.getoption("--by-driver") is not None:
        return
    import jax

    try:
        jax.devices("gpu")
    except RuntimeError as error:
        sentence = f"needs an NVIDIA GPU and jax with CUDA: {str(error).splitlines()[0]}"
        (pytest.fail if item.config.getoption("--require-gpu") else pytest.skip)(sentence)


@pytest.fixture(scope="module", autouse=True)
def programs_end_with_their_file():
    """Every compiled program holds a few memory mappings, of which a process may have 65,530: XLA aborts beyond."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()


@pytest.fixture(params=["sim", pytest.param("sm_90a", marks=pytest.mark.gpu), pytest.param("sm_100a", marks=pytest.mark.gpu)])
def backend(request):
    """Name of a native backend, forced for the whole test; `ops.backend('xla')` inside gives the reference."""
    import backends  # not at the top: jax must see XLA_FLAGS first

    import ffi_kernels as ops

    with ops.backend(backends.require(request, request.param)):
        yield request.param
