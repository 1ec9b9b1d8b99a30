"""Ray's exceptions in one line."""

from ray.exceptions import RayError, RayTaskError

from pipeline.cluster.failures import load_error, loss_reason, root_cause
from pipeline.errors import ConfigError


def task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("load", "traceback", cause)


def test_the_cause_at_the_bottom_is_told_in_one_line() -> None:
    assert root_cause(task_error(task_error(OSError("no\n  space")))) == "OSError: no space"


def test_a_wrong_setting_found_by_a_worker_stays_what_it_is() -> None:
    error = ConfigError("no such model")
    assert load_error(task_error(error)) is error


def test_any_other_error_while_loading_says_that_the_model_cant_be_loaded() -> None:
    told = load_error(task_error(RuntimeError("bad weights")))
    assert isinstance(told, ConfigError)
    assert str(told) == "the model can't be loaded: RuntimeError: bad weights"


def test_a_loss_is_told_without_advice() -> None:
    text = "A worker died.\nWorker PID: 7 Worker exit detail: killed by a signal. Some common causes include: many"
    assert loss_reason(RayError(text)) == "killed by a signal."
    assert loss_reason(RayError("the node is gone")) == "the node is gone"
