"""The plain task manager: the oracle that the fast one must agree with under the stateful suite.

Only what schedules is its own; retry delays, admission, output and the like are pure, and the package's.
"""

from tests.oracles.plain_tasks.manager import TaskManager
from tests.oracles.plain_tasks.task import Task
from wiseflow_nb.tasks._admission import memory_gauges
from wiseflow_nb.tasks._retry import Retry

__all__ = ["Retry", "Task", "TaskManager", "memory_gauges"]
