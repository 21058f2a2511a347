"""What a dashboard sees of a session, and the verbs it may use."""

from wiseflow_nb.view._protocol import LocalSession, SessionView
from wiseflow_nb.view._stored import alert_views, wiseflow_version
from wiseflow_nb.view._views import LocalView, StoreView, default_view

__all__ = [
    "LocalSession",
    "LocalView",
    "SessionView",
    "StoreView",
    "alert_views",
    "default_view",
    "wiseflow_version",
]
