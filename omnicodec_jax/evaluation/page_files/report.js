"use strict";
// Tables, plots, codebook usage and clips of the report. Text from it is only ever set as text, never as markup.

const report = JSON.parse(document.getElementById("report").textContent);
const systems = new Map(report.systems.map((system) => [system.name, system]));
const byId = (id) => document.getElementById(id);
const titled = (name) => name.charAt(0).toUpperCase() + name.slice(1);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** An HTML element. An attribute that is a function listens to the event of that name; null is left out. */
const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

// -- Numbers

const fixed = (value, digits) => value.toFixed(digits).replace("-", "−");
const isNumber = (value) => typeof value === "number";

/** Decimals for numbers that stand under each other. */
function decimals(values) {
  const largest = Math.max(0, ...values.map(Math.abs));
  return largest >= 100 ? 1 : largest >= 1.5 ? 2 : 3;
}

const whole = (value) => (isNumber(value) ? value.toLocaleString("en", { maximumFractionDigits: 1 }) : null);

/** Collects the reasons why values are missing, and lists each once, under a number. */
class Notes {
  reasons = [];

  dash(reason) {
    if (!this.reasons.includes(reason)) this.reasons.push(reason);
    const number = this.reasons.indexOf(reason) + 1;
    const mark = html("span", { "aria-hidden": "true" }, "—", html("sup", {}, `${number}`));
    return html("span", { class: "missing", title: reason }, mark, hidden(`no value: ${reason}`));
  }

  list() {
    if (!this.reasons.length) return null;
    const items = this.reasons.map((reason) => html("li", {}, reason));
    return html("ol", { class: "notes", "aria-label": "Why values are missing" }, ...items);
  }
}

const hidden = (text) => html("span", { class: "hidden-text" }, text);

// -- What is shown

const view = byId("view").elements;
const shownSystems = () => report.systems.filter((system) => view.quoted.checked || system.kind !== "quoted");
const kindMark = (system) => (system.kind === "codec" ? null : html("span", { class: "kind" }, system.kind));

function layOut() {
  const choices = [["", "All"], ...report.domains.map((domain) => [domain, titled(domain)])];
  byId("domain-choice").append(
    ...choices.map(([value, text]) => html("label", {}, html("input", { type: "radio", name: "domain", value }), text)),
  );
  view.domain[0].checked = true;
  byId("quoted-choice").hidden = !report.systems.some((system) => system.kind === "quoted");
  byId("results").append(...report.domains.map((domain, index) =>
    html("section", { id: `domain-${index}`, "data-domain": domain }, html("h2", {}, titled(domain)), html("div"))));
  byId("study-list").append(...(report.studies ?? []).map(studySection));
  byId("studies").hidden = !report.studies?.length;
  byId("clip-list").append(...report.clips.map(clipSection));
  const first = (domain) => document.querySelector(`#clip-list [data-domain="${CSS.escape(domain)}"]`);
  report.domains.map(first).forEach((details) => details && (details.open = true));
  byId("clips").hidden = byId("listening").hidden = !report.clips.length;
  byId("about-text").append(...about());
  const links = document.querySelectorAll("#reading section[id]:not([hidden])");
  byId("contents").append(
    ...Array.from(links, (section) => html("a", { href: `#${section.id}` }, section.querySelector("h2").textContent)),
  );
  byId("view").addEventListener("change", show);
  show();
}

function show() {
  for (const section of document.querySelectorAll("[data-domain]"))
    section.hidden = view.domain.value !== "" && section.dataset.domain !== view.domain.value;
  for (const section of byId("results").children) {
    const { domain } = section.dataset;
    section.lastElementChild.replaceChildren(...table(domain), ...plots(domain), ...usage(domain));
  }
}

// -- Tables

const sorting = new Map(); // domain → {column, descending}

const numberCell = (value) => ({ text: whole(value), value });
const descriptionColumns = [
  { title: "Model", first: "ascending", cell: (system) => ({ text: system.name, value: system.name }) },
  {
    title: "Codebook size", first: "ascending",
    cell: ({ codebook_size: size, num_codebooks: count }) =>
      ({ text: isNumber(size) && isNumber(count) ? `${size} × ${count}` : size && `${size}`, value: size }),
  },
  { title: "Bitrate (bps)", first: "ascending", cell: (system) => numberCell(system.bits_per_second) },
  { title: "TPS", first: "ascending", cell: (system) => numberCell(system.tokens_per_second) },
];

/** Of fewer clips than this no interval is shown, but their number. */
const FEW = 5;

const summaryOf = (system, domain, metric) => report.summary[system.name]?.[domain]?.[metric.name];

function metricColumn(metric, domain) {
  const found = report.systems.map((system) => summaryOf(system, domain, metric)).filter((one) => isNumber(one?.mean));
  const digits = decimals(found.map((one) => one.mean));
  const cell = (system) => {
    const { mean = null, ci95 = null, count = null, why = null } = summaryOf(system, domain, metric) ?? {};
    if (!isNumber(mean)) return { value: null, why: why ?? metric.unavailable ?? "not measured" };
    const interval = isNumber(ci95) ? ` ± ${fixed(ci95, digits)}` : count > 0 && count < FEW ? ` n = ${count}` : "";
    const title = count === null ? null : `mean of ${count} clips`;
    return { text: fixed(mean, digits), interval, value: mean, title };
  };
  return { title: metric.title, metric, first: metric.better === "higher" ? "descending" : "ascending", cell };
}

/** Rows in the order of a column, those without a value last. */
function sorted(rows, column, direction) {
  const sign = direction === "ascending" ? 1 : -1;
  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
  const value = (system) => column.cell(system).value ?? null;
  return [...rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * compare(x, y);
  });
}

/** What the best of a column reads, where there is something to be better than; the originals do not compete. */
function bestText(column, rows) {
  const competing = sorted(rows.filter((system) => system.kind !== "original"), column, column.first);
  const [best, ...others] = competing.map(column.cell).filter((cell) => isNumber(cell.value));
  return column.metric && others.length ? best.text : null;
}

function table(domain) {
  const columns = [...descriptionColumns, ...report.metrics.map((metric) => metricColumn(metric, domain))];
  const order = sorting.get(domain);
  const shown = shownSystems();
  const rows = order ? sorted(shown, columns[order.column], order.direction) : shown;
  const notes = new Notes();

  const header = (column, index) => {
    const active = order?.column === index ? order.direction : null;
    const click = () => {
      const opposite = active === "ascending" ? "descending" : "ascending";
      sorting.set(domain, { column: index, direction: active ? opposite : column.first });
      show();
      document.querySelector(`[data-domain="${CSS.escape(domain)}"] th:nth-child(${index + 1}) button`).focus();
    };
    const better = column.metric ? html("span", { class: "better" }, `${column.metric.better} is better`) : null;
    const button = html("button", { type: "button", title: column.metric?.about, click }, column.title);
    if (better) button.prepend(better);
    return html("th", { scope: "col", "aria-sort": active ?? "none" }, button);
  };

  const bests = columns.map((column) => bestText(column, shown));
  const body = (system) => html("tr", {}, ...columns.map((column, index) => {
    if (index === 0) return html("th", { scope: "row", title: system.about }, system.name, kindMark(system));
    const cell = column.cell(system);
    if (!cell.text) return html("td", {}, notes.dash(cell.why ?? "not known, or without meaning for this system"));
    const best = cell.text === bests[index] && system.kind !== "original";
    return html("td", { class: best ? "best" : null, title: cell.title }, cell.text,
      cell.interval ? html("span", { class: "interval" }, cell.interval) : null, best ? hidden(" best") : null);
  }));

  const node = html("table", {},
    html("caption", {}, html("span", {}, caption(domain))),
    html("thead", {}, html("tr", {}, ...columns.map(header))),
    html("tbody", {}, ...rows.map(body)));
  return [scrolling(`Table: ${domain}`, node), notes.list()].filter((part) => part !== null);
}

const plainHead = (text) => html("th", { scope: "col", class: text === "About" ? "plain prose" : "plain" }, text);

/** A box that scrolls by itself, with the keyboard too. */
const scrolling = (label, node) =>
  html("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, node);

function caption(domain) {
  const measured = report.systems.filter((system) => system.kind !== "quoted");
  const counts = measured.flatMap((system) => report.metrics.map((metric) => summaryOf(system, domain, metric)))
    .filter((one) => isNumber(one?.mean)).map((one) => one.count).filter(isNumber);
  const [low, high] = [Math.min(...counts), Math.max(...counts)];
  const clips = !counts.length ? "" : ` over ${low === high ? low : `${low} to ${high}`} clips`;
  return `Mean${clips} ± 95 % confidence interval, where there are at least ${FEW}. The best value of a column is marked.`;
}

// -- Plots

const plot = { width: 360, height: 250, left: 60, right: 350, top: 12, bottom: 208 };

/** What stands along the horizontal axis: how values are read from a system, and how they are laid out and written. */
const bitRate = { title: "Bit rate (bit/s)", log: true, of: (system) => system.bits_per_second,
  label: (value) => `${whole(value)} bit/s`, tick: (value) => (value >= 1000 ? `${value / 1000}k` : `${value}`) };
const codebookCount = { title: "Codebooks", log: true, of: (system) => system.num_codebooks,
  label: (value) => `${value} codebook${value === 1 ? "" : "s"}`, tick: (value) => `${value}` };

function plots(domain) {
  const among = (axis, lines) => report.metrics.map((metric) => figure(metric, domain, axis, lines))
    .filter((one) => one !== null);
  const section = (title, figures) =>
    figures.length ? [html("h3", {}, title), html("div", { class: "plots" }, ...figures)] : [];
  return [...section("Quality against bit rate", among(bitRate, false)),
    ...section("Quality against the number of codebooks", among(codebookCount, true))];
}

/** The name that the systems of one codec share, which differ by the number of their codebooks. */
const family = (system) => system.name.replace(`-${system.num_codebooks}L`, "");

/** The values of a metric over an axis; with lines, those of each codec at several numbers of codebooks alone. */
function figure(metric, domain, along, lines) {
  let points = shownSystems()
    .map((system) => ({ name: system.name, kind: system.kind, family: family(system), x: along.of(system),
      ...summaryOf(system, domain, metric) }))
    .filter((point) => isNumber(point.x) && point.x > 0 && isNumber(point.mean));
  if (lines) points = points.filter((point) => points.some((other) => other.family === point.family && other.x !== point.x));
  if (!points.length) return null;
  const digits = decimals(points.map((point) => point.mean));
  const label = (point) => `${point.name}: ${fixed(point.mean, digits)} at ${along.label(point.x)}`;
  const direction = metric.better === "higher" ? "↑ higher is better" : "↓ lower is better";
  const families = lines ? [...new Set(points.map((point) => point.family))] : [];
  const groups = families.map((name) => points.filter((point) => point.family === name));
  return drawing(metric.title, domain, along, `${metric.title} (${direction})`, points, groups, label, metric.range);
}

function drawing(title, domain, along, yTitle, points, groups, label, range) {
  const axes = scales(points, along.log, range ?? [null, null]);
  const named = groups.length ? groups.map((group) => group.at(-1)) : points;
  const picture = svg("svg",
    { viewBox: `0 0 ${plot.width} ${plot.height}`, role: "img",
      "aria-label": `${title} against ${along.title.toLowerCase()}, ${domain}. ${points.map(label).join("; ")}` },
    ...axis(axes, along, yTitle), ...groups.map((group) => line(group, axes)),
    ...marks(points, named, groups.length > 0, axes, label));
  return html("figure", {}, html("figcaption", {}, title), picture);
}

function line(group, { x, y }) {
  const path = [...group].sort((a, b) => a.x - b.x).map((point) => `${x(point.x)},${y(point.mean)}`).join(" ");
  return svg("polyline", { class: `line ${group[0].kind}`, points: path });
}

const niceStep = (span) => {
  const power = 10 ** Math.floor(Math.log10(span / 5));
  return [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= span / 5);
};

function multiples(low, high, step) {
  const values = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) values.push(k * step);
  return values;
}

/** Positions on paper of what is along the axis and of values, and where ticks stand. `range` is what values can be. */
function scales(points, log, range) {
  const along = points.map((point) => point.x);
  const [least, most] = [Math.min(...along), Math.max(...along)];
  const [low, high] = log ? [least / 1.4, most * 1.4] : [least - 0.04 * (most - least || 1), most + 0.04 * (most - least || 1)];
  const within = (value) => Math.min(range[1] ?? Infinity, Math.max(range[0] ?? -Infinity, value));
  const ends = points.flatMap((point) => [within(point.mean - (point.ci95 ?? 0)), within(point.mean + (point.ci95 ?? 0))]);
  const span = Math.max(...ends) - Math.min(...ends) || Math.abs(ends[0]) || 1;
  const [bottom, top] = [within(Math.min(...ends) - 0.08 * span), within(Math.max(...ends) + 0.08 * span)];
  const step = niceStep(top - bottom || 1);
  const position = log ? (value) => Math.log(value / low) / Math.log(high / low) : (value) => (value - low) / (high - low);
  const mantissas = high / low > 12 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 6, 8];
  const decades = [1, 10, 100, 1e3, 1e4, 1e5, 1e6, 1e7];
  const ticks = log ? decades.flatMap((ten) => mantissas.map((one) => one * ten)).filter((value) => value >= low && value <= high)
    : multiples(least, most, Math.max(1, niceStep(most - least || 1)));
  return {
    x: (value) => plot.left + (plot.right - plot.left) * position(value),
    y: (value) => plot.bottom - ((plot.bottom - plot.top) * (within(value) - bottom)) / (top - bottom || 1),
    ticks, values: multiples(bottom, top, step), digits: Math.max(0, -Math.floor(Math.log10(step))),
  };
}

function axis({ x, y, ticks, values, digits }, along, title) {
  const middle = (plot.top + plot.bottom) / 2;
  return [
    ...values.flatMap((value) => [
      svg("line", { class: "grid", x1: plot.left, x2: plot.right, y1: y(value), y2: y(value) }),
      svg("text", { class: "tick", x: plot.left - 6, y: y(value) + 3.5, "text-anchor": "end" }, fixed(value, digits)),
    ]),
    ...ticks.flatMap((value) => [
      svg("line", { class: "axis", x1: x(value), x2: x(value), y1: plot.bottom, y2: plot.bottom + 4 }),
      svg("text", { class: "tick", x: x(value), y: plot.bottom + 16, "text-anchor": "middle" }, along.tick(value)),
    ]),
    svg("line", { class: "axis", x1: plot.left, x2: plot.right, y1: plot.bottom, y2: plot.bottom }),
    svg("text", { x: (plot.left + plot.right) / 2, y: plot.height - 8, "text-anchor": "middle" }, along.title),
    svg("text", { x: 12, y: middle, "text-anchor": "middle", transform: `rotate(-90 12 ${middle})` }, title),
  ];
}

/** All points, and over them the names of some; with lines, each name stands for a whole line. */
function marks(points, named, lines, { x, y }, label) {
  const taken = points.map((point) => box(x(point.x) - 5, y(point.mean), 10));
  const names = named.map((point) => {
    const [px, py] = [x(point.x), y(point.mean)];
    const place = freePlace(px, py, lines ? point.family : point.name, taken);
    taken.push(place.box);
    const moved = Math.abs(place.y - py) > 8;
    return svg("g", { class: point.kind },
      moved ? svg("line", { class: "leader", x1: px, y1: py, x2: place.x, y2: place.y }) : null,
      svg("text", { x: place.x, y: place.y + 3.5, "text-anchor": place.anchor }, place.text));
  });
  const shapes = points.map((point) => {
    const [px, ci] = [x(point.x), point.ci95 ?? 0];
    return svg("g", { class: point.kind }, svg("title", {}, label(point)),
      ci ? svg("line", { class: "whisker", x1: px, x2: px, y1: y(point.mean - ci), y2: y(point.mean + ci) }) : null,
      svg("circle", { class: "point", cx: px, cy: y(point.mean), r: 3.8 }));
  });
  return [...shapes, ...names];
}

const box = (left, middle, width) => ({ left, right: left + width, top: middle - 5.5, bottom: middle + 5.5 });
const overlap = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;

/** Where a label covers nothing: beside its point, or else a few lines above or below. */
function freePlace(px, py, name, taken) {
  const text = name.length > 24 ? `${name.slice(0, 23)}…` : name;
  const width = 6.8 * text.length; // about; the font is the reader's
  const places = [0, -12, 12, -24, 24, -36, 36, -48, 48, -60, 60].flatMap((shift) =>
    [["start", px + 8, px + 8], ["end", px - 8, px - 8 - width]].map(([anchor, x, left]) =>
      ({ anchor, x, y: py + shift, text, box: box(left, py + shift, width) })));
  const inside = ({ box: { left, right, top, bottom } }) =>
    left >= plot.left && right <= plot.width && top >= 0 && bottom <= plot.bottom;
  const possible = places.filter(inside);
  return possible.find((place) => !taken.some((other) => overlap(place.box, other))) ?? possible[0] ?? places[0];
}

// -- Codebook usage

const usageCaption = "Of each codebook, by number: share of its entries that these clips use, in percent; below it "
  + "the perplexity of its codes.";

function usage(domain) {
  const used = shownSystems().filter((system) => system.usage?.[domain]?.length);
  if (!used.length) return [];
  const width = Math.max(...used.map((system) => system.usage[domain].length));
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const cell = (name, share, perplexity) => {
    const extra = isNumber(perplexity) ? `, perplexity ${whole(perplexity)}` : "";
    const about = `${name}: ${fixed(100 * share, 1)} % of the entries used${extra}`;
    const below = isNumber(perplexity) ? html("small", {}, `${Math.round(perplexity)}`) : null;
    return html("td", { style: `--share: ${share}`, title: about }, `${Math.round(100 * share)}`, below);
  };
  const row = (system) => {
    const [shares, perplexity] = [system.usage[domain], system.perplexity?.[domain] ?? []];
    return html("tr", {}, html("th", { scope: "row" }, system.name),
      cell("all codebooks", mean(shares), perplexity.length ? mean(perplexity) : null),
      ...shares.map((share, k) => cell(`codebook ${k}`, share, perplexity[k])));
  };
  const heads = ["Model", "Mean", ...Array.from({ length: width }, (_, k) => `${k}`)];
  const node = html("table", { class: "usage" },
    html("caption", {}, html("span", {}, usageCaption)),
    html("thead", {}, html("tr", {}, ...heads.map(plainHead))),
    html("tbody", {}, ...used.map(row)));
  return [html("h3", {}, "Codebook usage"), scrolling(`Codebook usage: ${domain}`, node)];
}

// -- Studies

const studyTitle = (study) => (study.domain ? `${study.title}: ${study.domain}` : study.title);

function studySection(study) {
  const notes = new Notes();
  const shown = (value) => fixed(value, study.digits);
  const row = ({ name, cells, why }) => html("tr", {}, html("th", { scope: "row" }, name),
    ...cells.map((cell) => html("td", {}, isNumber(cell) ? shown(cell) : notes.dash(why ?? "without meaning for this system"))));
  const node = html("table", {},
    html("caption", {}, html("span", {}, study.about)),
    html("thead", {}, html("tr", {}, ...["Model", ...study.columns].map(plainHead))),
    html("tbody", {}, ...study.rows.map(row)));
  return html("section", { "data-domain": study.domain, class: "study" }, html("h3", {}, studyTitle(study)),
    scrolling(studyTitle(study), node), notes.list(),
    ...(study.notes ?? []).map((note) => html("p", { class: "quiet" }, note)),
    study.curves ? curves(study) : null);
}

function curves({ title, domain, curves: { x, y, series }, digits }) {
  const groups = Object.entries(series)
    .map(([name, points]) => points.map(([at, mean]) => ({ name, family: name, kind: "codec", x: at, mean })));
  const along = { title: x, log: false, label: (value) => `${x.toLowerCase()} ${whole(value)}`, tick: (value) => whole(value) };
  const label = (point) => `${point.name}: ${fixed(point.mean, digits)} at ${along.label(point.x)}`;
  return html("div", { class: "plots" }, drawing(title, domain ?? "", along, y, groups.flat(), groups, label, null));
}

// -- Clips

function clipSection(clip) {
  const notes = new Notes();
  const takes = [take("Original", clip.original, null, clip, notes)];
  for (const [name, made] of Object.entries(clip.systems)) takes.push(take(name, made, systems.get(name), clip, notes));
  const about = html("span", { class: "quiet" }, `${clip.domain}, ${fixed(clip.seconds, 1)} s`);
  return html("details", { "data-domain": clip.domain }, html("summary", {}, clip.id, about), ...takes, notes.list());
}

function take(name, { audio, spectrogram, scores = {} }, system, clip, notes) {
  const scored = report.metrics.filter((metric) => scores[metric.name]);
  const score = (metric) => {
    const { value, why } = scores[metric.name];
    const all = Object.values(clip.systems).map((made) => made.scores[metric.name]?.value).filter(isNumber);
    const text = isNumber(value) ? fixed(value, decimals(all)) : notes.dash(why ?? "not measured");
    return html("div", {}, html("dt", {}, metric.title), html("dd", {}, text));
  };
  return html("div", { class: "take" },
    html("div", {}, html("h4", {}, name, system ? kindMark(system) : null),
      html("audio", { controls: "", preload: "none", src: audio, "aria-label": `${name}, ${clip.id}` })),
    html("img", { src: spectrogram, loading: "lazy", alt: `Spectrogram: ${name}, ${clip.id}` }),
    scored.length ? html("dl", {}, ...scored.map(score)) : null);
}

/** One sound at a time. */
function pauseOthers(event) {
  for (const audio of document.querySelectorAll("audio")) if (audio !== event.target) audio.pause();
}

// -- What was measured

function about() {
  const speed = report.systems.filter((system) => isNumber(system.real_time_factor));
  const metrics = report.metrics.flatMap((metric) => [
    html("dt", {}, metric.title),
    html("dd", {}, metric.about, metric.unavailable ? ` Not available: ${metric.unavailable}` : ""),
  ]);
  const notes = new Notes();
  const row = (system) => html("tr", {}, html("th", { scope: "row" }, system.name), html("td", {}, system.kind),
    speed.length ? html("td", {}, whole(system.real_time_factor) ?? notes.dash("not measured")) : null,
    html("td", { class: "prose" }, system.about ?? ""));
  const heads = ["Model", "Kind", ...(speed.length ? ["× real time"] : []), "About"];
  const list = html("table", {},
    html("thead", {}, html("tr", {}, ...heads.map(plainHead))),
    html("tbody", {}, ...report.systems.map(row)));
  const leftOut = Object.entries(report.left_out ?? {})
    .map(([name, why]) => html("p", {}, `${name} is left out: ${why}`));
  return [html("dl", {}, ...metrics), scrolling("Systems", list), notes.list() ?? "", ...leftOut];
}

document.addEventListener("play", pauseOthers, true);
layOut();
