"use strict";
(() => {
const ROW = 128;        // tokens in a row of the page
const FIRST_ROWS = 6;   // drawn at once; the others follow while the page is already usable
const ROWS_A_FRAME = 12;
const LINE_AT = 0.1;    // of the full colour: from here the sign is underlined too

const measurements = Object.entries(JSON.parse(document.getElementById("data").textContent));
let [name, data] = measurements[0];
const at = (id) => document.getElementById(id);
const rows = at("rows"), card = at("card"), map = at("map");
const shown = { rollout: -1, list: [], drawn: 0, focus: null };

// -- data ------------------------------------------------------------------------------------------------------------

const mean = (r, which, digits) => r.mean[which] === null ? "not finite" : r.mean[which].toFixed(digits);
const nats = (value) => value === null ? NaN : value * data.units.nats;

function textOf(r) {
  r.text ??= Array.from(r.tokens, (i) => data.texts[i]).join("");
  return r.text;
}

// The character that token t is a part of, where it is one: the fewest neighbours whose bytes make whole characters.
function characterAt(r, t) {
  const bytes = (i) => data.bytes[r.tokens[i]];
  for (let length = 2; length <= 4; length++)
    for (let from = Math.max(0, t - length + 1); from <= t; from++) {
      const parts = Array.from({ length }, (_, i) => bytes(from + i));
      if (parts.includes(undefined)) continue;
      const joined = Uint8Array.from(parts.join("").match(/../g), (x) => parseInt(x, 16));
      try { return new TextDecoder("utf-8", { fatal: true }).decode(joined); } catch { /* not whole characters */ }
    }
  return null;
}

// What must not act on the page is spelled out: control characters, invisible ones, those that turn the direction of
// the text, halves of surrogate pairs.
const SPELLED = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;
function visible(text) {
  return text
    .replace(SPELLED, (c) => c < "\u0100" ? "\\x" + c.charCodeAt(0).toString(16).padStart(2, "0")
                                          : "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"))
    .replaceAll("\n", "\u21b5\n").replaceAll("\t", "\u21e5\t");
}
const oneLine = (text) => visible(text).replaceAll("\n", "").replaceAll("\t", "").replaceAll(" ", "\u2423");

function element(tag, className, text) {
  const e = document.createElement(tag);
  if (className) e.className = className;
  if (text !== undefined) e.textContent = text;
  return e;
}

const verdict = (r) =>
  r.ok === null ? ["?", "has no verdict"] : r.ok ? ["\u2713", "succeeds"] : ["\u2717", "fails"];

// -- the list --------------------------------------------------------------------------------------------------------

function matches(r) {
  const filter = at("filter").value, words = at("search").value.toLowerCase();
  if (filter !== "all" && r.ok !== (filter === "success")) return false;
  if (!words) return true;
  const [question, answer] = data.groups[r.group];
  return [question, answer, textOf(r)].some((text) => text.toLowerCase().includes(words));
}

function fillList() {
  shown.list = data.rollouts.flatMap((r, i) => matches(r) ? [i] : []);
  const items = [];
  let group = -1;
  for (const i of shown.list) {
    const r = data.rollouts[i];
    if (r.group !== group) {
      group = r.group;
      const head = element("li", "group", visible(data.groups[group][0]).replaceAll("\n", " "));
      head.title = head.textContent;
      items.push(head);
    }
    const button = element("button");
    button.dataset.rollout = i;
    button.append(
      element("span", "", verdict(r)[0]),
      element("span", "what", `${r.index + 1} ${verdict(r)[1]}`),
      element("span", "num", r.tau === null ? "" : `\u03c4 ${r.tau}`),
      element("span", "num", `|A| ${mean(r, 0, 2)}`));
    const item = element("li");
    item.append(button);
    items.push(item);
  }
  at("list").querySelector("ol").replaceChildren(...items);
  if (shown.list.length && !shown.list.includes(shown.rollout)) open(shown.list[0]);
  else refreshPlace();
}

function refreshPlace() {
  const place = shown.list.indexOf(shown.rollout);
  at("place").textContent = shown.list.length ? `${place + 1} / ${shown.list.length}` : "0 / 0";
  at("prev").disabled = place <= 0;
  at("next").disabled = place < 0 || place + 1 >= shown.list.length;
  at("empty").hidden = shown.list.length > 0;
  for (const id of ["question", "facts", "map", "tools", "heads", "rows"]) at(id).hidden = !shown.list.length;
  for (const button of at("list").querySelectorAll("button")) {
    const current = Number(button.dataset.rollout) === shown.rollout;
    button.setAttribute("aria-current", String(current));
    if (current && innerWidth > 860) button.scrollIntoView({ block: "nearest" });
  }
}

function step(by) {
  const next = shown.list[shown.list.indexOf(shown.rollout) + by];
  if (next !== undefined) open(next);
}

// -- one rollout -----------------------------------------------------------------------------------------------------

function open(i, t) {
  const r = data.rollouts[i];
  shown.rollout = i;
  hide();
  const peer = r.peer === null ? null : data.rollouts[r.peer];
  const [question, answer] = data.groups[r.group];
  const judged = data.rollouts.filter((other) => other.group === r.group && other.ok !== null);
  const right = judged.filter((other) => other.ok).length, reward = r.ok === null ? "" : ` (reward ${r.reward})`;
  at("question").replaceChildren(
    element("b", "", "Question "), visible(question), element("b", "", "  Answer "), visible(answer),
    element("b", "", "  Success "), `${right} of ${judged.length}` + (name ? ` ${name}` : ""));
  at("facts").replaceChildren(
    element("b", "", verdict(r).join(" ")), `${reward}, ${r.tokens.length} tokens, `,
    element("b", "", tauWords(r, peer)), `. Mean |A| ${mean(r, 0, 3)} nats; of the answer-only teacher ${mean(r, 1, 3)}.`);
  at("own-head").textContent = `Rollout ${r.index + 1}`;
  at("peer-head").replaceChildren(peer ? `Its peer: rollout ${peer.index + 1}` : "No peer");
  if (peer) {
    const button = element("button", "", "open");
    button.addEventListener("click", () => { at("filter").value = "all"; at("search").value = ""; open(r.peer); fillList(); });
    at("peer-head").append(button);
  }
  at("go-tau").disabled = r.tau === null;
  draw();
  refreshPlace();
  if (t !== undefined) goTo(t);
  else history.replaceState(null, "", hash(i));
}

function hash(i, t) {
  const words = at("measurement").selectedIndex > 0 ? [`m=${at("measurement").selectedIndex}`] : [];
  return "#" + [...words, `r=${i}`, ...(t === undefined ? [] : [`t=${t}`])].join("&");
}

// Another measurement of the same questions: the same place of the same group.
function change(m) {
  at("measurement").selectedIndex = m;
  [name, data] = measurements[m];
  const i = shown.rollout;
  fillList();
  if (!shown.list.length || shown.list.includes(i)) open(i);  // also where it is hidden: another filter may show it
}

function tauWords(r, peer) {
  if (!peer) return "no successful peer: the teacher sees the answer alone";
  if (r.tau === null) return "never leaves its peer";
  return `\u03c4 = ${r.tau}` + (r.tau === peer.tokens.length ? ", where the peer ends" : "");
}

function draw() {
  const r = data.rollouts[shown.rollout];
  rows.replaceChildren();
  shown.drawn = 0;
  drawRows(FIRST_ROWS);
  const rollout = shown.rollout;
  const more = () => { if (shown.rollout === rollout && drawRows(ROWS_A_FRAME)) requestAnimationFrame(more); };
  requestAnimationFrame(more);
  drawMap(r);
  at("legend").querySelector(".low").textContent = `\u2212${limit()}`;
  at("legend").querySelector(".high").textContent = `+${limit()} nats`;
}

const limit = () => Number(at("limit").value);
const chosen = (r) => at("teacher").value === "credit" ? r.credit : r.answer;

function drawRows(count) {
  const r = data.rollouts[shown.rollout], peer = r.peer === null ? null : data.rollouts[r.peer];
  const total = Math.ceil(Math.max(r.tokens.length, peer ? peer.tokens.length : 0) / ROW);
  const last = Math.min(total, shown.drawn + count);
  const fragment = document.createDocumentFragment();
  for (let row = shown.drawn; row < last; row++) {
    const line = element("div", "row"), start = row * ROW;
    line.append(element("div", "at", String(start)), side(r, "own", start, r), peer ? side(peer, "peer", start, r) : noPeer(row));
    fragment.append(line);
  }
  rows.append(fragment);
  shown.drawn = last;
  return last < total;
}

const noPeer = (row) =>
  element("div", "side none", row ? "" : "No other rollout of this group succeeded, so the teacher saw the answer alone.");

function side(from, which, start, r) {
  const box = element("div", `side ${which}`), stop = Math.min(from.tokens.length, start + ROW);
  const full = limit(), values = chosen(from);
  for (let t = start; t < stop; t++) {
    const token = element("span", "tok", visible(data.texts[from.tokens[t]]));
    token.dataset.t = t;
    if (which === "own") {
      const a = nats(values[t]), share = Math.min(1, Math.abs(a) / full);
      if (share >= 0.01) {
        token.classList.add(a > 0 ? "pos" : "neg");
        token.style.setProperty("--a", (0.75 * share).toFixed(3));
        if (share >= LINE_AT) token.classList.add("line");
      }
    } else if (r.tau === null || t < r.tau) token.classList.add("same");
    if (t === r.tau) token.classList.add("tau");
    box.append(token);
  }
  if (which === "peer" && r.tau === from.tokens.length && stop === r.tau && start < stop)
    box.append(element("span", "tau end", "the peer ends here"));
  if (which === "own" && start === 0) box.firstElementChild.tabIndex = 0;
  return box;
}

function drawMap(r) {
  const width = map.width = Math.max(300, Math.round(map.clientWidth * devicePixelRatio)), height = map.height;
  const paint = map.getContext("2d"), style = getComputedStyle(document.documentElement);
  const values = chosen(r), n = values.length, full = limit(), middle = height / 2;
  const bar = Math.max(1, width / n);
  paint.clearRect(0, 0, width, height);
  for (let x = 0; x < Math.min(width, n); x++) {  // a column shows the largest |A| of its tokens
    const from = Math.floor(x * n / Math.min(width, n)), to = Math.max(from + 1, Math.floor((x + 1) * n / Math.min(width, n)));
    let a = 0;
    for (let t = from; t < to; t++) if (Math.abs(nats(values[t])) > Math.abs(a)) a = nats(values[t]);
    const size = Math.min(1, Math.abs(a) / full) * (middle - 3);
    paint.fillStyle = `rgb(${style.getPropertyValue(a > 0 ? "--pos" : "--neg")})`;
    paint.fillRect(from / n * width, a > 0 ? middle - size : middle, Math.max(1, bar * 0.9), size);
  }
  paint.fillStyle = getComputedStyle(at("facts")).color;
  paint.fillRect(0, middle, width, 1);
  if (r.tau !== null) {
    paint.fillStyle = getComputedStyle(at("facts").querySelector("b")).color;
    const x = (r.tau + 0.5) / n * width;
    for (let y = 0; y < height; y += 6) paint.fillRect(x, y, 1.5, 3);
    paint.font = "italic 13px serif";
    paint.fillText("\u03c4", Math.min(x + 4, width - 12), 12);
  }
}

// -- one token -------------------------------------------------------------------------------------------------------

function find(t, which = "own") {
  while (shown.drawn * ROW <= t && drawRows(ROWS_A_FRAME));
  return rows.querySelector(`.${which} > .tok[data-t="${t}"]`);
}

function goTo(t, which = "own") {
  const token = find(t, which);
  if (!token) return;
  history.replaceState(null, "", hash(shown.rollout, t));
  token.scrollIntoView({ block: "center" });
  requestAnimationFrame(() => {  // rows that were skipped so far now have their true heights
    token.scrollIntoView({ block: "center" });
    focusOn(token);
  });
}

function focusOn(token) {
  for (const old of rows.querySelectorAll('[tabindex="0"]')) old.tabIndex = -1;
  token.tabIndex = 0;
  token.focus({ preventScroll: true });
  show(token);
}

function show(token) {
  const own = data.rollouts[shown.rollout], isPeer = token.parentElement.classList.contains("peer");
  const r = isPeer ? data.rollouts[own.peer] : own, t = Number(token.dataset.t);
  const a = nats(r.credit[t]), logp = nats(r.logp[t]);
  const chance = { student: Math.exp(logp), teacher: Math.exp(logp + a) };
  for (const name in chance) {  // finer than what the rounded logarithms give
    const { ids, probs } = r.top[name], k = ids.length / r.tokens.length, i = ids.slice(t * k, (t + 1) * k).indexOf(r.tokens[t]);
    if (i >= 0) chance[name] = probs[t * k + i] * data.units.probability;
  }
  const offset = own.tau === null ? "" : ` (\u03c4 ${t < own.tau ? "\u2212" : "+"} ${Math.abs(t - own.tau)})`;
  const where = element("div", "", `${isPeer ? "peer, " : ""}token ${t}${own.tau === t ? " (\u03c4)" : offset} `);
  where.append(element("span", "name", oneLine(data.texts[r.tokens[t]])));
  const character = characterAt(r, t);
  if (character) where.append(" part of ", element("span", "name", oneLine(character)));
  const facts = element("dl");
  const fact = (name, value) => facts.append(element("dt", "", name), element("dd", "", value));
  fact(isPeer ? "credit under its own teacher" : "credit A", `${signed(a)} nats`);
  fact("answer-only teacher", `${signed(nats(r.answer[t]))} nats`);
  fact("KL(teacher \u2016 student)", `${nats(r.kl[t]).toFixed(3)} nats`);
  fact("probability", `${percent(chance.student)} student, ${percent(chance.teacher)} teacher`);
  const tops = element("div", "tops");
  for (const name of ["student", "teacher"]) {
    const column = element("section"), { ids, probs } = r.top[name], k = ids.length / r.tokens.length;
    column.append(element("h3", "", `${name}'s likeliest tokens`));
    for (let i = t * k; i < (t + 1) * k; i++) {
      const p = probs[i] * data.units.probability, line = element("div", ids[i] === r.tokens[t] ? "this" : "");
      line.style.setProperty("--p", p.toFixed(4));
      line.append(element("span", "", oneLine(data.texts[ids[i]])), element("span", "", percent(p)));
      column.append(line);
    }
    tops.append(column);
  }
  card.replaceChildren(where, facts, tops);
  card.hidden = false;
  place(token);
  shown.focus?.removeAttribute("aria-describedby");
  token.setAttribute("aria-describedby", "card");
  shown.focus = token;
}

function place(token) {
  const box = token.getClientRects()[0] ?? token.getBoundingClientRect(), size = card.getBoundingClientRect();
  const below = box.bottom + 8, fits = below + size.height < innerHeight;
  card.style.left = `${Math.max(8, Math.min(box.left, document.documentElement.clientWidth - size.width - 8))}px`;
  card.style.top = `${fits ? below : Math.max(8, box.top - size.height - 8)}px`;
}

function hide() { card.hidden = true; }
const signed = (x) => (x < 0 ? "\u2212" : "+") + Math.abs(x).toFixed(3);
const percent = (p) => p < 0.0001 ? "<0.01%" : `${(100 * p).toFixed(p < 0.1 || p > 0.99 ? 2 : 1)}%`;

function peak(r) {
  const values = chosen(r);
  let best = 0;
  for (let t = 1; t < values.length; t++) if (Math.abs(values[t]) > Math.abs(values[best])) best = t;
  return best;
}

// -- events ----------------------------------------------------------------------------------------------------------

const tokenOf = (event) => event.target instanceof Element ? event.target.closest(".tok[data-t]") : null;
rows.addEventListener("pointerover", (e) => { const token = tokenOf(e); if (token && e.pointerType !== "touch") show(token); });
rows.addEventListener("pointerleave", hide);
rows.addEventListener("focusin", (e) => { const token = tokenOf(e); if (token) show(token); });
rows.addEventListener("click", (e) => { const token = tokenOf(e); if (token) focusOn(token); });
document.addEventListener("scroll", () => {  // the card stays with a token that has the focus
  if (!card.hidden && shown.focus === document.activeElement) place(shown.focus);
  else hide();
}, { passive: true });
document.addEventListener("pointerdown", (e) => { if (!tokenOf(e)) hide(); });

rows.addEventListener("keydown", (e) => {
  const token = tokenOf(e);
  if (!token || e.ctrlKey || e.metaKey || e.altKey) return;
  const which = token.parentElement.classList.contains("peer") ? "peer" : "own", t = Number(token.dataset.t);
  const own = data.rollouts[shown.rollout], other = own.peer === null ? null : data.rollouts[own.peer];
  const last = (which === "peer" ? other : own).tokens.length - 1;
  const moves = { ArrowLeft: t - 1, ArrowRight: t + 1, ArrowUp: t - 10, ArrowDown: t + 10, Home: 0, End: last };
  if (e.key in moves) {
    const next = find(Math.max(0, Math.min(last, moves[e.key])), which);
    next.scrollIntoView({ block: "nearest" });
    focusOn(next);
  } else if (e.key === "p" && other) {
    const across = which === "peer" ? own : other;
    focusOn(find(Math.min(t, across.tokens.length - 1), which === "peer" ? "own" : "peer"));
  } else return;
  e.preventDefault();
});

const keys = { b: () => change((at("measurement").selectedIndex + 1) % measurements.length), j: () => step(1), k: () => step(-1), t: () => at("go-tau").click(), m: () => at("go-peak").click(), Escape: hide };
document.addEventListener("keydown", (e) => {
  if (e.target.matches("input, select") || e.ctrlKey || e.metaKey || e.altKey || !(e.key in keys)) return;
  if (!shown.list.length && e.key !== "b") return;
  keys[e.key]();
});

at("prev").addEventListener("click", () => step(-1));
at("next").addEventListener("click", () => step(1));
at("filter").addEventListener("change", fillList);
at("search").addEventListener("input", fillList);
at("search").addEventListener("keydown", (e) => {  // Enter: the first token of the match in the rollout that is open
  const words = at("search").value.toLowerCase(), r = data.rollouts[shown.rollout];
  if (e.key !== "Enter" || !words || !shown.list.length) return;
  const place = textOf(r).toLowerCase().indexOf(words);
  let end = 0;
  if (place >= 0) goTo(r.tokens.findIndex((i) => (end += data.texts[i].length) > place));
});
at("measurement").addEventListener("change", () => change(at("measurement").selectedIndex));
at("teacher").addEventListener("change", draw);
at("limit").addEventListener("change", draw);
at("list").addEventListener("click", (e) => {
  const button = e.target.closest("button");
  if (button) open(Number(button.dataset.rollout));
});
at("go-tau").addEventListener("click", () => {
  const r = data.rollouts[shown.rollout];
  if (r.tau !== null) goTo(r.tau);
});
at("go-peak").addEventListener("click", () => goTo(peak(data.rollouts[shown.rollout])));
map.addEventListener("click", (e) => {
  const box = map.getBoundingClientRect(), n = data.rollouts[shown.rollout].tokens.length;
  goTo(Math.max(0, Math.min(n - 1, Math.floor((e.clientX - box.left) / box.width * n))));
});
addEventListener("resize", () => { if (shown.list.length) drawMap(data.rollouts[shown.rollout]); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawMap(data.rollouts[shown.rollout]));
addEventListener("beforeprint", () => { while (drawRows(1000)); });

// -- start -----------------------------------------------------------------------------------------------------------

for (const value of data.limits) at("limit").add(new Option(`\u00b1${value} nats`, value, value === data.limit, value === data.limit));
for (const [i, [label]] of measurements.entries()) at("measurement").add(new Option(label, i));
for (const part of document.querySelectorAll(".switch")) part.hidden = measurements.length < 2;
if (innerWidth <= 860) at("list").open = false;
const asked = new URLSearchParams(location.hash.slice(1));
const m = Number(asked.get("m") ?? 0);
if (m in measurements) { at("measurement").selectedIndex = m; [name, data] = measurements[m]; }
const first = Number(asked.get("r") ?? data.first);
fillList();
open(first in data.rollouts ? first : 0, asked.has("t") ? Number(asked.get("t")) : undefined);
})();
