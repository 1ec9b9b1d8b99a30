"""The two kinds of failure: one that costs a row, and one that ends the job before it starts."""


class RowError(Exception):
    """A row (or a clip with all its rows) that has no answer, for a reason the output names.

    Raised where the reason is found and stored in the `error_type` and `error` columns of the output.

    Args:
        error_type: short, stable name to group by, such as `file_not_found`.
        message: one line that names the value and, where there is one, the fix.
    """

    def __init__(self, error_type: str, message: str) -> None:
        super().__init__(error_type, message)
        self.error_type = error_type
        self.message = message

    def __str__(self) -> str:
        return f"{self.error_type}: {self.message}"


class ConfigError(ValueError):
    """A setting, manifest or output directory that the job cannot run with; nothing has been started."""
