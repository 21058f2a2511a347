const RANGES = [[300, "5 min"], [900, "15 min"], [3600, "1 h"], [21600, "6 h"], [86400, "24 h"], [604800, "7 d"]];
const CARDS = [["cpu", "CPU"], ["memory", "Memory"], ["disk", "Disk"], ["tasks", "Tasks"], ["workers", "Workers"]];
const STATE_WORDS = { live: "live", ended: "ended", crashed: "crashed" };

function card(key, label) {
  const value = h("div", { class: "wf-card-value", "data-testid": `card-${key}-value` });
  const fill = h("div", { class: "wf-meter-fill" });
  const meter = h("div", { class: "wf-meter", role: "meter", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100 }, fill);
  const detail = h("div", { class: "wf-card-detail" });
  const node = h(
    "section", { class: "wf-panel wf-card wf-loading", "data-testid": `card-${key}`, "aria-label": label },
    h("div", { class: "wf-card-label", text: label }), value, meter, detail,
  );
  let ticks = "";
  const update = (part) => {
    const known = part && part.value !== null;
    node.classList.toggle("wf-loading", !known);
    if (!known) return;
    setText(value, part.value);
    setText(detail, part.detail);
    detail.title = part.detail;
    setAttr(node, "data-level", part.level);
    const share = part.ratio === null ? 0 : Math.max(0, Math.min(1, part.ratio));
    fill.style.width = `${(share * 100).toFixed(1)}%`;
    setAttr(meter, "aria-valuenow", part.ratio === null ? null : Math.round(share * 100));
    setAttr(meter, "aria-valuetext", `${part.value}, ${part.detail}`);
    const wanted = JSON.stringify(part.ticks);
    if (wanted !== ticks) {
      ticks = wanted;
      for (const old of meter.querySelectorAll(".wf-tick")) old.remove();
      part.ticks.forEach((tick, index) => {
        if (tick === null || tick >= 1) return;
        meter.append(h("span", { class: `wf-tick ${index ? "wf-tick-critical" : "wf-tick-warning"}`, style: { left: `${tick * 100}%` } }));
      });
    }
  };
  return { node, update };
}

export default wiseflow({
  view({ el, store, model }) {
    const line = answerLine();
    const dot = h("span", { class: "wf-dot" });
    const title = h("span", { class: "wf-session-title", "data-testid": "session-title" });
    const where = h("span", { class: "wf-muted wf-session-where" });
    const state = h("span", { class: "wf-chip", "data-testid": "session-state" });
    const chooser = h("select", {
      class: "wf-input wf-chooser", "aria-label": "Session", "data-testid": "session-chooser",
      onchange: () => model.send({ type: "open", id: chooser.value }),
    });
    const range = h("select", {
      class: "wf-input", "aria-label": "Time range", "data-testid": "range",
      onchange: () => model.send({ type: "range", seconds: Number(range.value) }),
    }, ...RANGES.map(([seconds, label]) => h("option", { value: seconds, text: label })));
    const drawing = h("button", {
      class: "wf-button", type: "button", "data-testid": "pause-drawing",
      onclick: () => model.send({ type: "drawing", on: store.parts.drawing === false }),
    });
    const tasks = h("button", {
      class: "wf-button", type: "button", "data-testid": "pause-tasks",
      onclick: () => command(store, line, store.parts.paused ? "resume" : "pause", []),
    });
    const told = h("span", {});
    const stay = h("button", {
      class: "wf-button", type: "button", "data-testid": "keep-running", text: "Keep running", hidden: true,
      onclick: () => command(store, line, "resume", []),
    });
    const banner = h("div", { class: "wf-banner", role: "alert", "data-testid": "banner", hidden: true }, told, stay);
    const cards = CARDS.map(([key, label]) => [key, card(key, label)]);
    el.append(
      h("header", { class: "wf-header" },
        h("div", { class: "wf-brand" },
          h("span", { class: "wf-name", text: "WiseFlow" }),
          h("span", { class: "wf-session" }, dot, title, where, state)),
        h("div", { class: "wf-controls" }, chooser, range, drawing, tasks)),
      line, banner,
      h("div", { class: "wf-cards" }, ...cards.map(([, item]) => item.node)),
    );
    let choices = "";

    function drawSession() {
      const session = store.parts.session;
      if (!session) return;
      setText(title, session.title || session.id);
      setText(where, [session.host, session.pid ? `pid ${session.pid}` : ""].filter(Boolean).join(" · "));
      const tone = session.stale ? "stale" : session.state;
      setAttr(dot, "data-state", tone);
      setAttr(state, "data-state", tone);
      let words = STATE_WORDS[session.state] || session.state;
      if (session.state !== "live" && session.ended) words += ` ${clockTime(session.ended)}`;
      setText(state, session.stale || words);
      tasks.disabled = Boolean(session.why);
      tasks.title = session.why || (store.parts.paused ? "Let queued tasks start again" : "Start no more queued tasks; running ones go on");
    }

    function drawChoices() {
      const sessions = store.parts.sessions || [];
      const chosen = store.parts.session ? store.parts.session.id : "";
      const wanted = JSON.stringify([sessions, chosen]);
      if (wanted === choices || document.activeElement === chooser) return;
      choices = wanted;
      chooser.replaceChildren(...sessions.map(([id, name, host, kind, started]) =>
        h("option", { value: id, text: `${name} · ${kind}${started ? ` · ${clockTime(started).slice(0, -3)}` : ""}` })));
      if (!sessions.some(([id]) => id === chosen) && chosen) chooser.prepend(h("option", { value: chosen, text: store.parts.session.title || chosen }));
      chooser.value = chosen;
    }

    function drawBanner() {
      const error = store.parts.error;
      const silent = store.heard ? Math.round((Date.now() - store.heard) / 1000) : 0;
      let text = "";
      if (silent > 8 && !document.hidden) text = `The kernel has not answered for ${silent} s (busy or stopped). The figures are that old.`;
      else if (error) text = `The session cannot be read now. ${error}`;
      else if (store.parts.session && store.parts.session.why) text = store.parts.session.why;
      else if (store.parts.shutdown) text = `Nothing runs here: the workers are stopped at ${clockTime(store.parts.shutdown)} unless work comes.`;
      else text = store.parts.notice || "";
      stay.hidden = !(store.parts.shutdown && text.startsWith("Nothing runs"));
      banner.hidden = !text;
      banner.dataset.tone = error || silent > 8 ? "error" : "info";
      setText(told, text);
    }

    const ping = () => { if (!document.hidden) model.send({ type: "ping" }); };
    const pinger = setInterval(ping, 2000);
    const watcher = setInterval(drawBanner, 1000);
    document.addEventListener("visibilitychange", ping);
    ping();
    return {
      update(what) {
        if (what.type !== "parts") return;
        const { parts } = store;
        if (parts.range && document.activeElement !== range) range.value = String(parts.range);
        const on = parts.drawing !== false;
        setText(drawing, on ? "Pause drawing" : "Draw again");
        setAttr(drawing, "aria-pressed", !on);
        setText(tasks, parts.paused ? "Resume tasks" : "Pause tasks");
        setAttr(tasks, "aria-pressed", Boolean(parts.paused));
        drawSession();
        drawChoices();
        drawBanner();
        for (const [key, item] of cards) item.update(parts[`card:${key}`]);
      },
      close() {
        clearInterval(pinger);
        clearInterval(watcher);
        document.removeEventListener("visibilitychange", ping);
      },
    };
  },
});
