"""The settings: one immutable object, from arguments, environment, file and defaults.

Sources, strongest first: arguments, environment ``WISEFLOW_<NAME>``, ``wiseflow.toml`` (in the
working directory, then in the user's configuration directory), defaults. Public names are upper
case; attributes are the same words in lower case.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from wiseflow_nb.errors import ConfigurationError

ENVIRONMENT_PREFIX = "WISEFLOW_"
FILE_NAME = "wiseflow.toml"


class Settings(BaseModel):
    """All settings of a session, validated together; immutable.

    ``Settings(...)`` takes arguments and defaults only; ``load_settings`` reads every source.
    A change is a new object: ``settings.replaced({"cpu_threshold": 80}, source="argument")``.

    Raises
    ------
    ConfigurationError
        From ``load_settings`` and ``replaced``, naming the setting, its value, the source and
        what is allowed.

    Examples
    --------
    >>> settings = Settings()
    >>> settings.cpu_threshold, settings.warning_ratio("cpu")
    (90.0, 0.72)
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    resource_check_interval: float = Field(
        default=10.0, ge=0.02, le=3600, description="between samples while idle", json_schema_extra={"unit": "s"}
    )
    busy_check_interval: float = Field(
        default=1.0,
        ge=0.02,
        le=3600,
        description="between samples while a cell or task runs or a dashboard watches",
        json_schema_extra={"unit": "s"},
    )
    cpu_threshold: float = Field(
        default=90.0, gt=0, le=100, description="critical CPU use", json_schema_extra={"unit": "%"}
    )
    memory_threshold: float = Field(
        default=85.0, gt=0, le=100, description="critical memory use", json_schema_extra={"unit": "%"}
    )
    disk_threshold: float = Field(
        default=90.0, gt=0, le=100, description="critical disk use", json_schema_extra={"unit": "%"}
    )
    warning_threshold_factor: float = Field(
        default=0.8, gt=0, lt=1, description="warning level = critical level x this", json_schema_extra={"unit": "x"}
    )
    alert_for_seconds: float = Field(
        default=5.0,
        ge=0,
        le=3600,
        description="a condition must hold this long to fire",
        json_schema_extra={"unit": "s"},
    )
    alert_keep_seconds: float = Field(
        default=15.0,
        ge=0,
        le=3600,
        description="it must stay clear this long to resolve",
        json_schema_extra={"unit": "s"},
    )
    alert_clear_factor: float = Field(
        default=0.95, gt=0, le=1, description="it clears below the level x this", json_schema_extra={"unit": "x"}
    )
    alert_repeat_seconds: float = Field(
        default=0.0,
        ge=0,
        le=86_400,
        description="while it fires, an alert is told again so often (0: never)",
        json_schema_extra={"unit": "s"},
    )
    memory_full_within: float = Field(
        default=600.0,
        ge=0,
        le=86_400,
        description="warn when memory is full in less than this at its present rate (0: never)",
        json_schema_extra={"unit": "s"},
    )
    disk_full_within: float = Field(
        default=3600.0,
        ge=0,
        le=604_800,
        description="warn when the disk is full in less than this at its present rate (0: never)",
        json_schema_extra={"unit": "s"},
    )
    audit_interval: float = Field(
        default=60.0,
        ge=0,
        le=86_400,
        description="between looks for what leaks (0: never)",
        json_schema_extra={"unit": "s"},
    )
    disk_path: str = Field(
        default=".", min_length=1, description="the path, or paths joined as in PATH, whose file system is watched"
    )
    max_thread_workers: int = Field(default=8, ge=1, le=1024, description="most workers of the pool")
    min_thread_workers: int = Field(default=2, ge=1, le=1024, description="least workers of the pool")
    max_concurrent_tasks: int = Field(default=4, ge=1, le=4096, description="tasks that run at once")
    auto_shutdown_enabled: bool = Field(default=False, description="stop the workers when idle")
    auto_shutdown_idle_time: float = Field(
        default=3600.0,
        ge=1,
        le=31_536_000,
        description="idle this long before stopping",
        json_schema_extra={"unit": "s"},
    )
    auto_shutdown_check_interval: float = Field(
        default=300.0,
        ge=0.1,
        le=86_400,
        description="between looks at whether it is idle",
        json_schema_extra={"unit": "s"},
    )
    auto_shutdown_kernel: bool = Field(default=False, description="when idle, stop the kernel, too")
    track_cells: bool = Field(default=True, description="record every cell execution")
    recorder_enabled: bool = Field(default=True, description="record in a process of its own (else on a thread)")
    state_dir: str = Field(default="", description="where sessions are kept (empty: the user's state directory)")
    retention_days: float = Field(
        default=14.0, gt=0, le=3650, description="ended sessions are kept this long", json_schema_extra={"unit": "d"}
    )
    dashboard_address: str = Field(default="127.0.0.1", min_length=1, description="address the dashboard listens on")
    dashboard_port: int = Field(default=5000, ge=1, le=65535, description="port the dashboard listens on")
    dashboard_token: str = Field(
        default="",
        description="token of the dashboard (empty: a new one each time)",
        json_schema_extra={"secret": True},
    )

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _bounds_agree(self) -> Self:
        if self.min_thread_workers > self.max_thread_workers:
            raise ValueError(
                f"MIN_THREAD_WORKERS={self.min_thread_workers} is more than "
                f"MAX_THREAD_WORKERS={self.max_thread_workers}; raise the second or lower the first"
            )
        return self

    def source(self, name: str) -> str:
        """Where a setting's value came from: ``argument``, ``environment``, a file's path or ``default``."""
        return self._sources.get(name, "argument" if name in self.model_fields_set else "default")

    def critical_ratio(self, resource: str) -> float:
        """The critical level of ``cpu``, ``memory`` or ``disk`` as a ratio of 0-1."""
        return float(getattr(self, f"{resource}_threshold")) / 100.0

    def warning_ratio(self, resource: str) -> float:
        """The warning level of ``cpu``, ``memory`` or ``disk`` as a ratio of 0-1."""
        return round(self.critical_ratio(resource) * self.warning_threshold_factor, 6)

    def thresholds(self) -> dict[str, tuple[float, float]]:
        """``{"cpu": (warning, critical), ...}`` as ratios of 0-1."""
        return {name: (self.warning_ratio(name), self.critical_ratio(name)) for name in ("cpu", "memory", "disk")}

    def replaced(self, changes: Mapping[str, Any], source: str = "argument") -> Settings:
        """Return new settings with the changes applied, all or none."""
        values = self.model_dump()
        sources = {name: self.source(name) for name in values}
        for name, value in changes.items():
            key = canonical_name(name, source)
            values[key] = value
            sources[key] = source
        return _validated(values, sources)

    def public_values(self) -> dict[str, Any]:
        """Every setting but the secret ones, by lower-case name."""
        return {name: value for name, value in self.model_dump().items() if not is_secret(name)}


def canonical_name(name: str, source: str = "argument") -> str:
    """Return the attribute name of a setting given in any case.

    Raises
    ------
    ConfigurationError
        If there is no such setting.
    """
    key = name.lower().removeprefix(ENVIRONMENT_PREFIX.lower())
    if key not in Settings.model_fields:
        known = ", ".join(item.upper() for item in Settings.model_fields)
        raise ConfigurationError(f"unknown setting {name!r} (from {source}); the settings are: {known}")
    return key


def is_secret(name: str) -> bool:
    """Whether a setting's value must not be shown."""
    extra = Settings.model_fields[name].json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("secret"))


def unit_of(name: str) -> str:
    """The unit of a setting, or an empty string."""
    extra = Settings.model_fields[name].json_schema_extra
    return str(extra.get("unit", "")) if isinstance(extra, dict) else ""


def allowed_range(name: str) -> tuple[float | None, float | None]:
    """The least and the most that a numeric setting takes, None where there is no such bound."""
    low: float | None = None
    high: float | None = None
    for item in Settings.model_fields[name].metadata:
        low = getattr(item, "ge", getattr(item, "gt", None)) if low is None else low
        high = getattr(item, "le", getattr(item, "lt", None)) if high is None else high
    return low, high


def default_files(environ: Mapping[str, str] | None = None) -> list[Path]:
    """The files that are read when they exist, strongest first."""
    import platformdirs

    return [Path.cwd() / FILE_NAME, Path(platformdirs.user_config_dir("wiseflow_nb")) / FILE_NAME]


def load_settings(
    arguments: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    files: Iterable[Path] | None = None,
) -> Settings:
    """Return the settings from every source.

    Parameters
    ----------
    arguments
        Names (any case) to values; the strongest source. None values are left out.
    environ
        Default ``os.environ``; variables ``WISEFLOW_<NAME>`` count, others that start so do not.
    files
        TOML files, strongest first; missing ones are passed over. Default ``default_files()``.

    Raises
    ------
    ConfigurationError
        Names the setting, its value, the source and what is allowed.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for path in reversed(list(default_files() if files is None else files)):
        for name, value in _read_file(path).items():
            key = canonical_name(name, str(path))
            values[key], sources[key] = value, str(path)
    for variable, text in environ.items():
        key = variable.lower().removeprefix(ENVIRONMENT_PREFIX.lower())
        if variable.upper().startswith(ENVIRONMENT_PREFIX) and key in Settings.model_fields:
            values[key], sources[key] = text, "environment"
    for name, value in (arguments or {}).items():
        if value is not None:
            key = canonical_name(name)
            values[key], sources[key] = value, "argument"
    return _validated(values, sources)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            return tomllib.load(stream)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is not valid TOML: {error}; mend or remove it") from error
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error.strerror}); mend its permissions or remove it"
        ) from error


def _validated(values: Mapping[str, Any], sources: Mapping[str, str]) -> Settings:
    try:
        settings = Settings(**values)
    except ValidationError as error:
        raise ConfigurationError(_explain(error, sources)) from None
    settings._sources.update({name: sources.get(name, "default") for name in Settings.model_fields})
    return settings


def _explain(error: ValidationError, sources: Mapping[str, str]) -> str:
    lines = []
    for item in error.errors(include_url=False, include_context=False):
        if not item["loc"]:
            lines.append(str(item["msg"]).removeprefix("Value error, "))
            continue
        name = str(item["loc"][0])
        shown = "(hidden)" if is_secret(name) else repr(item["input"])
        low, high = allowed_range(name)
        unit = unit_of(name)
        allowed = str(item["msg"])
        if low is not None or high is not None:
            allowed = f"allowed is a number from {low} to {high}" + (f" {unit}" if unit else "")
        lines.append(f"{name.upper()}={shown} (from {sources.get(name, 'argument')}): {allowed}")
    return "; ".join(lines)
