// Shared by every widget's script: a store of parts a model, and small DOM helpers.
// Data from a session is only ever set as text.

function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "class") node.className = value;
    else if (key === "text") node.textContent = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "style") Object.assign(node.style, value);
    else node.setAttribute(key, value === true ? "" : String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function setText(node, text) {
  const wanted = text === null || text === undefined ? "" : String(text);
  if (node.textContent !== wanted) node.textContent = wanted;
}

function setAttr(node, name, value) {
  if (value === null || value === undefined || value === false) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, String(value));
}

function pad2(value) {
  return String(value).padStart(2, "0");
}

function clockTime(seconds) {
  if (seconds === null || seconds === undefined) return "";
  const date = new Date(seconds * 1000);
  const time = `${pad2(date.getHours())}:${pad2(date.getMinutes())}:${pad2(date.getSeconds())}`;
  if (date.toDateString() === new Date().toDateString()) return time;
  return `${date.toLocaleDateString(undefined, { month: "short", day: "numeric" })} ${time}`;
}

function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "";
  if (seconds < 0) seconds = 0;
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 99.95) return `${seconds.toFixed(1)} s`;
  if (seconds < 5999.5) return `${Math.floor(seconds / 60)}:${pad2(Math.floor(seconds % 60))} min`;
  return `${Math.floor(seconds / 3600)}:${pad2(Math.floor((seconds % 3600) / 60))} h`;
}

// One store a model: what the kernel said last, shared by all views of the model on this page.
function wiseflow({ message, view, asks = [] }) {
  return () => {
    const store = { parts: {}, views: new Set(), data: {}, waiting: new Map(), heard: 0, skew: 0 };
    let request = 0;
    return {
      initialize({ model }) {
        store.model = model;
        store.ask = (content) =>
          new Promise((resolve) => {
            request += 1;
            store.waiting.set(request, resolve);
            model.send({ ...content, request });
          });
        const tell = (what) => {
          for (const each of store.views) each(what);
        };
        const onMessage = (content, buffers) => {
          store.heard = Date.now();
          if (content.type === "parts") {
            for (const [key, value] of Object.entries(content.parts)) store.parts[key] = value;
            tell({ type: "parts", keys: Object.keys(content.parts) });
          } else if (content.type === "result") {
            const resolve = store.waiting.get(content.request);
            store.waiting.delete(content.request);
            if (resolve) resolve(content);
            else tell(content);
          } else if (message) message({ content, buffers, store, tell, model });
        };
        model.on("msg:custom", onMessage);
        let patience = 3000;
        let timer = 0;
        const hello = () => {
          model.send({ type: "hello" });
          timer = setTimeout(() => {
            if (!store.heard) hello();
          }, patience);
          patience = Math.min(60000, patience * 2);
        };
        hello();
        for (const ask of asks) ask({ store, model, tell });
        return () => {
          clearTimeout(timer);
          model.off("msg:custom", onMessage);
        };
      },
      render({ model, el }) {
        store.model = store.model || model;
        el.classList.add("wf-widget");
        const { update, close } = view({ el, store, model });
        store.views.add(update);
        update({ type: "parts", keys: Object.keys(store.parts), first: true });
        return () => {
          store.views.delete(update);
          if (close) close();
        };
      },
    };
  };
}

// A line under a panel that says what a verb did.
function answerLine() {
  const node = h("div", { class: "wf-answer", role: "status", "aria-live": "polite", "data-testid": "answer" });
  let timer = 0;
  node.show = (ok, text) => {
    node.dataset.ok = ok === null ? "busy" : String(ok);
    setText(node, text);
    clearTimeout(timer);
    if (ok !== null) timer = setTimeout(() => setText(node, ""), 20000);
  };
  return node;
}

async function command(store, line, verb, args, busy) {
  line.show(null, busy || "Asking …");
  const answer = await store.ask({ type: "verb", verb, args });
  line.show(answer.ok, answer.message || (answer.ok ? "Done." : "Refused."));
  return answer;
}
