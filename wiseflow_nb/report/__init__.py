"""How a session ended: the facts of its last minutes, their likeliest cause, and a page that shows both."""

from wiseflow_nb.report._diagnose import diagnose
from wiseflow_nb.report._facts import Cause, Confidence, Facts, Growth, Shutdown
from wiseflow_nb.report._gather import gather
from wiseflow_nb.report._report import Report
from wiseflow_nb.report._telling import Telling

__all__ = ["Cause", "Confidence", "Facts", "Growth", "Report", "Shutdown", "Telling", "diagnose", "gather"]
