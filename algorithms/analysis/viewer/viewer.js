"use strict";
// Whatever comes from a model or a corpus becomes a text node and nothing else: no innerHTML anywhere.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
let shown = [];
let current = null;

function make(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.filter((child) => child !== null && child !== ""));
  return node;
}

// --- filters -----------------------------------------------------------------------------------------------------

const played = (item) => item.episodes.filter(Boolean);
const said = (episode) => episode.turns.map((turn) => turn.parts.join("")).join("\n");
for (const item of data.items) {
  item.text = [item.id, item.question, ...item.golden, ...played(item).map(said)].join("\n").toLowerCase();
}

function options(id, entries) {
  $(id).replaceChildren(...entries.map(([value, label]) => new Option(label, value)));
  $(id).closest("label").hidden = entries.length < 2;
}

function distinct(values) {
  return [...new Set(values.filter((value) => value !== null))];
}

function fillFilters() {
  const all = ["", "all"];
  const places = distinct(data.items.map((item) => item.place));
  options("place", places.length > 1 ? [all, ...places.map((place) => [place, place])] : []);
  const several = data.columns.length > 1;
  const verdicts = data.columns.flatMap((name, column) =>
    ["right", "wrong"].map((verdict) => [`${column} ${verdict}`, several ? `${verdict}: ${name}` : verdict]));
  options("verdict", [all, ...verdicts, ...(several ? [["differ", "not the same"]] : [])]);
  const endings = distinct(data.items.flatMap((item) => played(item).map((episode) => episode.ending))).sort();
  options("ending", endings.length > 1 ? [all, ...endings.map((ending) => [ending, ending.replaceAll("_", " ")])] : []);
  const groups = distinct(data.items.map((item) => item.group)).sort();
  const hops = distinct(data.items.map((item) => item.hops)).sort((a, b) => a - b);
  options("group", [all, ...(groups.length > 1 ? groups.map((name) => [`group ${name}`, name]) : []),
    ...(hops.length > 1 ? hops.map((count) => [`hops ${count}`, `${count} ${count === 1 ? "hop" : "hops"}`]) : [])]);
  const searches = distinct(data.items.flatMap((item) => played(item).map((episode) => episode.searches)));
  options("searches", [all, ...searches.sort((a, b) => a - b).map((count) => [String(count), String(count)])]);
  const figures = Object.entries(data.figures).map(([name, figure]) => [name, figure.label]);
  options("colour", figures.length ? [["", "none"], ...figures] : []);
}

function passes(item) {
  const [place, verdict, ending, group, searches] =
    ["place", "verdict", "ending", "group", "searches"].map((id) => $(id).value);
  const episodes = played(item);
  if (place && item.place !== place) return false;
  if (group && String(group.startsWith("group ") ? item.group : item.hops) !== group.slice(group.indexOf(" ") + 1)) {
    return false;
  }
  if (verdict === "differ") {
    if (new Set(episodes.map((episode) => episode.verdict === "right")).size < 2) return false;
  } else if (verdict) {
    const [column, wanted] = verdict.split(" ");
    const episode = item.episodes[Number(column)];
    if (!episode || (episode.verdict === "right") !== (wanted === "right")) return false;
  }
  return (!ending || episodes.some((episode) => episode.ending === ending))
    && (!searches || episodes.some((episode) => episode.searches === Number(searches)))
    && (!$("malformed").checked || episodes.some((episode) => episode.malformed))
    && item.text.includes($("text").value.toLowerCase());
}

// --- the list ----------------------------------------------------------------------------------------------------

function verdictMark(episode, words) {
  if (!episode) return make("span", "", "– ");
  const right = episode.verdict === "right";
  const sign = make("span", "", right ? "✓ " : "✗ ");
  sign.ariaHidden = "true";
  return make("span", right ? "right" : "wrong", sign, words ? episode.verdict : "");
}

function entry(item, number) {
  const button = make("button", "", ...item.episodes.map((episode) => verdictMark(episode, false)), item.question);
  const verdicts = item.episodes.map((episode) => (episode ? episode.verdict : "not played")).join(", ");
  const about = [item.place, item.group, ...played(item).slice(0, 1).map(searchCount)].filter(Boolean).join(" · ");
  button.append(make("small", "", about));
  button.ariaLabel = `${verdicts}: ${item.question}, ${about}`;
  button.type = "button";
  button.addEventListener("click", () => show(number));
  return make("li", "", button);
}

const searchCount = (episode) => `${episode.searches} ${episode.searches === 1 ? "search" : "searches"}`;

function refresh() {
  const before = shown[current];
  shown = data.items.filter(passes);
  $("questions").replaceChildren(...shown.map(entry));
  $("count").textContent = `${shown.length} of ${data.items.length} episodes`;
  show(Math.max(0, shown.indexOf(before)));
}

const buttons = () => $("questions").querySelectorAll("button");

function show(number) {
  buttons()[current]?.removeAttribute("aria-current");
  current = number;
  const button = buttons()[number];
  if (!button) {
    $("episode").replaceChildren(make("p", "about", "Nothing passes these filters."));
    return;
  }
  button.setAttribute("aria-current", "true");
  if ($("questions").contains(document.activeElement)) button.focus({ preventScroll: true });
  const list = $("questions");
  const top = button.getBoundingClientRect().top - list.getBoundingClientRect().top;
  if (top < 0 || top + button.offsetHeight > list.clientHeight) list.scrollTop += top - list.clientHeight / 3;
  $("episode").replaceChildren(...episodeNodes(shown[number]));
}

// --- an episode --------------------------------------------------------------------------------------------------

function episodeNodes(item) {
  const about = [item.place, item.group, item.hops && `${item.hops} ${item.hops === 1 ? "hop" : "hops"}`, item.id];
  const sides = item.episodes.map((episode, column) => side(episode, item.players[column]));
  return [make("h2", "", item.question), make("p", "about", about.filter(Boolean).join(" · ")),
    item.golden.length ? make("p", "", "Golden answer: ", make("mark", "", item.golden.join(" / "))) : "",
    make("div", "sides", ...sides)].filter(Boolean);
}

const told = (figure) => figure ?? "not finite";

function side(episode, name) {
  const heading = make("h3", "", name);
  if (!episode) return make("section", "side", heading, make("p", "about", "not played"));
  const facts = [episode.answer !== null && `answer: ${episode.answer || "(empty)"}`, `F1 ${told(episode.f1)}`,
    `reward ${told(episode.reward)}`, searchCount(episode), `${episode.tokens} tokens`,
    episode.malformed && `${episode.malformed} malformed`, episode.source !== "policy" && `by the ${episode.source}`];
  const line = make("p", "about", verdictMark(episode, true), ` · ${facts.filter(Boolean).join(" · ")}`);
  return make("section", "side", heading, line, ...episode.turns.map(turnNode));
}

function turnNode(turn, index) {
  const bad = turn.action === "malformed" || turn.problem;
  const title = [`Turn ${index + 1}`, turn.action, turn.problem].filter(Boolean).join(" · ");
  const reading = make("p", "reading");
  reading.hidden = true;
  const node = make("section", bad ? "turn bad" : "turn", make("h4", "", title), saidNode(turn, reading), reading);
  if (turn.passages.length) node.append(make("ol", "passages", ...turn.passages.map(passageNode)));
  if (turn.reply !== null) {
    node.append(make("h4", "", turn.passages.length ? "What the model read of it" : "What the model read"),
      make("p", "reply", data.texts[turn.reply].trim()));
  }
  return node;
}

// Pieces of a turn's text by what they are: [start, end, class].
function pieces(text) {
  const found = [];
  for (const match of text.matchAll(/<(think|search|answer)>([^]*?)(<\/\1>|$)/g)) {
    const [whole, name, inside, close] = match;
    const start = match.index + name.length + 2;
    found.push([match.index, start, "tag"], [start, start + inside.length, name]);
    found.push([start + inside.length, match.index + whole.length, close ? "tag" : name]);
  }
  return found;
}

function saidNode(turn, reading) {
  const node = make("p", "said");
  const kinds = pieces(turn.parts.join(""));
  const colour = turn.figures[$("colour").value] ? $("colour").value : "";
  let at = 0;
  turn.parts.forEach((part, index) => {
    const token = make("span", "", ...styled(part, at, kinds));
    at += part.length;
    const values = Object.entries(turn.figures).map(([name, of]) => `${data.figures[name].label} ${told(of[index])}`);
    if (values.length && part) {
      token.classList.add("token");
      token.title = values.join("\n");
      token.addEventListener("click", () => {
        reading.hidden = false;
        reading.textContent = `“${part}”: ${values.join(", ")}`;
      });
    }
    if (colour) heat(token, colour, turn.figures[colour][index]);
    node.append(token);
  });
  if (!at) node.append(make("span", "tag", "(nothing)"));
  return node;
}

function styled(part, at, kinds) {
  const cuts = new Set([0, part.length]);
  for (const [start, end] of kinds) [start - at, end - at].forEach((cut) => cut > 0 && cut < part.length && cuts.add(cut));
  const sorted = [...cuts].sort((a, b) => a - b);
  return sorted.slice(1).map((end, index) => {
    const kind = kinds.find(([from, to]) => from <= at + sorted[index] && at + sorted[index] < to);
    const piece = part.slice(sorted[index], end);
    return kind ? make("span", kind[2], piece) : document.createTextNode(piece);
  });
}

function heat(token, name, value) {
  if (value === null) return;
  token.classList.add(name === "advantages" && value > 0 ? "cool" : "warm");
  token.style.setProperty("--heat", Math.min(1, Math.abs(value) / data.figures[name].full));
}

function passageNode([index, score, places]) {
  const characters = Array.from(data.texts[index]);
  const node = make("li", "", make("small", "", `${told(score)} `));
  let at = 0;
  for (const [start, end] of places) {
    node.append(characters.slice(at, start).join(""), make("mark", "", characters.slice(start, end).join("")));
    at = end;
  }
  node.append(characters.slice(at).join(""));
  return node;
}

function showLegend() {
  const name = $("colour").value;
  $("legend").hidden = !name;
  if (!name) return;
  const full = data.figures[name].full;
  const both = name === "advantages";
  const bar = make("i", both ? "both" : "warm");
  const [left, right] = both ? [-full, full] : [0, name === "logprobs" ? -full : full];
  $("legend").replaceChildren(`${data.figures[name].label}: ${left}`, bar, `${right}${both ? "" : " nats"}`);
}

// --- keyboard ----------------------------------------------------------------------------------------------------

function move(by) {
  const next = Math.min(shown.length - 1, Math.max(0, current + by));
  if (next >= 0 && next !== current) show(next);
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const inField = ["INPUT", "SELECT"].includes(event.target.tagName);
  const inList = $("questions").contains(event.target);
  if (inField && event.key !== "Escape") return;
  if (inField) event.target.blur();
  else if (event.key === "j" || (event.key === "ArrowDown" && inList)) move(1);
  else if (event.key === "k" || (event.key === "ArrowUp" && inList)) move(-1);
  else if (event.key === "/") $("text").focus();
  else if (event.key === "c" && $("colour").options.length) {
    $("colour").selectedIndex = ($("colour").selectedIndex + 1) % $("colour").options.length;
    recolour();
  } else return;
  event.preventDefault();
});

function recolour() {
  showLegend();
  if (shown.length) show(current);
}

$("filters").addEventListener("submit", (event) => event.preventDefault());
$("filters").addEventListener("input", (event) => (event.target.id === "colour" ? recolour() : refresh()));
fillFilters();
refresh();
