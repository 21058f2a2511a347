"""The plain task manager: the oracle that the fast one must agree with under the stateful suite."""

from tests.oracles.plain_tasks._admission import memory_gauges
from tests.oracles.plain_tasks._retry import Retry
from tests.oracles.plain_tasks.manager import TaskManager
from tests.oracles.plain_tasks.task import Task

__all__ = ["Retry", "Task", "TaskManager", "memory_gauges"]
