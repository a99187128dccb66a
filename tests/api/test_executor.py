"""A session as an executor of the standard library, and as a backend of joblib."""

import concurrent.futures as cf
import operator
import threading
from pathlib import Path

import dask
import joblib
import pytest
from sklearn.datasets import load_iris
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC

import burst_dask.joblib
from burst_dask import Session
from burst_dask.errors import ConfigError, WaitTimeout


def wait_for(place, value):
    while not Path(place).exists():
        threading.Event().wait(0.002)
    return value


# ---------------------------------------------------------------------------- the standard library's


def test_submit(burst):
    executor = burst.get_executor()
    assert isinstance(executor, cf.Executor)
    futures = [executor.submit(divmod, n, 3) for n in range(10)]
    assert [future.result(60) for future in futures] == [divmod(n, 3) for n in range(10)]
    assert cf.wait(futures, timeout=60).not_done == set()
    assert set(cf.as_completed(futures, timeout=60)) == set(futures)


def test_every_keyword_is_the_functions_own(burst):
    def function(**keywords):
        return keywords

    keywords = {"key": 1, "pure": 2, "retries": 3, "priority": 4, "timeout": 5, "resources": 6, "fn": 7, "self": 8}
    assert burst.get_executor().submit(function, **keywords).result(60) == keywords


def test_keywords_for_each_call(burst, tmp_path):
    def fails_once(place):
        if not Path(place).exists():
            Path(place).touch()
            raise OSError("not yet")
        return "done"

    assert burst.get_executor(retries=1).submit(fails_once, str(tmp_path / "tried")).result(60) == "done"
    pure = burst.get_executor(pure=True)
    assert pure.submit(abs, -1) is pure.submit(abs, -1)
    with pytest.raises(ConfigError, match="retries=-1"):
        burst.get_executor(retries=-1)


def test_map(burst):
    with burst.get_executor() as executor:
        assert list(executor.map(pow, range(5), [2] * 9)) == [0, 1, 4, 9, 16]
        assert list(executor.map(abs, [], chunksize=3)) == []
        results = executor.map(operator.truediv, [1, 1], [1, 0], timeout=60)
        assert next(results) == 1.0
        with pytest.raises(ZeroDivisionError):
            next(results)


def test_map_runs_out_of_time_and_cancels_the_rest(alone):
    executor = alone.get_executor()
    results = executor.map(abs, [1, 2], timeout=0.01)
    with pytest.raises(TimeoutError):
        next(results)
    assert all(future.cancelled() for future in executor._futures)


def test_shutdown(burst, tmp_path):
    gate = tmp_path / "gate"
    with burst.get_executor() as executor:
        future = executor.submit(wait_for, str(gate), 1)
        threading.Timer(0.05, gate.touch).start()
    assert future.done() and future.result() == 1
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(abs, 1)
    executor.shutdown()
    assert burst.submit(abs, -1).result(60) == 1  # the session goes on


def test_shutdown_without_waiting(alone):
    executor = alone.get_executor()
    future = executor.submit(abs, 1)
    executor.shutdown(wait=False)
    assert not future.done()
    other = alone.get_executor()
    cancelled = other.submit(abs, 1)
    other.shutdown(cancel_futures=True)
    assert cancelled.cancelled() and not future.cancelled()
    with pytest.raises(WaitTimeout):
        future.result(0.001)


# ---------------------------------------------------------------------------- joblib's


def test_joblib(burst):
    with joblib.parallel_config("burst", session=burst):
        assert joblib.Parallel()(joblib.delayed(pow)(n, 2) for n in range(30)) == [n**2 for n in range(30)]
        assert joblib.effective_n_jobs() == 2
        stream = joblib.Parallel(return_as="generator")(joblib.delayed(abs)(-n) for n in range(5))
        assert list(stream) == list(range(5))
    with burst, joblib.parallel_config("burst", retries=1):
        assert joblib.Parallel()([joblib.delayed(abs)(-1)]) == [1]


def test_joblib_raises_what_a_task_raises_and_cancels_the_rest(burst, tmp_path):
    calls = [joblib.delayed(operator.truediv)(1, 0), joblib.delayed(wait_for)(str(tmp_path / "gate"), 1)]
    with joblib.parallel_config("burst", session=burst), pytest.raises(ZeroDivisionError):
        joblib.Parallel()(calls)
    assert not burst._futures.follower._runs
    (tmp_path / "gate").touch()


def test_joblib_within_a_task_runs_one_after_another(burst):
    def outer(n):
        return sum(joblib.Parallel(n_jobs=4)(joblib.delayed(abs)(-n) for _ in range(3)))

    with joblib.parallel_config("burst", session=burst):
        assert joblib.Parallel()(joblib.delayed(outer)(n) for n in range(3)) == [0, 3, 6]


def test_joblib_without_a_session():
    assert dask.config.get("scheduler", None) is None
    with pytest.raises(ConfigError, match="there is no session"):
        burst_dask.joblib.BurstBackend()


def test_a_search_of_scikit_learn(tmp_path):
    x, y = load_iris(return_X_y=True)
    grid = {"C": [0.1, 1, 10], "gamma": [0.1, 1]}
    expected = GridSearchCV(SVC(), grid).fit(x, y)
    session = Session(tmp_path / "store", workers=2, progress=False)
    try:
        with session, joblib.parallel_config("burst"):
            found = GridSearchCV(SVC(), grid).fit(x, y)
        assert found.best_params_ == expected.best_params_
        assert found.cv_results_["mean_test_score"].tolist() == expected.cv_results_["mean_test_score"].tolist()
        runs = session.status().runs
        assert sum(run.total for run in runs) == 30  # 6 candidates, 5 folds
    finally:
        session.cleanup(force=True)
