const ROW = 36;
const [ID, NAME, STATE, PRIORITY, PROGRESS, SINCE, QUEUE, WALL, CPU, ATTEMPT, OF, ERROR] = Array.from({ length: 12 }, (_, i) => i);
const PRIORITIES = ["low", "normal", "high", "critical"];
const TERMINAL = new Set(["completed", "failed", "timed_out", "cancelled", "skipped", "abandoned", "lost"]);
const RETRYABLE = new Set(["failed", "timed_out", "cancelled", "skipped", "lost"]);
const RANK = { running: 0, cancelling: 1, retry_wait: 2, pending: 3, waiting: 4, failed: 5, timed_out: 6, lost: 7, abandoned: 8, cancelled: 9, skipped: 10, completed: 11 };
const GROUPS = [["", "All states"], ["active", "Running"], ["queued", "Queued"], ["problem", "Failed"], ["completed", "Completed"], ["stopped", "Cancelled, skipped"]];
const GROUP_OF = { running: "active", cancelling: "active", retry_wait: "queued", pending: "queued", waiting: "queued", failed: "problem", timed_out: "problem", lost: "problem", abandoned: "problem", completed: "completed", cancelled: "stopped", skipped: "stopped" };
const COLUMNS = [["state", "State"], ["name", "Name"], ["priority", "Priority"], ["progress", "Progress"], ["queue", "Queued"], ["wall", "Ran"], ["cpu", "CPU"], ["attempt", "Tries"], ["error", "Note"]];
const PLACE = { name: NAME, priority: PRIORITY, progress: PROGRESS, cpu: CPU, attempt: ATTEMPT, error: ERROR };

function message({ content, store, tell }) {
  const { data } = store;
  if (content.type === "rows") {
    if (content.all || !data.rows) {
      data.rows = new Map();
      data.count = 0;
      data.oldest = 0;
    }
    for (const row of content.rows) {
      const old = data.rows.get(row[ID]);
      if (old && content.older) continue;
      // Pages of older tasks come the newest first, each before all that is here.
      row.order = old ? old.order : content.older ? (data.oldest -= 1) : (data.count += 1);
      data.rows.set(row[ID], row);
    }
    store.skew = Date.now() / 1000 - content.now;
    tell({ type: "rows", ids: content.all ? null : content.rows.map((row) => row[ID]) });
  } else if (content.type === "details") tell(content);
}

const words = (state) => state.replace("_", " ");

export default wiseflow({
  message,
  view({ el, store, model }) {
    const line = answerLine();
    const chosen = { text: "", group: "", sort: "", down: false };
    let order = [];
    let focused = null;
    let open = null;
    const shown = new Map();
    const now = () => Date.now() / 1000 - store.skew;
    const stateOf = (row) => (store.parts.states || [])[row[STATE]] || "";
    const queueOf = (row) => row[QUEUE] ?? (["pending", "waiting", "retry_wait"].includes(stateOf(row)) && row[SINCE] ? now() - row[SINCE] : null);
    const wallOf = (row) => row[WALL] ?? (["running", "cancelling"].includes(stateOf(row)) && row[SINCE] ? now() - row[SINCE] : null);

    const filter = h("input", { class: "wf-input wf-filter", type: "search", placeholder: "Filter by name, id or error", "aria-label": "Filter tasks", "data-testid": "task-filter",
      oninput: () => { chosen.text = filter.value.trim().toLowerCase(); arrange(true); } });
    const group = h("select", { class: "wf-input", "aria-label": "Filter by state", "data-testid": "task-state-filter",
      onchange: () => { chosen.group = group.value; arrange(true); } }, ...GROUPS.map(([value, text]) => h("option", { value, text })));
    const count = h("span", { class: "wf-muted wf-count", "data-testid": "task-count" });
    const older = h("button", { class: "wf-button wf-small", type: "button", text: "Load older", title: "Show tasks that ended before those in the table", "data-testid": "task-older", hidden: true,
      onclick: () => { older.disabled = true; model.send({ type: "older" }); } });
    const heads = COLUMNS.map(([key, label]) => {
      const button = h("button", { class: "wf-sort", type: "button", text: label, "data-testid": `sort-${key}`, onclick: () => sortBy(key) });
      return [key, h("div", { class: `wf-c wf-c-${key}`, role: "columnheader" }, button)];
    });
    const head = h("div", { class: "wf-row wf-head", role: "row" }, ...heads.map(([, node]) => node), h("div", { class: "wf-c wf-c-actions", role: "columnheader", text: "Actions" }));
    const body = h("div", { class: "wf-rows", role: "rowgroup" });
    const empty = h("div", { class: "wf-empty wf-skeleton" });
    const scroller = h("div", { class: "wf-scroller", "data-testid": "task-scroller", onscroll: () => paint() }, body, empty);
    const grid = h("div", { class: "wf-grid", role: "grid", "aria-label": "Tasks", onkeydown: onKey }, head, scroller);
    const details = h("div", { class: "wf-details", "data-testid": "task-details", role: "region", "aria-label": "Task details", hidden: true });
    const panel = h("section", { class: "wf-panel wf-tasks", "data-testid": "tasks" },
      h("div", { class: "wf-toolbar" }, h("h3", { text: "Tasks" }), filter, group, count, older), line, grid, details);
    el.append(panel);

    function sortBy(key) {
      if (chosen.sort !== key) Object.assign(chosen, { sort: key, down: ["progress", "queue", "wall", "cpu", "attempt", "priority"].includes(key) });
      else if (chosen.down === ["progress", "queue", "wall", "cpu", "attempt", "priority"].includes(key)) chosen.down = !chosen.down;
      else chosen.sort = "";
      for (const [name, node] of heads) setAttr(node, "aria-sort", chosen.sort === name ? (chosen.down ? "descending" : "ascending") : "none");
      arrange(true);
    }

    function keyOf(row) {
      if (chosen.sort === "state") return RANK[stateOf(row)];
      if (chosen.sort === "queue") return queueOf(row);
      if (chosen.sort === "wall") return wallOf(row);
      return row[PLACE[chosen.sort]];
    }

    function arrange(top = false) {
      const rows = store.data.rows;
      if (!rows) return;
      const found = [];
      for (const row of rows.values()) {
        if (chosen.group && GROUP_OF[stateOf(row)] !== chosen.group) continue;
        if (chosen.text && !`${row[NAME]} ${row[ID]} ${row[ERROR]} ${stateOf(row)}`.toLowerCase().includes(chosen.text)) continue;
        found.push(row);
      }
      if (!chosen.sort) {
        // Running first, then what waits in its order, then what ended, newest first.
        const rank = found.map((row) => [Math.min(5, RANK[stateOf(row)] ?? 5), row]);
        rank.sort(([a, x], [b, y]) => a - b || (a === 5 ? y.order - x.order : x.order - y.order));
        order = rank.map(([, row]) => row[ID]);
      } else {
        const sign = chosen.down ? -1 : 1;
        const keyed = found.map((row) => [keyOf(row), row]);
        keyed.sort(([a, x], [b, y]) => {
          const missing = (a === null || a === "") - (b === null || b === "");
          if (missing) return missing;
          return (a < b ? -sign : a > b ? sign : 0) || x.order - y.order;
        });
        order = keyed.map(([, row]) => row[ID]);
      }
      // Those that are on record and not in the table count as well.
      const total = Math.max(rows.size, store.parts.total || 0);
      setText(count, order.length === total ? `${total.toLocaleString()} task${total === 1 ? "" : "s"}` : `${order.length.toLocaleString()} of ${total.toLocaleString()} tasks`);
      older.hidden = !store.parts.older;
      older.disabled = false;
      setAttr(grid, "aria-rowcount", order.length + 1);
      empty.hidden = order.length > 0;
      empty.classList.remove("wf-skeleton");
      setText(empty, rows.size ? "No task matches the filter" : "No tasks yet. What is submitted shows up here.");
      body.style.height = `${order.length * ROW}px`;
      if (top) scroller.scrollTop = 0;
      if (focused === null || !rows.has(focused)) focused = order[0] ?? null;
      paint();
    }

    function act(verb, id, ...args) {
      command(store, line, verb, [id, ...args]);
    }

    function makeRow(id) {
      const cell = (key, ...children) => h("div", { class: `wf-c wf-c-${key}`, role: "gridcell" }, ...children);
      const part = {
        badge: h("span", { class: "wf-badge" }), name: h("span", { class: "wf-ellipsis" }), priority: h("span"), bar: h("div", { class: "wf-bar-fill" }), share: h("span", { class: "wf-share" }),
        queue: h("span"), wall: h("span"), cpu: h("span"), attempt: h("span"), error: h("span", { class: "wf-ellipsis wf-muted" }),
      };
      const button = (testid, label, text, onclick) => h("button", { class: "wf-button wf-small", type: "button", "data-testid": testid, "aria-label": label, title: label, text, tabindex: -1,
        onclick: (event) => { event.stopPropagation(); onclick(); } });
      const priority = (step) => () => {
        const row = store.data.rows.get(id);
        act("reprioritise", id, PRIORITIES[Math.max(0, Math.min(3, row[PRIORITY] + step))]);
      };
      part.cancel = button("cancel", "Cancel", "Cancel", () => act("cancel", id));
      part.retry = button("retry", "Retry", "Retry", () => act("retry", id));
      part.up = button("priority-up", "Raise priority", "▲", priority(1));
      part.down = button("priority-down", "Lower priority", "▼", priority(-1));
      part.track = h("div", { class: "wf-bar" }, part.bar);
      part.node = h("div", { class: "wf-row", role: "row", "data-testid": "task-row", "data-task-id": id, tabindex: -1,
        onclick: () => { focusRow(id, false); show(id); }, onfocusin: () => mark(id) },
        cell("state", part.badge), cell("name", part.name), cell("priority", part.priority), cell("progress", part.track, part.share), cell("queue", part.queue),
        cell("wall", part.wall), cell("cpu", part.cpu), cell("attempt", part.attempt), cell("error", part.error), cell("actions", part.cancel, part.retry, part.up, part.down));
      part.buttons = [part.cancel, part.retry, part.up, part.down];
      return part;
    }

    function fillTimes(part, row) {
      setText(part.queue, duration(queueOf(row)));
      setText(part.wall, duration(wallOf(row)));
    }

    function fill(part, row) {
      const state = stateOf(row);
      const closed = TERMINAL.has(state);
      const why = store.parts.why || "";
      setAttr(part.node, "data-state", state);
      setAttr(part.node, "data-name", row[NAME]);
      setAttr(part.badge, "data-state", state);
      setText(part.badge, words(state));
      setText(part.name, row[NAME]);
      part.name.title = `${row[NAME]} · ${row[ID]}`;
      setText(part.priority, PRIORITIES[row[PRIORITY]] || "");
      setAttr(part.priority, "data-priority", PRIORITIES[row[PRIORITY]]);
      const unknown = row[PROGRESS] === null;
      const share = unknown ? (state === "completed" ? 1 : 0) : row[PROGRESS];
      setAttr(part.track, "data-mode", unknown && state === "running" ? "unknown" : state);
      part.track.style.visibility = unknown && !["running", "completed"].includes(state) ? "hidden" : "";
      part.bar.style.width = unknown && state === "running" ? "" : `${(share * 100).toFixed(1)}%`;
      setText(part.share, unknown ? "" : `${Math.round(share * 100)} %`);
      setText(part.cpu, duration(row[CPU]));
      setText(part.attempt, row[OF] > 1 || row[ATTEMPT] > 1 ? `${row[ATTEMPT]}/${row[OF]}` : row[ATTEMPT] ? String(row[ATTEMPT]) : "");
      setText(part.error, row[ERROR]);
      part.error.title = row[ERROR];
      part.error.classList.toggle("wf-bad", GROUP_OF[state] === "problem");
      part.cancel.disabled = Boolean(why) || closed || state === "cancelling";
      part.retry.disabled = Boolean(why) || !RETRYABLE.has(state);
      part.up.disabled = Boolean(why) || closed || row[PRIORITY] >= 3;
      part.down.disabled = Boolean(why) || closed || row[PRIORITY] <= 0;
      for (const button of part.buttons) if (why) button.title = why;
      fillTimes(part, row);
      part.row = row;
    }

    function paint() {
      const rows = store.data.rows;
      if (!rows) return;
      const height = scroller.clientHeight || 400;
      const first = Math.max(0, Math.floor(scroller.scrollTop / ROW) - 4);
      const last = Math.min(order.length, Math.ceil((scroller.scrollTop + height) / ROW) + 4);
      const wanted = new Set(order.slice(first, last));
      for (const [id, part] of shown) {
        if (wanted.has(id)) continue;
        part.node.remove();
        shown.delete(id);
      }
      for (let index = first; index < last; index += 1) {
        const id = order[index];
        let part = shown.get(id);
        if (!part) {
          part = makeRow(id);
          shown.set(id, part);
          body.append(part.node);
        }
        const row = rows.get(id);
        if (part.row !== row || part.why !== store.parts.why) {
          part.why = store.parts.why;
          fill(part, row);
        }
        if (part.index !== index) {
          part.index = index;
          part.node.style.transform = `translateY(${index * ROW}px)`;
          setAttr(part.node, "aria-rowindex", index + 2);
        }
        const here = id === focused;
        if (part.here !== here) {
          part.here = here;
          part.node.tabIndex = here ? 0 : -1;
          for (const button of part.buttons) button.tabIndex = here ? 0 : -1;
        }
        setAttr(part.node, "aria-selected", id === open);
      }
    }

    function mark(id) {
      if (focused === id) return;
      focused = id;
      paint();
    }

    function focusRow(id, scroll = true) {
      focused = id;
      const index = order.indexOf(id);
      if (scroll && index >= 0) {
        const top = index * ROW;
        if (top < scroller.scrollTop) scroller.scrollTop = top;
        else if (top + ROW > scroller.scrollTop + scroller.clientHeight) scroller.scrollTop = top + ROW - scroller.clientHeight;
      }
      paint();
      const part = shown.get(id);
      if (part && scroll) part.node.focus({ preventScroll: true });
    }

    function onKey(event) {
      if (!event.target.closest(".wf-rows")) return;
      const index = order.indexOf(focused);
      const page = Math.max(1, Math.floor(scroller.clientHeight / ROW) - 1);
      const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -order.length, End: order.length };
      if (event.key in steps) {
        const next = Math.max(0, Math.min(order.length - 1, index + steps[event.key]));
        if (order.length) focusRow(order[next]);
      } else if (event.key === "Enter" && event.target.getAttribute("role") === "row") show(focused);
      else if (event.key === "Escape" && open) hide();
      else return;
      event.preventDefault();
      event.stopPropagation();
    }

    function show(id) {
      if (open === id) { hide(); return; }
      open = id;
      details.hidden = false;
      details.replaceChildren(h("div", { class: "wf-muted", text: "Reading …" }));
      model.send({ type: "details", id });
      paint();
    }

    function hide() {
      open = null;
      details.hidden = true;
      details.replaceChildren();
      paint();
    }

    function drawDetails(content) {
      if (content.id !== open) return;
      const { task } = content;
      const close = h("button", { class: "wf-button wf-small", type: "button", text: "Close", "data-testid": "details-close", onclick: hide });
      if (!task) {
        details.replaceChildren(h("div", { class: "wf-details-head" }, h("strong", { text: "Not known any more" }), close), h("p", { class: "wf-muted", text: content.error || content.id }));
        return;
      }
      const terms = [
        ["Id", task.task_id], ["State", words(task.state) + (task.reason ? ` · ${task.reason}` : "")], ["Priority", PRIORITIES[task.priority]], ["Runs as", task.kind],
        ["Attempt", `${task.attempt} of ${task.max_attempts}`], ["Created", clockTime(task.created_seconds)], ["Started", clockTime(task.started_seconds)], ["Finished", clockTime(task.finished_seconds)],
        ["Queued", duration(task.queue_seconds)], ["Ran", duration(task.wall_seconds)], ["CPU time", task.cpu_seconds === null ? "" : `${duration(task.cpu_seconds)} (${words(task.cpu_source)})`],
        ["Peak memory", task.memory_peak_bytes === null ? "" : `${(task.memory_peak_bytes / 1048576).toFixed(0)} MiB (${task.memory_source})`],
        ["Progress", task.progress_text], ["Tags", task.tags.join(", ")], ["Retry of", task.retry_of],
      ].filter(([, value]) => value);
      const block = (title, text) => (text ? [h("div", { class: "wf-block" }, h("h4", { text: title }), h("pre", { class: title === "Error" ? "wf-bad" : "", text, tabindex: 0 }))] : []);
      const needs = task.dependencies.map((id) => {
        const row = store.data.rows.get(id);
        return h("button", { class: "wf-button wf-small", type: "button", text: row ? `${row[NAME]} · ${words(stateOf(row))}` : id, onclick: () => { open = null; show(id); focusRow(id); } });
      });
      details.replaceChildren(
        h("div", { class: "wf-details-head" }, h("span", { class: "wf-badge", "data-state": task.state, text: words(task.state) }), h("strong", { class: "wf-ellipsis", text: task.name }), close),
        ...block("Error", task.error),
        // Not a dl: hosts style those with floats.
        h("div", { class: "wf-terms", role: "list" }, ...terms.map(([term, value]) => h("div", { role: "listitem" }, h("span", { class: "wf-term", text: term }), h("span", { text: value })))),
        ...(needs.length ? [h("div", { class: "wf-needs" }, h("span", { class: "wf-muted", text: "After" }), ...needs)] : []),
        ...block("Traceback", task.traceback), ...block("Output", task.output_tail),
      );
    }

    const ticking = setInterval(() => { for (const part of shown.values()) if (part.row && part.row[SINCE] !== null) fillTimes(part, part.row); }, 1000);
    const sizes = new ResizeObserver(() => paint());
    sizes.observe(scroller);
    sortBy("");
    return {
      update(what) {
        if (what.type === "rows" || what.type === "parts") arrange();
        if (what.type === "rows" && open && (what.ids === null || what.ids.includes(open))) model.send({ type: "details", id: open });
        if (what.type === "details") drawDetails(what);
        if (what.type === "result") line.show(what.ok, what.message);
      },
      close() {
        clearInterval(ticking);
        sizes.disconnect();
      },
    };
  },
});
