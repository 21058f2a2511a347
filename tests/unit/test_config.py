"""Settings: sources, precedence, errors that name what is wrong, all-or-nothing changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from wiseflow_nb.config import Settings, allowed_range, canonical_name, is_secret, load_settings, unit_of
from wiseflow_nb.errors import ConfigurationError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_documented_defaults() -> None:
    settings = load_settings(environ={}, files=[])
    assert settings.resource_check_interval == 10.0
    assert (settings.cpu_threshold, settings.memory_threshold, settings.disk_threshold) == (90.0, 85.0, 90.0)
    assert settings.thresholds() == {"cpu": (0.72, 0.9), "memory": (0.68, 0.85), "disk": (0.72, 0.9)}
    assert (settings.min_thread_workers, settings.max_thread_workers, settings.max_concurrent_tasks) == (2, 8, 4)
    assert not settings.auto_shutdown_enabled
    assert (settings.auto_shutdown_idle_time, settings.auto_shutdown_check_interval) == (3600.0, 300.0)
    assert (settings.dashboard_address, settings.dashboard_port) == ("127.0.0.1", 5000)
    assert {settings.source(name) for name in Settings.model_fields} == {"default"}


def test_the_strongest_source_wins_and_is_named(tmp_path: Path) -> None:
    near = write(tmp_path / "near.toml", "CPU_THRESHOLD = 71\nmemory_threshold = 61\n")
    far = write(tmp_path / "far.toml", "cpu_threshold = 72\ndisk_threshold = 62\nmax_thread_workers = 5\n")
    settings = load_settings(
        {"MAX_THREAD_WORKERS": 7, "disk_path": None},
        environ={
            "WISEFLOW_MEMORY_THRESHOLD": "63",
            "WISEFLOW_MAX_THREAD_WORKERS": "6",
            "WISEFLOW_REQUIRE_BROWSER": "1",
        },
        files=[near, far, tmp_path / "missing.toml"],
    )
    got = {
        name: (getattr(settings, name), settings.source(name))
        for name in ("cpu_threshold", "disk_threshold", "memory_threshold", "max_thread_workers", "disk_path")
    }
    assert got == {
        "cpu_threshold": (71.0, str(near)),
        "disk_threshold": (62.0, str(far)),
        "memory_threshold": (63.0, "environment"),
        "max_thread_workers": (7, "argument"),
        "disk_path": (".", "default"),
    }


@pytest.mark.parametrize("text", ["true", "1", "yes", "on"])
def test_a_switch_reads_as_people_write_it(text: str) -> None:
    assert load_settings(environ={"WISEFLOW_AUTO_SHUTDOWN_ENABLED": text}, files=[]).auto_shutdown_enabled


@pytest.mark.parametrize(
    ("arguments", "environ", "words"),
    [
        ({"cpu_threshold": 140}, {}, ["CPU_THRESHOLD=140", "argument", "from 0 to 100", "%"]),
        ({}, {"WISEFLOW_CPU_THRESHOLD": "much"}, ["CPU_THRESHOLD='much'", "environment", "from 0 to 100"]),
        ({"cpu_treshold": 80}, {}, ["cpu_treshold", "argument", "CPU_THRESHOLD"]),
        ({"min_thread_workers": 9}, {}, ["MIN_THREAD_WORKERS=9", "MAX_THREAD_WORKERS=8"]),
        ({"cpu_threshold": float("nan")}, {}, ["CPU_THRESHOLD=nan"]),
        ({"dashboard_port": 0}, {}, ["DASHBOARD_PORT=0", "from 1 to 65535"]),
    ],
)
def test_a_bad_value_is_named_with_its_source_and_what_is_allowed(
    arguments: dict[str, object], environ: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(arguments, environ=environ, files=[])
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_secret_is_never_shown() -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_settings({"dashboard_token": ["hunter2"]}, environ={}, files=[])
    assert "hunter2" not in str(caught.value)
    assert "dashboard_token" not in load_settings({"dashboard_token": "hunter2"}, environ={}, files=[]).public_values()


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    broken = write(tmp_path / "wiseflow.toml", "cpu_threshold = = 3")
    with pytest.raises(ConfigurationError, match=r"wiseflow\.toml is not valid TOML"):
        load_settings(environ={}, files=[broken])
    unknown = write(tmp_path / "other.toml", "colour = 'red'")
    with pytest.raises(ConfigurationError, match=r"'colour' \(from .*other\.toml\)"):
        load_settings(environ={}, files=[unknown])


def test_a_change_is_all_or_nothing_and_makes_a_new_object() -> None:
    first = load_settings(environ={}, files=[])
    second = first.replaced({"CPU_THRESHOLD": "80"}, source="dashboard")
    assert (first.cpu_threshold, second.cpu_threshold) == (90.0, 80.0)
    assert (second.source("cpu_threshold"), second.source("disk_threshold")) == ("dashboard", "default")
    with pytest.raises(ConfigurationError, match=r"DISK_THRESHOLD=0 \(from dashboard\)"):
        second.replaced({"cpu_threshold": 70, "disk_threshold": 0}, source="dashboard")
    assert second.cpu_threshold == 80.0


def test_settings_cannot_be_assigned() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().cpu_threshold = 1.0


def test_names_units_ranges_and_secrets() -> None:
    assert canonical_name("WISEFLOW_CPU_THRESHOLD") == canonical_name("Cpu_Threshold") == "cpu_threshold"
    assert (unit_of("cpu_threshold"), unit_of("disk_path")) == ("%", "")
    assert allowed_range("max_thread_workers") == (1, 1024)
    assert allowed_range("disk_path") == (None, None)
    assert [name for name in Settings.model_fields if is_secret(name)] == ["dashboard_token"]
    assert all(field.description for field in Settings.model_fields.values())
