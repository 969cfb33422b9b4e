"""What the log says of an exception that nobody expected."""

from __future__ import annotations

import logging
import traceback


def log_defect(logger: logging.Logger, error: BaseException) -> None:
    """Log where it happened, without its message: that may quote what a user wrote."""
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("internal error: %s\n%s", type(error).__name__, where)
