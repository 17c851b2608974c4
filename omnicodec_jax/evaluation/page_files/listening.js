"use strict";
// The listening test: blind, in an order that depends on the rater's name alone; files play under meaningless names.

const CLIPS_OF_A_PART = 30;
const COLUMNS = ["rater", "clip", "domain", "system", "scale", "score", "seconds", "presented_at"];
const SCALES = {
  "N-MOS": {
    question: "How natural does the sample sound?",
    grades: ["Bad", "Poor", "Fair", "Good", "Excellent"],
  },
  "S-MOS": {
    question: "How similar is the sample to the original: the same speaker, the same source of sound?",
    grades: ["Not at all similar", "Slightly similar", "Somewhat similar", "Very similar", "The same"],
  },
};

// -- Random order

/** Numbers in [0, 1) that depend on the text alone: 32-bit FNV-1a as seed of mulberry32. */
function randomFrom(text) {
  let state = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(text)) state = Math.imul(state ^ byte, 0x01000193);
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Fisher and Yates. */
function shuffled(items, random) {
  const result = [...items];
  for (let last = result.length - 1; last > 0; last--) {
    const other = Math.floor(random() * (last + 1));
    [result[last], result[other]] = [result[other], result[last]];
  }
  return result;
}

/** What a rater hears in one part, in order. */
function plan(rater, { scale, domain }) {
  const random = randomFrom(JSON.stringify([rater, scale, domain]));
  const clips = shuffled(report.clips.filter((clip) => clip.domain === domain), random).slice(0, CLIPS_OF_A_PART);
  const trials = clips.flatMap((clip) => Object.entries({ reference: clip.original, ...clip.systems }).map(
    ([system, { stimulus }]) =>
      ({ key: JSON.stringify([clip.id, domain, system, scale]), stimulus, reference: clip.original.stimulus })));
  return shuffled(trials, random);
}

// -- Ratings: kept in this browser where it allows that, by the key of the trial

const STORE = `omnicodec listening test ${JSON.stringify([report.title, report.created])}`;
const memory = new Map();
let storageFails = false;

function load(name) {
  try {
    return JSON.parse(localStorage.getItem(`${STORE} ${name}`)) ?? memory.get(name);
  } catch {
    return memory.get(name);
  }
}

function save(name, value) {
  memory.set(name, value);
  try {
    localStorage.setItem(`${STORE} ${name}`, JSON.stringify(value));
  } catch {
    storageFails = true;
  }
}

const ratingsOf = (rater) => load(`of ${rater}`) ?? {};

function csv(rater) {
  const quoted = (value) => (/[",\r\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  const rows = Object.entries(ratingsOf(rater)).map(([key, { score, seconds, presented_at }]) =>
    [rater, ...JSON.parse(key), score, seconds, presented_at]);
  return [COLUMNS, ...rows].map((row) => `${row.map((value) => quoted(`${value}`)).join(",")}\r\n`).join("");
}

function download(rater) {
  const url = URL.createObjectURL(new Blob([csv(rater)], { type: "text/csv" }));
  html("a", { href: url, download: `ratings-${rater.replace(/[^\p{L}\p{N}]+/gu, "-")}.csv` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

// -- Enrolment

const enrol = byId("enrol").elements;
const parts = Object.keys(SCALES).flatMap((scale) => report.domains
  .filter((domain) => report.clips.some((clip) => clip.domain === domain))
  .map((domain) => ({ scale, domain })));
const raterName = () => enrol.rater.value.trim();

/** The parts, and how much of each this rater has done. */
function showParts() {
  const chosen = Math.max(0, enrol.part.selectedIndex);
  const ratings = ratingsOf(raterName());
  enrol.part.replaceChildren(...parts.map((part, index) => {
    const trials = plan(raterName(), part);
    const done = trials.filter((trial) => ratings[trial.key]).length;
    return html("option", { value: index }, `${part.scale}, ${part.domain}: ${done} of ${trials.length} rated`);
  }));
  enrol.part.selectedIndex = chosen;
}

function downloadFrom(note) {
  const count = Object.keys(ratingsOf(raterName())).length;
  note.textContent = count ? `${count} ratings of ${raterName()}.` : "There are no ratings under this name yet.";
  if (count) download(raterName());
}

// -- One part

// rater, part, trials, position, ratings; of the present trial: since, presented_at, unheard, broken
let run = null;
const sample = new Audio();
const reference = new Audio();
const players = [[sample, byId("play-sample"), "sample"], [reference, byId("play-reference"), "original"]];

function start(event) {
  event.preventDefault();
  const rater = raterName();
  if (!rater) return;
  save("rater", rater);
  const part = parts[enrol.part.value];
  const [trials, ratings] = [plan(rater, part), ratingsOf(rater)];
  const position = trials.findIndex((trial) => !ratings[trial.key]);
  run = { rater, part, trials, ratings, position: position < 0 ? trials.length : position };
  pauseOthers(event);
  byId("reading").hidden = true;
  byId("trial").hidden = false;
  window.scrollTo(0, 0);
  byId("trial-title").textContent = `${part.scale}, ${part.domain}`;
  byId("trial-question").textContent = SCALES[part.scale].question;
  byId("play-reference").hidden = part.scale !== "S-MOS";
  const grades = SCALES[part.scale].grades.map((text, index) => grade(text, index + 1));
  byId("scores").replaceChildren(html("legend", {}, "Your score"), ...grades.reverse());
  present();
}

const grade = (text, score) =>
  html("label", {}, html("input", { type: "radio", name: "score", value: score }), html("kbd", {}, `${score}`), text);

function present() {
  const { trials, position, ratings, part } = run;
  const over = position >= trials.length;
  for (const [audio] of players) audio.pause();
  byId("trial-sheet").hidden = over;
  byId("trial-end").textContent = over ? "This part is done. Thank you. Download your ratings and send them in." : "";
  if (over) {
    byId("download-trial").focus();
    return;
  }
  const trial = trials[position];
  const rated = ratings[trial.key];
  const heard = part.scale === "S-MOS" ? [sample, reference] : [sample];
  Object.assign(run, { since: performance.now(), presented_at: new Date().toISOString(), broken: false });
  run.unheard = new Set(rated ? [] : heard);
  sample.src = trial.stimulus;
  if (part.scale === "S-MOS") reference.src = trial.reference;
  byId("trial-count").textContent = `${position + 1} of ${trials.length}`;
  Object.assign(byId("trial-progress"), { max: trials.length, value: position });
  byId("back").disabled = position === 0;
  for (const input of scores()) input.checked = input.value === `${rated?.score}`;
  say(storageFails ? "This browser keeps nothing: download your ratings before you close the page." : "");
  byId("play-sample").focus();
}

const scores = () => byId("scores").querySelectorAll("input");
const say = (text) => { byId("trial-note").textContent = text; };

function toggle(audio) {
  if (!audio.paused) return audio.pause();
  for (const [other] of players) if (other !== audio) other.pause();
  return audio.play().catch(() => {}); // "error" below says it
}

function next() {
  const score = Array.from(scores()).find((input) => input.checked)?.value;
  if (run.broken) {
    run.position += 1;
    return present();
  }
  if (run.unheard.size) return say("Listen to the end first.");
  if (!score) return say("Choose a score from 1 to 5.");
  const seconds = ((performance.now() - run.since) / 1000).toFixed(2);
  run.ratings[run.trials[run.position].key] = { score, seconds, presented_at: run.presented_at };
  save(`of ${run.rater}`, run.ratings);
  run.position += 1;
  return present();
}

function back() {
  if (run.position === 0) return;
  run.position -= 1;
  present();
}

function leave() {
  for (const [audio] of players) audio.pause();
  run = null;
  byId("trial").hidden = true;
  byId("reading").hidden = false;
  showParts();
  byId("start").focus();
}

function press(event) {
  if (!run || event.ctrlKey || event.altKey || event.metaKey) return;
  const button = event.target.closest?.("button");
  const pressesButton = event.key === " " || (event.key === "Enter" && !button?.id.startsWith("play"));
  if (button && pressesButton) return;
  const actions = {
    " ": () => toggle(sample),
    r: () => run.part.scale === "S-MOS" && toggle(reference),
    Enter: next,
    Backspace: back,
  };
  const action = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  const choice = Array.from(scores()).find((input) => input.value === event.key);
  if (byId("trial-sheet").hidden || !(action || choice)) return;
  event.preventDefault();
  if (action) action();
  else choice.checked = true;
}

for (const [audio, button, name] of players) {
  const showState = () => {
    button.classList.toggle("playing", !audio.paused);
    button.firstElementChild.textContent = `${audio.paused ? "Play" : "Pause"} the ${name}`;
  };
  for (const event of ["play", "pause", "ended"]) audio.addEventListener(event, showState);
  audio.addEventListener("ended", () => run?.unheard.delete(audio));
  audio.addEventListener("error", () => {
    if (!run) return;
    run.broken = true;
    say("This file cannot be played. Go on to the next; it stays without a score.");
  });
  button.addEventListener("click", () => toggle(audio));
}
byId("enrol").addEventListener("submit", start);
enrol.rater.addEventListener("input", showParts);
byId("download").addEventListener("click", () => downloadFrom(byId("enrol-note")));
byId("download-trial").addEventListener("click", () => download(run.rater));
byId("next").addEventListener("click", next);
byId("back").addEventListener("click", back);
byId("leave").addEventListener("click", leave);
document.addEventListener("keydown", press);
enrol.rater.value = load("rater") ?? "";
showParts();
