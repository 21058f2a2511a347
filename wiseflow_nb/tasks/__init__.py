"""The task manager: dependencies, priorities, retries, time-outs, cancel and cleanup."""

from wiseflow_nb.tasks._admission import memory_gauges
from wiseflow_nb.tasks._retry import Retry
from wiseflow_nb.tasks.manager import TaskManager
from wiseflow_nb.tasks.task import Task

__all__ = ["Retry", "Task", "TaskManager", "memory_gauges"]
