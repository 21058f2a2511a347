"""The commands table: both sides check alike, and what does not fit is refused with a reason and changes nothing."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wiseflow_nb.config import Settings, is_secret
from wiseflow_nb.errors import CommandError, UsageError
from wiseflow_nb.frames import command_frame, export_frame
from wiseflow_nb.recorder._desk import CommandDesk
from wiseflow_nb.records import CommandResult
from wiseflow_nb.store.commands import (
    MAX_ARGUMENT_BYTES,
    VERBS,
    is_secret_name,
    logged,
    open_to_send,
    patiently,
    send,
    validate,
)
from wiseflow_nb.store.paths import database_uri
from wiseflow_nb.store.reader import StoreReader
from wiseflow_nb.store.writer import COMMANDS_AT_ONCE, StoreWriter
from wiseflow_nb.testing import FakeClock
from wiseflow_nb.view import StoreView

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
VALID: dict[str, dict[str, Any]] = {
    "watch": {"seconds": 10},
    "cancel": {"task_id": "t1"},
    "retry": {"task_id": "t1"},
    "reprioritise": {"task_id": "t1", "priority": "High"},
    "pause": {},
    "resume": {},
    "resize": {"min_workers": 1, "max_workers": 2},
    "configure": {"changes": {"cpu_threshold": 80}},
    "acknowledge": {"alert_id": "a1"},
    "silence": {"alert_id": "a1", "seconds": 60.0},
    "shutdown": {"mode": "drain"},
}


class Line:
    """What the desk hands up."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)


class Watched:
    """A sampler that has one alert, ``a1``."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def watch(self, seconds: float) -> None:
        self.calls.append(("watch", seconds))

    def acknowledge(self, alert_id: str) -> bool:
        self.calls.append(("acknowledge", alert_id))
        return alert_id == "a1"

    def silence(self, alert_id: str, until: float) -> bool:
        self.calls.append(("silence", alert_id))
        return alert_id == "a1"


class Office:
    """A desk over a file, and a connection of somebody who commands."""

    def __init__(self, directory: Path) -> None:
        self.writer = StoreWriter(directory / "session.sqlite")
        self.line, self.clock, self.sampler = Line(), FakeClock(), Watched()
        self.later: list[Any] = []
        self.desk = CommandDesk(self.writer, self.line, self.clock, self.later.append, lambda event: None)
        self.desk.sampler = self.sampler
        self.outside = sqlite3.connect(directory / "session.sqlite", isolation_level=None)
        self.directory = directory

    def insert(self, verb: Any, arguments: Any, *, who: Any = "me", created: Any = None) -> int:
        created = self.clock.time() if created is None else created
        return self.outside.execute(
            "INSERT INTO commands (created_seconds, who, verb, arguments) VALUES (?, ?, ?, ?)",
            (created, who, verb, arguments),
        ).lastrowid

    def row(self, number: int) -> tuple[Any, ...]:
        return self.outside.execute("SELECT status, ok, message FROM commands WHERE id = ?", (number,)).fetchone()

    def close(self) -> None:
        self.outside.close()
        self.writer.close()


@pytest.fixture
def office(tmp_path: Path):
    made = Office(tmp_path)
    yield made
    made.close()


def test_every_verb_has_an_example_here() -> None:
    assert VALID.keys() == VERBS.keys()


@pytest.mark.parametrize("verb", VERBS)
def test_what_fits_is_taken_on_both_sides(verb: str, office: Office) -> None:
    assert validate(verb, VALID[verb]) == VALID[verb]
    number = office.insert(verb, json.dumps(VALID[verb]))
    office.desk.poll()
    handed_up = [message for message in office.line.sent if message["id"] == number]
    if verb in ("watch", "acknowledge", "silence"):
        assert office.row(number)[:2] == ("done", 1)
        assert handed_up == []
    else:
        assert office.row(number)[0] == "taken"
        assert handed_up == [{"t": "command", "id": number, "verb": verb, "arguments": VALID[verb], "who": "me"}]


@settings(deadline=None)
@given(st.sampled_from(sorted(VERBS)) | st.text(max_size=10), JSON)
def test_validation_returns_what_it_was_given_or_says_why_not(verb: str, arguments: Any) -> None:
    refused = ""
    try:
        assert validate(verb, arguments) is arguments
    except UsageError as error:
        refused = str(error)
    assert len(refused) < 400
    assert bool(refused) or verb in VERBS


@pytest.mark.parametrize("verb", VERBS)
@settings(deadline=None)
@given(value=JSON)
def test_any_value_in_any_place_is_judged(verb: str, value: Any) -> None:
    for name in VALID[verb]:
        with contextlib.suppress(UsageError):
            validate(verb, VALID[verb] | {name: value})


@pytest.mark.parametrize(
    ("verb", "arguments", "reason"),
    [
        ("cancel", {"task_id": "t" * 257}, "task's id"),
        ("configure", {"changes": {"x": "y" * MAX_ARGUMENT_BYTES}}, "over 65536 bytes"),
        ("configure", {"changes": {"x": object()}}, "cannot be sent"),
        ("watch", {"seconds": 10**5000}, "number"),
        ("watch", {"seconds": float("nan")}, "number"),
        ("watch", {"seconds": True}, "number"),
        (["pause"], {}, "unknown command"),
        ("pause", None, "takes exactly"),
        ("pause", {"now": 1}, "takes exactly"),
        ("resize", {"min_workers": 1}, "takes exactly"),
        ("shutdown", {"mode": ["now"]}, "drain"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_sent(verb: Any, arguments: Any, reason: str, office: Office) -> None:
    with pytest.raises(UsageError, match=reason):
        send(office.outside, verb, arguments, who="me", now=0.0)
    assert office.outside.execute("SELECT count(*) FROM commands").fetchone() == (0,)


@pytest.mark.parametrize(
    ("verb", "arguments", "created", "reason"),
    [
        ("format_disk", "{}", None, "unknown command"),
        ("", "{}", None, "unknown command"),
        ("x" * 1_000_000, "{}", None, "unknown command"),
        (b"\xff\xfe", "{}", None, "unknown command"),
        ("pause", "{", None, "not JSON"),
        ("pause", "[" * 60_000, None, "refused"),
        ("pause", "null", None, "takes exactly"),
        ("pause", b"\x00\xff", None, "not JSON"),
        ("cancel", '{"task_id": {}}', None, "task's id"),
        ("configure", '{"changes": {"x": "' + "y" * 70_000 + '"}}', None, "over 65536 bytes"),
        ("pause", "{}" + " " * 1_000_000, None, "over 65536 bytes"),
        ("pause", "{}", 0.0, "older than"),
        ("pause", "{}", 1e300, "dated in the future"),
        ("pause", "{}", float("inf"), "does not say when"),
        ("pause", "{}", "yesterday", "does not say when"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_and_changes_nothing(
    verb: Any, arguments: Any, created: Any, reason: str, office: Office
) -> None:
    bad = office.insert(verb, arguments, created=created)
    good = office.insert("pause", "{}")
    office.desk.poll()
    status, ok, message = office.row(bad)
    assert (status, ok) == ("done", 0)
    assert reason in message
    assert len(message) < 1000
    assert [message["id"] for message in office.line.sent] == [good]
    assert office.sampler.calls == []


def test_more_commands_than_are_taken_at_once_are_all_taken(office: Office) -> None:
    for number in range(COMMANDS_AT_ONCE * 2 + 10):
        office.insert("cancel", json.dumps({"task_id": f"t{number}"}))
    for _ in range(4):
        office.desk.poll()
    asked = [message["arguments"]["task_id"] for message in office.line.sent]
    assert asked == [f"t{number}" for number in range(COMMANDS_AT_ONCE * 2 + 10)]


def test_nothing_is_read_while_nobody_wrote(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    office.desk.poll()
    monkeypatch.setattr(office.writer, "new_commands", lambda: pytest.fail("the table was read"))
    office.desk.poll()


def test_a_command_whose_taking_was_not_committed_is_carried_out_once(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = office.insert("retry", '{"task_id": "t1"}')
    with monkeypatch.context() as patch:
        patch.setattr(office.writer, "commit", lambda: (_ for _ in ()).throw(sqlite3.OperationalError("disk is full")))
        with pytest.raises(sqlite3.OperationalError):
            office.desk.poll()
    assert office.line.sent == []
    office.writer.rollback()
    office.desk.look_again()
    office.desk.poll()
    office.desk.poll()
    assert [message["id"] for message in office.line.sent] == [number]


def test_a_command_that_nobody_took_is_withdrawn_and_one_that_was_taken_is_not(office: Office) -> None:
    now = office.clock.time()
    with pytest.raises(CommandError, match="was withdrawn"):
        send(office.outside, "pause", {}, who="me", now=now, timeout=0.01, poll=0.001)
    office.desk.poll()
    assert office.line.sent == []
    number = office.insert("pause", "{}")
    office.desk.poll()
    office.writer.give_up_commands("the session ended", now)
    office.writer.commit()
    assert office.row(number) == ("done", 0, "the session ended")


def test_a_recorder_that_takes_over_gives_up_what_was_taken_and_carries_out_what_was_not(office: Office) -> None:
    taken = office.insert("pause", "{}")
    office.desk.poll()
    office.writer.commit()
    fresh = office.insert("resume", "{}")
    office.writer.give_up_commands("it was replaced", office.clock.time(), taken_only=True)
    office.writer.commit()
    office.desk.poll()
    assert office.row(taken) == ("done", 0, "it was replaced")
    assert [message["id"] for message in office.line.sent][-1] == fresh


def test_the_audit_is_readable_afterwards(office: Office) -> None:
    hostile = "'; DROP TABLE tasks; -- <b>\x00"
    office.insert("watch", '{"seconds": 10}')
    first = office.insert("cancel", '{"task_id": "t1"}', who=hostile)
    office.insert("nonsense", b"\xff\xfe", who=b"\xff")
    office.desk.poll()
    office.desk.answer(first, True, "t1 was asked to stop")
    row = logged("pause", {}, "this kernel", CommandResult(True, "paused"), office.clock.time())
    office.writer.apply([["command", row]])
    office.writer.commit()
    reader = StoreReader(office.directory)
    rows = reader.commands()
    assert [(who, verb, ok) for _, who, verb, _, _, ok, _, _ in rows] == [
        (hostile, "cancel", 1),
        ("�", "nonsense", 0),
        ("this kernel", "pause", 1),
    ]
    assert [row[4] for row in rows] == ["done"] * 3
    assert [row[6] for row in rows][::2] == ["t1 was asked to stop", "paused"]
    assert all(row[7] == office.clock.time() for row in rows)
    assert len(reader.commands(1)) == 1
    reader.close()


def test_a_row_with_the_greatest_id_blocks_no_later_command(office: Office) -> None:
    with office.outside:
        office.outside.execute(
            "INSERT INTO commands (id, created_seconds, who, verb, arguments) VALUES (?, ?, 'x', 'pause', '{}')",
            (2**63 - 1, office.clock.time()),
        )
    office.desk.poll()
    # What the kernel logs of its own must not fail either: all else is written with it.
    row = {"created_seconds": 1.0, "who": "k", "verb": "pause", "arguments": "{}", "status": "done", "ok": 1}
    office.writer.apply([("command", row), ("command", row)])
    office.writer.commit()
    with pytest.raises(CommandError, match="withdrawn"):
        send(office.outside, "resume", {}, who="me", now=office.clock.time(), timeout=0.01)
    ids = [number for (number,) in office.outside.execute("SELECT id FROM commands ORDER BY id")]
    assert ids == [1, 2, 3, 2**63 - 1]


@pytest.mark.parametrize("created", [float("inf"), 1e300, -1e18, b"zz", "text", 2**62])
def test_a_row_with_a_moment_that_is_none_leaves_the_audit_readable(office: Office, created: Any) -> None:
    office.insert("shutdown", '{"mode": "now"}', created=created)
    office.desk.poll()
    office.outside.execute("UPDATE commands SET ok = 1, finished_seconds = created_seconds")
    office.outside.execute("INSERT INTO commands VALUES (9, 1.0, 'x', 'pause', '{}', 'done', x'00', x'ff', 'never')")
    with contextlib.closing(StoreReader(office.directory)) as reader:
        frame = command_frame(reader.commands())
    assert len(frame) == 2
    assert frame.index[:1].isna().all()
    assert frame.ok.isna().tolist() == [False, True]
    assert frame.finished.isna().all()
    assert export_frame(frame, office.directory / "c.csv").exists()
    with contextlib.closing(StoreView(office.directory)) as view:
        assert view.report().to_html()


def test_every_secret_setting_is_hidden_by_its_name() -> None:
    for name in Settings.model_fields:
        assert is_secret_name(name) == is_secret_name(f"WISEFLOW_{name.upper()}") == is_secret(name), name


def test_a_secret_is_refused_by_both_sides_and_not_kept(office: Office) -> None:
    number = office.insert("configure", '{"changes": {"Dashboard_Token": "sEcReT", "cpu_threshold": 80}}')
    office.desk.poll()
    assert office.line.sent == []
    status, ok, message = office.row(number)
    assert (status, ok) == ("done", 0)
    assert message.startswith("refused: DASHBOARD_TOKEN is secret")
    changes = {"dashboard_token": "sEcReT"}
    with pytest.raises(UsageError, match="DASHBOARD_TOKEN is secret"):
        send(office.outside, "configure", {"changes": changes}, who="me", now=office.clock.time(), timeout=0.01)
    kept = [row[0] for row in office.outside.execute("SELECT arguments FROM commands ORDER BY id")]
    assert [json.loads(text) for text in kept] == [{"changes": {"Dashboard_Token": "(hidden)", "cpu_threshold": 80}}]
    row = logged("configure", {"changes": {"dashboard_token": "sEcReT"}}, "me", CommandResult(True, ""), 1.0)
    assert "sEcReT" not in str(row)


def test_a_command_dated_in_the_future_is_told_so(office: Office) -> None:
    number = office.insert("pause", "{}", created=office.clock.time() + 100.0)
    office.desk.poll()
    assert "dated in the future" in office.row(number)[2]


def test_who_sends_comes_next_when_the_file_is_free_and_gives_up_when_it_never_is(office: Office) -> None:
    uri = database_uri(office.directory / "session.sqlite", "rw")
    with contextlib.closing(open_to_send(uri)) as connection:
        office.writer.begin()
        office.writer.meta("heartbeat", 1.0)
        asked = 0

        def trace(_: str) -> None:
            nonlocal asked
            asked += 1
            if asked == 5:
                office.writer.commit()

        connection.set_trace_callback(trace)
        statement = "INSERT INTO commands (created_seconds, who, verb, arguments) VALUES (1, 'w', 'pause', '{}')"
        number = patiently(connection, statement, patience=30.0, poll=0.0).lastrowid
        assert asked >= 5
        assert office.row(number)[0] == "new"
        office.writer.meta("heartbeat", 2.0)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            patiently(connection, statement, patience=0.0)
        # What is wrong in itself is not tried again.
        with pytest.raises(sqlite3.OperationalError, match="no such table"):
            patiently(connection, "INSERT INTO nowhere VALUES (1)", patience=30.0)
        assert connection.execute("PRAGMA synchronous").fetchone() == (1,)
        assert connection.execute("PRAGMA wal_autocheckpoint").fetchone() == (0,)
        office.writer.commit()
