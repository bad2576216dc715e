"use strict";
// All texts are set through textContent, so that nothing in the data is parsed as HTML.
const report = JSON.parse(document.getElementById("data").textContent);
const FIRST = 10, PAGE = 50, MAX_COMPARED = 250000;
const words = report.words;
const filled = (text, ...values) => text.replace(/%([1-9])/g, (_, place) => values[place - 1]);
const byId = id => document.getElementById(id);
const models = report.models.map(model => model.name);
const metrics = report.metrics.filter(metric => metric.key in (report.rows[0].answers[0].scores));
const list = byId("rows");
let matching = [], drawn = 0;

function node(tag, text, attributes = {}) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function number(value) {
  if (value === null) return "-";
  const size = Math.abs(value);
  return size < 10 ? value.toFixed(3) : size < 10000 ? value.toFixed(1) : value.toPrecision(3);
}

const metricOf = key => metrics.find(metric => metric.key === key);
const score = (row, model, key) => row.answers[model].scores[key];

// How much better the second model's answer is; for one model alone, how good it is. Null if unknown.
function gain(row, choice) {
  const sign = metricOf(choice.metric).better === "lower" ? -1 : 1;
  const last = score(row, choice.to, choice.metric);
  if (last === null) return null;
  if (choice.from === choice.to) return sign * last;
  const first = score(row, choice.from, choice.metric);
  return first === null ? null : sign * (last - first);
}

// Differences: pieces outside the longest common subsequence of the two texts.

const PIECES = /[\p{Script=Hangul}\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}]|[\p{L}\p{M}\p{N}]+|\s+|./gsu;
const pieces = text => text.match(PIECES) || [];

function uncommon(text, other) {
  const a = pieces(text), b = pieces(other);
  if (a.length * b.length > MAX_COMPARED) return null;
  const wide = b.length + 1, table = new Uint32Array((a.length + 1) * wide);
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      table[i * wide + j] = a[i] === b[j] ? table[(i + 1) * wide + j + 1] + 1
        : Math.max(table[(i + 1) * wide + j], table[i * wide + j + 1]);
  const parts = [];
  for (let i = 0, j = 0; i < a.length;) {
    const common = j < b.length && a[i] === b[j];
    if (!common && j < b.length && table[i * wide + j + 1] > table[(i + 1) * wide + j]) { j++; continue; }
    const last = parts[parts.length - 1];
    if (last && last.marked === !common) last.text += a[i]; else parts.push({text: a[i], marked: !common});
    if (common) j++;
    i++;
  }
  return parts;
}

function marked(text, other) {
  const element = node("p", undefined, {dir: "auto"});
  const parts = other === null ? null : uncommon(text, other);
  if (parts === null) element.textContent = text;
  else for (const part of parts) element.append(part.marked && part.text.trim() ? node("mark", part.text) : part.text);
  if (!text) element.append(node("span", words.empty, {class: "dim"}));
  return element;
}

function textBlock(name, colour, text, other, more) {
  const element = node("div", undefined, {class: "said"});
  element.style.borderColor = `var(${colour})`;
  element.append(node("small", name), marked(text, other));
  if (more) element.append(node("small", more));
  return element;
}

function folded(title, text) {
  const element = node("details");
  element.append(node("summary", title));
  element.addEventListener("toggle", () => { if (element.open && element.children.length === 1) element.append(node("pre", text, {dir: "auto"})); });
  return element;
}

// The model that the judge prefers of two, or "tie"; null without a result.
function judgeOf(row, a, b) {
  const judged = (row.judge || []).find(each => each.models.includes(a) && each.models.includes(b));
  return !judged || judged.result === "none" ? null : {first: judged.models[0], second: judged.models[1]}[judged.result] ?? "tie";
}

function judgement(judged) {
  const winner = {first: models[judged.models[0]], second: models[judged.models[1]]}[judged.result];
  const result = winner === undefined ? words[`judge_${judged.result}`] : filled(words.judge_wins, winner);
  const element = node("div", undefined, {class: "judged"});
  const text = models.length > 2 ? `${filled(words.judge_pair, ...judged.models.map(at => models[at]))} · ${result}` : result;
  element.append(node("span", text));
  const reasons = judged.reasons.filter(Boolean);
  if (reasons.length) element.append(folded(words.judge_reasons, reasons.join("\n\n")));
  return element;
}

function item(row, choice) {
  const element = node("li", undefined, {"data-row": row.row});
  const head = node("div", undefined, {class: "head"});
  head.append(node("h3", filled(words.row, row.row)));
  const change = gain(row, choice), metric = metricOf(choice.metric);
  if (change !== null && choice.from !== choice.to) {
    const raw = metric.better === "lower" ? -change : change;
    const kind = change > 0 && metric.better ? "better" : change < 0 && metric.better ? "worse" : "dim";
    const word = {better: words.better, worse: words.worse, dim: change ? words.change : words.no_change}[kind];
    head.append(node("span", `${word}: ${metric.name} ${raw >= 0 ? "+" : ""}${number(raw)}`, {class: `change ${kind}`}));
  }
  element.append(head, folded(words.prompt, row.prompt));
  const against = choice.marks === "wanted" ? row.wanted : choice.marks === "first" ? row.answers[0].text : null;
  if (row.wanted !== null) element.append(textBlock(words.reference, "--reference", row.wanted, choice.marks === "first" ? against : null));
  row.answers.forEach((answer, at) => {
    const own = choice.marks === "first" && at === 0 ? null : against;
    const scores = metrics.map(each => each.key === "unended" ? (answer.ended ? "" : words.cut_off)
      : each.key === "exact" ? (answer.scores.exact ? each.name : "")
      : answer.scores[each.key] === null ? "" : `${each.name} ${number(answer.scores[each.key])}`);
    element.append(textBlock(models[at], `--m${at % 6}`, answer.text, own, scores.filter(Boolean).join(" · ")));
    if (answer.prompt !== undefined) element.append(folded(filled(words.prompt_of, models[at]), answer.prompt));
  });
  for (const judged of row.judge || []) element.append(judgement(judged));
  return element;
}

function chosen() {
  const value = id => byId(id) ? byId(id).value : "";
  return {metric: value("metric"), order: value("order"), filter: value("filter"), marks: value("marks"),
    from: byId("from") ? Number(value("from")) : 0, to: byId("to") ? Number(value("to")) : models.length - 1,
    search: value("search").normalize("NFC").toLowerCase()};
}

const FILTERS = {
  all: () => true,
  gained: (row, choice) => gain(row, choice) > 0,
  lost: (row, choice) => gain(row, choice) < 0,
  different: (row, choice) => row.answers[choice.from].text !== row.answers[choice.to].text,
  same: (row, choice) => row.answers[choice.from].text === row.answers[choice.to].text,
  right: (row, choice) => score(row, choice.to, "exact") === 100,
  judged_for: (row, choice) => judgeOf(row, choice.from, choice.to) === choice.to,
  judged_against: (row, choice) => judgeOf(row, choice.from, choice.to) === choice.from,
  unjudged: (row, choice) => judgeOf(row, choice.from, choice.to) === null,
  cut: row => row.answers.some(answer => !answer.ended),
  unwanted: row => row.wanted === null,
};

function holds(row, text) {
  return [row.prompt, row.wanted || "", ...row.answers.map(answer => answer.text)]
    .some(part => part.normalize("NFC").toLowerCase().includes(text));
}

function redraw() {
  const choice = chosen();
  matching = report.rows.filter(row => FILTERS[choice.filter](row, choice) && (!choice.search || holds(row, choice.search)));
  if (choice.order !== "data") {
    const sign = choice.order === "gain" ? -1 : 1;
    const known = new Map(matching.map(row => [row, gain(row, choice)]));
    matching.sort((a, b) => {
      const x = known.get(a), y = known.get(b);
      return x === null || y === null ? (x === null) - (y === null) : sign * (x - y) || a.row - b.row;
    });
  }
  list.replaceChildren();
  drawn = 0;
  more();
  byId("count").textContent = filled(words.count, matching.length, report.rows.length);
}

function more() {
  const choice = chosen();
  const next = drawn + (drawn ? PAGE : FIRST);
  for (const row of matching.slice(drawn, next)) list.append(item(row, choice));
  drawn = Math.min(matching.length, next);
  byId("more").hidden = drawn >= matching.length;
  byId("more").textContent = filled(words.more, matching.length - drawn);
}

for (const id of ["metric", "order", "filter", "marks", "from", "to"]) byId(id)?.addEventListener("change", redraw);
byId("search").addEventListener("input", redraw);
byId("more").addEventListener("click", () => {
  const next = drawn;
  more();
  list.children[next].tabIndex = -1;
  list.children[next].focus();
});
redraw();
