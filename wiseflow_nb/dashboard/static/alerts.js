export default wiseflow({
  view({ el, store }) {
    const line = answerLine();
    const count = h("span", { class: "wf-muted wf-count" });
    const list = h("ul", { class: "wf-alert-list", "aria-label": "Alerts" });
    const empty = h("div", { class: "wf-empty wf-skeleton" });
    el.append(h("section", { class: "wf-panel wf-alerts", "data-testid": "alerts" },
      h("div", { class: "wf-toolbar" }, h("h3", { text: "Alerts" }), count), line, empty, list));
    const items = new Map();

    function make(id) {
      const part = { severity: h("span", { class: "wf-chip" }), what: h("span", { class: "wf-alert-what" }), figures: h("div", { class: "wf-alert-figures" }) };
      const button = (testid, text, act) => h("button", { class: "wf-button wf-small", type: "button", "data-testid": testid, text, onclick: act });
      part.acknowledge = button("acknowledge", "Acknowledge", () => command(store, line, "acknowledge", [id]));
      part.silence = button("silence", "Silence 10 min", () => command(store, line, "silence", [id, 600]));
      part.actions = h("div", { class: "wf-alert-actions" }, part.acknowledge, part.silence);
      part.node = h("li", { class: "wf-alert", "data-testid": "alert", "data-alert-id": id },
        h("div", { class: "wf-alert-head" }, part.severity, part.what), part.figures, part.actions);
      return part;
    }

    function fill(part, alert) {
      const live = alert.resolved === null;
      const why = store.parts.why || "";
      setAttr(part.node, "data-live", live);
      setAttr(part.node, "data-severity", alert.severity);
      setAttr(part.severity, "data-state", live ? alert.severity : "past");
      setText(part.severity, live ? alert.severity : "resolved");
      setText(part.what, alert.message || `${alert.resource} ${alert.rule}`);
      const figures = live
        ? `since ${clockTime(alert.since)} · now ${alert.value} · peak ${alert.peak} · limit ${alert.threshold}${alert.state === "recovering" ? " · recovering" : ""}`
        : `${clockTime(alert.since)}, for ${duration(alert.resolved - alert.since)} · peak ${alert.peak} · limit ${alert.threshold}`;
      setText(part.figures, figures.replaceAll(" %", "\u00a0%"));
      part.actions.hidden = !live;
      part.acknowledge.disabled = Boolean(why) || alert.acknowledged;
      setText(part.acknowledge, alert.acknowledged ? "Acknowledged" : "Acknowledge");
      part.silence.disabled = Boolean(why);
      part.silence.title = why;
    }

    return {
      update(what) {
        if (what.type !== "parts" || !store.parts.order) return;
        const { order, live } = store.parts;
        setText(count, live ? `${live} live` : "");
        empty.hidden = order.length > 0;
        empty.classList.remove("wf-skeleton");
        setText(empty, "All quiet: no alert in this session");
        for (const [id, part] of items) {
          if (order.includes(id)) continue;
          part.node.remove();
          items.delete(id);
        }
        order.forEach((id, index) => {
          let part = items.get(id);
          if (!part) items.set(id, (part = make(id)));
          if (store.parts[`alert:${id}`]) fill(part, store.parts[`alert:${id}`]);
          if (list.children[index] !== part.node) list.insertBefore(part.node, list.children[index] || null);
        });
      },
    };
  },
});
