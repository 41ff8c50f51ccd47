"use strict";
// What comes from the daemon becomes text (textContent), never HTML.

const every = 2000; // milliseconds between two looks
const most = 200; // events that stay on the page
const byId = (id) => document.getElementById(id);

// write changes the text of an element only if it differs, so that a selection stays.
function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function create(tag, ...classes) {
  const element = document.createElement(tag);
  element.classList.add(...classes);
  return element;
}

// fill gives parent one child for each item, and keeps those that it has.
function fill(parent, items, make, show) {
  while (parent.children.length > items.length) parent.lastElementChild.remove();
  items.forEach((item, i) => {
    if (!parent.children[i]) parent.append(make());
    show(parent.children[i], item);
  });
}

const number = (n) => n.toLocaleString("en");

function span(milliseconds) {
  const s = Math.max(0, Math.floor(milliseconds / 1000));
  const two = (n) => String(n).padStart(2, "0");
  if (s < 60) return `${s}s`;
  if (s < 3600) return `${Math.floor(s / 60)}m${two(s % 60)}s`;
  if (s < 86400) return `${Math.floor(s / 3600)}h${two(Math.floor((s % 3600) / 60))}m`;
  return `${Math.floor(s / 86400)}d${two(Math.floor((s % 86400) / 3600))}h`;
}

const between = (from, to) => (from && to ? span(Date.parse(to) - Date.parse(from)) : "-");

function level(verdict) {
  if (verdict.startsWith("does not work")) return "bad";
  return /^works( for| in part)/.test(verdict) ? "part" : "good";
}

let before; // the state before, for rates

function showPath(state) {
  const seconds = before && before.started === state.started ? (Date.parse(state.now) - Date.parse(before.now)) / 1000 : 0;
  fill(byId("path"), state.path, () => {
    const li = create("li");
    li.append(create("h3"), create("dl"));
    return li;
  }, (li, step) => {
    const old = before?.path.find((s) => s.title === step.title);
    write(li.children[0], step.title);
    fill(li.children[1], step.counts, () => {
      const div = create("div");
      div.append(create("dt"), create("dd", "n"), create("dd", "why"));
      div.children[1].append(create("span"), create("span", "rate"));
      return div;
    }, (div, count) => {
      const more = count.n - (old?.counts.find((c) => c.name === count.name)?.n ?? count.n);
      const [total, rate] = div.children[1].children;
      write(div.children[0], count.name);
      write(total, number(count.n));
      write(rate, !count.now && seconds > 0 && more > 0 ? ` +${(more / seconds).toFixed(1)}/s` : "");
      write(div.children[2], count.why ?? "");
    });
  });
  before = state;
}

function showRows(state) {
  const columns = [(p) => p.int, (p) => (p.zone ? `${p.ext} zone ${p.zone}` : p.ext), (p) => p.peer_text, (p) => p.state_text,
    (p) => p.backend ?? "-", (p) => number(p.flows), (p) => number(p.children),
    (p) => between(p.since, state.now), (p) => between(state.now, p.expires)];
  fill(byId("rows"), state.rows, () => {
    const tr = create("tr");
    columns.forEach((_, i) => tr.append(create("td", ...(i === 3 ? ["state"] : i === 5 || i === 6 ? ["number"] : []))));
    return tr;
  }, (tr, p) => columns.forEach((column, i) => write(tr.children[i], column(p))));
  let text = `${number(state.found)} of ${number(state.all)} permissions`;
  if (state.found > state.rows.length) text += `, the first ${number(state.rows.length)} are shown: search for less`;
  write(byId("found"), state.error ? `${text}; ${state.error}` : text);
}

let searched = ""; // what the last announcement was about

function show(state, search) {
  const verdict = byId("verdict");
  write(verdict, state.verdict);
  verdict.dataset.level = level(state.verdict);
  write(byId("about"), `${state.version}, running for ${between(state.started, state.now)}`);
  byId("findings").hidden = state.findings.length === 0;
  fill(byId("findings").querySelector("ul"), state.findings, () => {
    const li = create("li");
    li.append(create("span"), create("code"));
    return li;
  }, (li, finding) => {
    write(li.children[0], finding.text);
    write(li.children[1], finding.fix ?? "");
  });
  showPath(state);
  showRows(state);
  if (search !== searched) write(byId("announce"), byId("found").textContent);
  searched = search;
}

// look asks for the state now, and again and again as long as somebody sees the page.
let timer, looking;
async function look() {
  clearTimeout(timer);
  looking?.abort();
  if (document.hidden) return;
  const mine = (looking = new AbortController());
  const search = byId("search").value;
  try {
    const answer = await fetch(`state?${new URLSearchParams({ search })}`, { signal: mine.signal });
    if (!answer.ok) throw new Error(await answer.text());
    const state = await answer.json();
    if (mine.signal.aborted) return;
    show(state, search);
    write(byId("trouble"), "");
  } catch (error) {
    if (mine.signal.aborted) return;
    write(byId("trouble"), `No answer from conenatd; what you see is old. (${error.message.trim()})`);
  }
  timer = setTimeout(look, every);
}

function showEvent(line) {
  const li = create("li");
  li.textContent = line;
  byId("events").prepend(li);
  while (byId("events").children.length > most) byId("events").lastElementChild.remove();
}

// watch shows events as they come, and connects again when the stream ends.
let paused = false;
let again, watching;
async function watch() {
  clearTimeout(again);
  watching?.abort();
  if (document.hidden || paused) return;
  const mine = (watching = new AbortController());
  let why = "the stream ended";
  try {
    const answer = await fetch("events", { signal: mine.signal });
    if (!answer.ok) throw new Error(await answer.text());
    write(byId("watching"), "");
    const decoder = new TextDecoder();
    let rest = "";
    for (const reader = answer.body.getReader(); ;) {
      const { done, value } = await reader.read();
      if (done) break;
      const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = lines.pop();
      lines.forEach(showEvent);
    }
  } catch (error) {
    why = error.message.trim();
  }
  if (mine.signal.aborted) return;
  write(byId("watching"), `No events: ${why}. The page tries again.`);
  again = setTimeout(watch, 5 * every);
}

byId("search").addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(look, 200);
});
byId("pause").addEventListener("click", () => {
  paused = !paused;
  write(byId("pause"), paused ? "Resume" : "Pause");
  write(byId("watching"), paused ? "Paused" : "");
  watch();
});
document.addEventListener("visibilitychange", () => {
  look();
  watch();
});
look();
watch();
