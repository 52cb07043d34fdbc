"use strict";
const at = (id) => document.getElementById(id);
let base = "", names = [], running = null;
const talk = { base: [], edited: [] };

function headers() {
  const key = sessionStorage.getItem("key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function trouble(text) {
  at("trouble").textContent = text || "";
  at("trouble").hidden = !text;
}

async function call(path, body, signal) {
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers: headers(), signal,
    body: body ? JSON.stringify(body) : undefined });
  if (!answer.ok) {
    let said = `${answer.status} ${answer.statusText}`;
    try { said = (await answer.json()).error.message; } catch { /* no JSON came */ }
    throw new Error(said);
  }
  return answer;
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// Tabs

for (const tab of document.querySelectorAll("[role=tab]")) {
  tab.onclick = () => {
    for (const other of document.querySelectorAll("[role=tab]")) {
      const chosen = other === tab;
      other.setAttribute("aria-selected", chosen);
      other.tabIndex = chosen ? 0 : -1;
      at(other.getAttribute("aria-controls")).hidden = !chosen;
    }
  };
  tab.onkeydown = (event) => {
    const tabs = [...document.querySelectorAll("[role=tab]:not([hidden])")], step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) { const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length]; next.focus(); next.click(); }
  };
}

// Adapters

async function load() {
  try {
    const about = await (await call("/ui/about")).json();
    base = about.base;
    names = (await (await call("/v1/models")).json()).data.map((model) => model.id).filter((name) => name !== base);
    at("base-name").textContent = `on ${base}, ${names.length.toLocaleString()} adapter${names.length === 1 ? "" : "s"}`;
    at("tab-train").hidden = !about.trains;
    if (!at("adapter").value) at("adapter").value = names[0] || "";
    suggest("");
    titles();
    trouble("");
  } catch (error) { trouble(error.message); }
}

function suggest(typed) {
  const wanted = typed.split(/[+*]/).pop().trim().toLowerCase();
  const found = names.filter((name) => name.toLowerCase().includes(wanted)).slice(0, 200);
  at("adapters").replaceChildren(...found.map((name) => new Option(name)));
}

function titles() {
  at("edited-title").textContent = at("adapter").value ? `${at("adapter").value}, strength ${at("strength-value").value}` : "Adapter";
}

at("adapter").oninput = () => { suggest(at("adapter").value); titles(); };
at("look-name").oninput = () => suggest(at("look-name").value);
at("strength").oninput = () => { at("strength-value").value = Number(at("strength").value).toFixed(1); titles(); };
at("key").onclick = () => {
  const key = window.prompt("API key of this server (kept until this tab is closed)", sessionStorage.getItem("key") || "");
  if (key !== null) { sessionStorage.setItem("key", key.trim()); load(); }
};

// Chat

function say(log, kind, text) {
  const line = document.createElement("p");
  line.className = kind;
  line.textContent = text;
  log.append(line);
  log.scrollTop = log.scrollHeight;
  return line;
}

function messages(turns) {
  const system = at("system").value.trim();
  return [...(system ? [{ role: "system", content: system }] : []), ...turns];
}

async function write(side, model, scale, signal) {
  const log = at(`log-${side}`), line = say(log, "answer", "");
  try {
    const answer = await call("/v1/chat/completions", { model, scale, messages: messages(talk[side]), stream: true,
      temperature: Number(at("temperature").value), max_tokens: Number(at("longest").value) }, signal);
    for await (const piece of events(answer)) {
      if (piece.error) throw new Error(piece.error.message);
      line.textContent += piece.choices[0]?.delta?.content || "";
      log.scrollTop = log.scrollHeight;
    }
  } finally { // a turn that got no answer is not part of the next prompt
    if (line.textContent) talk[side].push({ role: "assistant", content: line.textContent });
    else talk[side].pop();
  }
}

async function colour(model) {
  const found = await (await call("/tokenize", { model, messages: messages(talk.edited) })).json();
  const edited = new Set(found.edited);
  at("tokens").replaceChildren(...found.token_strs.map((text, index) => {
    const token = document.createElement("span");
    token.textContent = text.replaceAll("\n", "\u21b5\n");
    if (edited.has(index)) { token.className = "edited"; token.title = "edited"; }
    return token;
  }));
  at("tokens-count").textContent = `${found.count}, ${edited.size} edited`;
}

at("ask").onsubmit = async (event) => {
  event.preventDefault();
  const text = at("prompt").value.trim(), model = at("adapter").value.trim() || base;
  if (!text || running) return;
  running = new AbortController();
  at("send").disabled = true; at("stop").hidden = false; at("prompt").value = ""; trouble("");
  for (const side of ["base", "edited"]) { talk[side].push({ role: "user", content: text }); say(at(`log-${side}`), "you", text); }
  const scale = model === base ? 1 : Number(at("strength").value);
  const done = await Promise.allSettled([colour(model), write("base", base, 1, running.signal),
    write("edited", model, scale, running.signal)]);
  const failed = done.find((one) => one.status === "rejected" && one.reason.name !== "AbortError");
  if (failed) trouble(failed.reason.message);
  running = null;
  at("send").disabled = false; at("stop").hidden = true;
  at("prompt").focus();
};
at("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); at("ask").requestSubmit(); }
};
at("stop").onclick = () => running?.abort();
at("reset").onclick = () => {
  for (const side of ["base", "edited"]) { talk[side].length = 0; at(`log-${side}`).replaceChildren(); }
  at("tokens").replaceChildren(); at("tokens-count").textContent = "none yet";
};

// Training

function svg(kind, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function sheet(id) { // an empty picture as wide as its place, so that its letters keep their size; returns that width
  at(id).toggleAttribute("hidden", false);
  at(id).setAttribute("viewBox", `0 0 ${at(id).clientWidth} 240`);
  return at(id).clientWidth;
}

function curve(losses) {
  const [left, right, top, bottom] = [46, sheet("curve") - 14, 14, 208], steps = losses.at(-1)[1];
  const high = Math.max(...losses.map((loss) => loss[2])) * 1.05 || 1;
  const x = (step) => left + (right - left) * step / Math.max(steps, 1), y = (loss) => bottom - (bottom - top) * loss / high;
  at("curve").replaceChildren(
    svg("line", { class: "axis", x1: left, y1: bottom, x2: right, y2: bottom }),
    svg("line", { class: "axis", x1: left, y1: top, x2: left, y2: bottom }),
    svg("text", { class: "end", x: left - 6, y: top + 8 }, high.toFixed(2)), svg("text", { class: "end", x: left - 6, y: bottom }, "0"),
    svg("text", { class: "end", x: right, y: 228 }, `optimiser step ${steps}`), svg("text", { x: left, y: 228 }, "loss, nats a token"),
    svg("polyline", { class: "line", points: losses.map(([step, , loss]) => `${x(step)},${y(loss)}`).join(" ") }));
}

at("training").onsubmit = async (event) => {
  event.preventDefault();
  const name = at("new-name").value.trim();
  trouble("");
  try {
    const table = await at("rows").files[0].text();
    await call("/ui/train", { name, table, epochs: Number(at("epochs").value), lr: Number(at("rate").value),
      rank: Number(at("rank").value), positions: at("where").value });
    at("begin").disabled = true; at("end").hidden = false;
    at("train-state").textContent = "Loading the base model ...";
    for await (const run of events(await call(`/ui/train/${encodeURIComponent(name)}`))) {
      const last = run.losses.at(-1);
      if (last) { curve(run.losses); at("train-state").textContent = `step ${last[0]} of ${last[1]}, loss ${last[2].toFixed(4)}`; }
      if (run.state === "done") {
        at("adapter").value = name;
        await load();
        at("train-state").textContent = `${name} is trained (last loss ${last ? last[2].toFixed(4) : "unknown"}). It is in the list of adapters now.`;
      } else if (run.state !== "running") at("train-state").textContent = run.error || `The run was ${run.state}.`;
    }
  } catch (error) { trouble(error.message); }
  at("begin").disabled = false; at("end").hidden = true;
};
at("end").onclick = () => call("/ui/train/stop", {}).catch((error) => trouble(error.message));

// Looking inside

at("looking").onsubmit = async (event) => {
  event.preventDefault();
  const path = `/ui/adapters/${encodeURIComponent(at("look-name").value.trim())}`;
  trouble("");
  try {
    const image = await (await call(`${path}/picture.png`)).blob();
    at("look-picture").src = URL.createObjectURL(image);
    at("look-figure").hidden = false; at("look-text").hidden = true; at("removal").toggleAttribute("hidden", true);
    at("look-state").textContent = "Running the model on three prompts to see what the edits do ...";
    const found = await (await call(`${path}/explanation`)).json();
    removal(found.removal);
    at("look-text").textContent = found.text; at("look-text").hidden = false;
    at("look-state").textContent = `Together the edits move the next token by ${found.effect.toFixed(3)} nats, on: ${found.prompts.join(" ")}`;
  } catch (error) { trouble(error.message); at("look-state").textContent = ""; }
};

function removal(sites) {
  const [left, right, top, bottom] = [14, sheet("removal") - 14, 46, 196], high = Math.max(...sites.map((site) => site.nats), 1e-9);
  const wide = (right - left) / sites.length;
  at("removal").replaceChildren(
    svg("text", { x: left, y: 20 }, "how far the next token moves without one edit, nats"), svg("line", { class: "axis", x1: left, y1: bottom, x2: right, y2: bottom }),
    ...sites.flatMap((site, index) => {
      const tall = (bottom - top) * Math.max(site.nats, 0) / high, middle = left + (index + 0.5) * wide, thick = Math.min(wide * 0.8, 64);
      const bar = svg("rect", { x: middle - thick / 2, y: bottom - tall, width: thick, height: tall });
      bar.append(svg("title", {}, `${site.path}: ${site.nats.toFixed(4)}`));
      if (index % Math.ceil(44 / wide)) return [bar]; // a label needs some 44 pixels
      return [bar, svg("text", { class: "middle", x: middle, y: bottom - tall - 6 }, site.nats.toPrecision(2)),
        svg("text", { class: "middle", x: middle, y: bottom + 16 }, site.layer ?? index)];
    }), svg("text", { class: "end", x: right, y: 232 }, "layer"));
}

load();
