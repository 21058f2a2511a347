"""The thread pool: an executor with classes of priority, live size, and figures per task."""

from wiseflow_nb.pool.manager import ThreadPoolManager

__all__ = ["ThreadPoolManager"]
