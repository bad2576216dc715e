
// Blind votes: two answers to a row, in random order and without names. Votes stay in the browser.

const ballots = byId("votes") && {rows: [], at: 0, votes: {}, a: 0, b: 1};
const FNV = 16777619, RESAMPLES = 2000;

// 32 mixed bits of a text: FNV-1a, then the last steps of MurmurHash3, since FNV's low bits say little.
function mixed(text) {
  let bits = 2166136261;
  for (const char of text) bits = Math.imul(bits ^ char.codePointAt(0), FNV);
  bits = Math.imul(bits ^ bits >>> 16, 2246822507);
  bits = Math.imul(bits ^ bits >>> 13, 3266489909);
  return (bits ^ bits >>> 16) >>> 0;
}

const placeName = () => `yeonma votes ${report.id} ${ballots.a} ${ballots.b}`;
const bitsOf = (row, what) => mixed(`${report.id} ${ballots.a} ${ballots.b} ${row.row} ${what}`);
const leftOf = row => bitsOf(row, "side") & 1 ? ballots.b : ballots.a;
const rightOf = row => leftOf(row) === ballots.a ? ballots.b : ballots.a;
const isVoting = () => document.body.classList.contains("voting");

// Browsers may refuse storage, such as to pages that were opened from a disk. Votes then last as long as the page.
const inPage = new Map();

function keep() {
  inPage.set(placeName(), ballots.votes);
  try { localStorage.setItem(placeName(), JSON.stringify(ballots.votes)); } catch { /* they stay in the page */ }
}

function kept() {
  if (inPage.has(placeName())) return inPage.get(placeName());
  try { return JSON.parse(localStorage.getItem(placeName())) || {}; } catch { return {}; }
}

function openBallots() {
  ballots.a = byId("vote-first") ? Number(byId("vote-first").value) : 0;
  ballots.b = byId("vote-second") ? Number(byId("vote-second").value) : 1;
  const differ = row => row.answers[ballots.a].text !== row.answers[ballots.b].text;
  ballots.rows = ballots.a === ballots.b ? [] : report.rows.filter(differ);
  ballots.rows.sort((one, other) => bitsOf(one, "turn") - bitsOf(other, "turn") || one.row - other.row);
  const known = new Set(ballots.rows.map(row => String(row.row)));
  const valid = [ballots.a, ballots.b, "tie"];
  ballots.votes = Object.fromEntries(Object.entries(kept()).filter(([row, vote]) => known.has(row) && valid.includes(vote)));
  ballots.at = Math.max(0, ballots.rows.findIndex(row => !(row.row in ballots.votes)));
  const cast = Object.keys(ballots.votes).length;
  byId("vote-start").textContent = cast ? filled(words.vote_on, cast, ballots.rows.length) : words.vote_start;
  byId("vote-start").disabled = !ballots.rows.length;
  byId("vote-state").textContent = ballots.rows.length ? "" : words.vote_equal;
  byId("ballot").hidden = true;
  byId("tally").hidden = !cast;
  if (cast) reveal();
}

function showBallot() {
  const row = ballots.rows[ballots.at];
  document.body.classList.add("voting");
  byId("ballot").hidden = false;
  byId("tally").hidden = true;
  byId("vote-start").hidden = true;
  byId("ballot-heading").textContent = filled(words.vote_row, row.row, ballots.at + 1, ballots.rows.length);
  byId("ballot-prompt").textContent = row.prompt;
  byId("ballot-reference").replaceChildren(...row.wanted === null ? [] : [folded(words.reference, row.wanted)]);
  [leftOf(row), rightOf(row)].forEach((model, side) => {
    const text = row.answers[model].text;
    byId(`ballot-${side + 1}`).replaceChildren(text || node("span", words.empty, {class: "dim"}));
    const vote = ballots.votes[row.row];
    byId(`vote-${side + 1}`).setAttribute("aria-pressed", String(vote === model));
  });
  byId("vote-0").setAttribute("aria-pressed", String(ballots.votes[row.row] === "tie"));
  byId("vote-back").disabled = ballots.at === 0;
  byId("ballot-heading").focus();
}

function vote(choice) {
  const row = ballots.rows[ballots.at];
  ballots.votes[row.row] = choice === "0" ? "tie" : choice === "1" ? leftOf(row) : rightOf(row);
  keep();
  step(1);
}

function step(by) {
  ballots.at += by;
  if (ballots.at < 0) ballots.at = 0;
  if (ballots.at < ballots.rows.length) showBallot(); else endVoting();
}

function endVoting() {
  document.body.classList.remove("voting");
  byId("ballot").hidden = true;
  byId("vote-start").hidden = false;
  openBallots();
  (byId("tally").hidden ? byId("vote-start") : byId("tally-heading")).focus();
}

// The middle 95% of bootstrap resamples of the mean, from random numbers that follow from the report.
function interval(values) {
  let state = mixed(report.id);
  const random = () => {
    state = state + 0x6D2B79F5 | 0;
    let bits = Math.imul(state ^ state >>> 15, 1 | state);
    bits = bits + Math.imul(bits ^ bits >>> 7, 61 | bits) ^ bits;
    return ((bits ^ bits >>> 14) >>> 0) / 4294967296;
  };
  const means = new Float64Array(RESAMPLES).map(() => {
    let sum = 0;
    for (let draw = 0; draw < values.length; draw++) sum += values[Math.floor(random() * values.length)];
    return sum / values.length;
  }).sort();
  return [means[Math.floor(.025 * RESAMPLES)], means[Math.ceil(.975 * RESAMPLES) - 1]];
}

function reveal() {
  const cast = ballots.rows.filter(row => row.row in ballots.votes);
  const count = vote => cast.filter(row => ballots.votes[row.row] === vote).length;
  const [first, second, ties] = [ballots.a, ballots.b, "tie"].map(count);
  const points = cast.map(row => ({[ballots.a]: 0, [ballots.b]: 1, tie: .5})[ballots.votes[row.row]]);
  const percent = value => (100 * value).toFixed(1);
  const lines = [
    filled(words.vote_wins, models[ballots.a], first), filled(words.vote_wins, models[ballots.b], second),
    filled(words.vote_ties, ties),
  ];
  if (cast.length > 1) {
    const [low, high] = interval(points);
    const rate = percent(points.reduce((sum, point) => sum + point, 0) / points.length);
    lines.push(filled(words.vote_rate, models[ballots.b], rate, percent(low), percent(high)));
  }
  const judged = cast.map(row => [row, judgeOf(row, ballots.a, ballots.b)]).filter(([, winner]) => winner !== null);
  if (judged.length) {
    const same = judged.filter(([row, winner]) => ballots.votes[row.row] === winner).length;
    lines.push(filled(words.vote_judge, same, judged.length));
  }
  const open = ballots.rows.length - cast.length, equal = report.rows.length - ballots.rows.length;
  if (open) lines.push(filled(words.vote_open, open));
  if (equal) lines.push(filled(words.vote_same, equal));
  const pairs = preferencePairs(cast);
  lines.push(filled(words.vote_pairs, pairs.length));
  const left = first + second - pairs.length;
  if (left) lines.push(filled(words.vote_left, left));
  byId("tally-lines").replaceChildren(...lines.map(line => node("li", line)));
  byId("vote-save").disabled = !pairs.length;
}

// Rows for `yeonma dpo`: the prompt's columns, and the two answers as they were generated, not as they are shown.
function preferencePairs(rows) {
  return rows.flatMap(row => {
    const winner = ballots.votes[row.row];
    if (winner === "tie" || row.columns === null) return [];
    const loser = winner === ballots.a ? ballots.b : ballots.a;
    const [chosen, rejected] = [winner, loser].map(model => row.answers[model].raw ?? row.answers[model].text);
    if (!chosen.trim() || !rejected.trim()) return [];
    const turn = text => "messages" in row.columns ? [{role: "assistant", content: text}] : text;
    return [{...row.columns, chosen: turn(chosen), rejected: turn(rejected)}];
  });
}

function savePairs() {
  const lines = preferencePairs(ballots.rows.filter(row => row.row in ballots.votes)).map(pair => JSON.stringify(pair) + "\n");
  const link = node("a", undefined, {download: "pairs.jsonl"});
  link.href = URL.createObjectURL(new Blob(lines, {type: "application/x-ndjson"}));
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

function forget() {
  if (!confirm(words.vote_forget)) return;
  ballots.votes = {};
  keep();
  openBallots();
  byId("vote-start").focus();
}

if (ballots) {
  byId("vote-start").addEventListener("click", () => { openBallots(); showBallot(); });
  for (const choice of ["0", "1", "2"]) byId(`vote-${choice}`).addEventListener("click", () => vote(choice));
  byId("vote-back").addEventListener("click", () => step(-1));
  byId("vote-end").addEventListener("click", endVoting);
  byId("vote-save").addEventListener("click", savePairs);
  byId("vote-forget").addEventListener("click", forget);
  for (const id of ["vote-first", "vote-second"]) byId(id)?.addEventListener("change", openBallots);
  document.addEventListener("keydown", event => {
    if (!isVoting() || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (["0", "1", "2"].includes(event.key)) vote(event.key);
    else if (event.key === "Backspace") step(-1);
    else if (event.key === "Escape") endVoting();
    else return;
    event.preventDefault();
  });
  openBallots();
}
