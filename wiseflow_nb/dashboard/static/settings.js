export default wiseflow({
  view({ el, store }) {
    const line = answerLine();
    const form = h("form", { class: "wf-form", novalidate: true, onsubmit: (event) => { event.preventDefault(); apply(); } });
    const applyButton = h("button", { class: "wf-button wf-primary", type: "submit", text: "Apply", "data-testid": "settings-apply", disabled: true });
    const reset = h("button", { class: "wf-button", type: "button", text: "Reset to defaults", "data-testid": "settings-reset", onclick: () => send(defaults()) });
    const why = h("p", { class: "wf-muted wf-why" });
    const fields = new Map();
    el.append(h("section", { class: "wf-panel wf-settings", "data-testid": "settings" }, h("div", { class: "wf-toolbar" }, h("h3", { text: "Settings" })), why, form, line));

    function build(list) {
      fields.clear();
      const groups = new Map();
      for (const field of list) {
        const id = `wf-${Math.random().toString(36).slice(2)}`;
        const input = h("input", { id, class: "wf-input wf-number", type: "number", step: "any", min: field.low, max: field.high, inputmode: "decimal", "data-testid": `setting-${field.name}`, "aria-describedby": `${id}-hint`,
          oninput: () => { entry.dirty = Number(input.value) !== entry.value || input.value === ""; check(); } });
        const hint = h("div", { class: "wf-hint", id: `${id}-hint`, hidden: true });
        const label = h("label", { for: id, text: field.label, title: `${field.help} (${allowed(field)})` });
        const entry = { field, input, hint, dirty: false, value: null };
        entry.node = h("div", { class: "wf-field" }, label, h("div", { class: "wf-entry" }, input, h("span", { class: "wf-unit wf-muted", text: field.unit })), hint);
        fields.set(field.name, entry);
        if (!groups.has(field.group)) groups.set(field.group, []);
        groups.get(field.group).push(entry.node);
      }
      form.replaceChildren(...[...groups].map(([name, nodes]) => h("fieldset", {}, h("legend", { text: name }), ...nodes)), h("div", { class: "wf-form-actions" }, applyButton, reset));
    }

    function allowed(field) {
      const unit = field.unit && field.unit !== "×" ? ` ${field.unit}` : "";
      const low = field.above ? `more than ${field.low}` : field.low;
      const high = field.below ? `less than ${field.high}` : field.high;
      return `${low} to ${high}${unit}${field.whole ? ", whole" : ""}`;
    }

    function problem({ field, input }) {
      const value = Number(input.value);
      if (input.value === "" || !Number.isFinite(value)) return `Give a number, ${allowed(field)}`;
      if (field.whole && !Number.isInteger(value)) return `Give a whole number, ${allowed(field)}`;
      const low = field.low !== null && (field.above ? value <= field.low : value < field.low);
      const high = field.high !== null && (field.below ? value >= field.high : value > field.high);
      return low || high ? `Allowed is ${allowed(field)}` : "";
    }

    function check() {
      let wrong = false;
      let dirty = false;
      const least = fields.get("min_thread_workers");
      const most = fields.get("max_thread_workers");
      for (const entry of fields.values()) {
        let text = problem(entry);
        if (!text && entry === least && Number(least.input.value) > Number(most.input.value)) text = "More than the most workers";
        entry.hint.hidden = !text;
        setText(entry.hint, text);
        setAttr(entry.input, "aria-invalid", text ? "true" : null);
        entry.node.classList.toggle("wf-dirty", entry.dirty);
        wrong = wrong || Boolean(text);
        dirty = dirty || entry.dirty;
      }
      applyButton.disabled = wrong || !dirty || Boolean(store.parts.why);
      reset.disabled = Boolean(store.parts.why);
    }

    function defaults() {
      return Object.fromEntries([...fields.values()].filter((entry) => entry.value !== entry.field.default).map((entry) => [entry.field.name, entry.field.default]));
    }

    async function send(changes) {
      if (!Object.keys(changes).length) {
        line.show(true, "Everything has its default already.");
        return;
      }
      const answer = await command(store, line, "configure", [changes]);
      if (!answer.ok) return;
      for (const name of Object.keys(changes)) {
        const entry = fields.get(name);
        Object.assign(entry, { dirty: false, value: changes[name] });
        entry.input.value = String(changes[name]);
      }
      check();
    }

    function apply() {
      if (applyButton.disabled) return;
      send(Object.fromEntries([...fields.values()].filter((entry) => entry.dirty).map((entry) => [entry.field.name, Number(entry.input.value)])));
    }

    return {
      update(what) {
        if (what.type !== "parts") return;
        if (store.parts.fields && (what.keys.includes("fields") || !fields.size)) build(store.parts.fields);
        setText(why, store.parts.why || "");
        for (const entry of fields.values()) {
          const value = (store.parts.values || {})[entry.field.name];
          entry.input.disabled = Boolean(store.parts.why) || value === undefined;
          if (value === undefined) continue;
          entry.value = value;
          if (!entry.dirty) entry.input.value = String(value);
        }
        if (fields.size) check();
      },
    };
  },
});
