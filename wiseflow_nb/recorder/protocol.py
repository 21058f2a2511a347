"""What travels through the two pipes: one JSON object a line, its kind under ``"t"``.

Kernel to recorder: the configuration (first line), ``batch`` (seq, rows, and how many bytes of
packed rows follow its line), ``configure`` (rev,
settings), ``busy`` (value), ``verb`` (id, verb, arguments), ``answer`` (id of a command, ok,
message), ``sync``, ``end`` (reason). Recorder to kernel: ``ready``, ``failed`` (message: why
it cannot run), ``ack`` (seq), ``alert``,
``event``, ``command`` (id, verb, arguments, who), ``answer`` (id of a verb), ``configured`` (rev),
``synced``, ``ended``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wiseflow_nb.errors import RecorderError
from wiseflow_nb.records import TIER_RETENTION_SECONDS, text_of
from wiseflow_nb.resources._rules import AlertPlan, rule_from
from wiseflow_nb.resources._sampler import SamplingPlan


@dataclass(frozen=True, slots=True)
class RecorderSettings:
    """The settings that the recorder needs, without the settings library: ``public`` is for readers."""

    plan: SamplingPlan = field(default_factory=SamplingPlan)
    public: Mapping[str, Any] = field(default_factory=dict)

    @property
    def revision(self) -> int:
        """The number of the change that made these."""
        return self.plan.revision


@dataclass(frozen=True, slots=True)
class RecorderConfig:
    """What a recorder is started with. ``pid`` is the kernel's; ``directory`` the session's.

    ``started_seconds`` (epoch) is when the session began, 0 for now; ``notice`` says what about the
    recording is not as it should be; ``tier_retention_seconds`` says how long samples are kept in each
    tier (raw, 10 s, 60 s).
    """

    session_id: str
    directory: str
    pid: int
    title: str
    identity: Mapping[str, Any]
    settings: RecorderSettings
    retention_days: float = 14.0
    retention_bytes: int = 500_000_000
    notice: str = ""
    started_seconds: float = 0.0
    resume: bool = False
    own_process: bool = True
    tier_retention_seconds: Sequence[float] = TIER_RETENTION_SECONDS


def encode(message: Mapping[str, Any]) -> bytes:
    """Return one line."""
    return json.dumps(message, separators=(",", ":"), default=_text).encode("ascii") + b"\n"


def _text(value: object) -> str:
    """What JSON has no word for (an event's data may be anything) travels as its text."""
    return text_of(value)[:1000]


def decode(line: bytes) -> dict[str, Any]:
    """Return the message of one line.

    Raises
    ------
    RecorderError
        If the line is not a message.
    """
    try:
        message = json.loads(line)
    except ValueError as error:
        raise RecorderError(f"a line on the recorder's pipe is not a message: {line[:80]!r}") from error
    if not isinstance(message, dict) or not isinstance(message.get("t"), str):
        raise RecorderError(f"a line on the recorder's pipe is not a message: {line[:80]!r}")
    return message


def settings_from(values: Mapping[str, Any]) -> RecorderSettings:
    """Return the settings from their JSON form."""
    plan = values["plan"]
    alerts = plan["alerts"]
    thresholds = {str(name): (float(pair[0]), float(pair[1])) for name, pair in alerts["thresholds"].items()}
    return RecorderSettings(
        SamplingPlan(
            **{
                **plan,
                "alerts": AlertPlan(**{**alerts, "thresholds": thresholds}),
                "rules": tuple(rule_from(rule) for rule in plan["rules"]),
                "replaced": tuple((str(name), str(resource)) for name, resource in plan["replaced"]),
            }
        ),
        values["public"],
    )


def config_from(values: Mapping[str, Any]) -> RecorderConfig:
    """Return the configuration from its JSON form."""
    return RecorderConfig(**{**values, "settings": settings_from(values["settings"])})
