"""One-line descriptions of failures, from Ray's exceptions."""

from ray.exceptions import RayError, RayTaskError

from pipeline.errors import ConfigError


def load_error(failure: RayTaskError) -> ConfigError:
    cause = failure.cause
    return cause if isinstance(cause, ConfigError) else ConfigError(f"the model can't be loaded: {root_cause(failure)}")


def root_cause(failure: RayTaskError) -> str:
    """The exception at the bottom of a remote call, in one line."""
    cause = failure.cause
    # Ray wraps an exception once for every remote call that it passes through.
    while isinstance(cause, RayTaskError):
        cause = cause.cause
    return " ".join(f"{type(cause).__name__}: {cause}".split())


def loss_reason(loss: RayError) -> str:
    """Why Ray gave something up, in one line and without its advice."""
    text = " ".join(str(loss).split())
    # The text begins with ids and ends with general advice; the detail stands between.
    detail = text.partition("Worker exit detail: ")[2] or text
    return detail.partition(" Some common causes")[0]
