// Tables that are updated in place, so that the keyboard's focus stays. Values are set as text, never as markup.

const rowsOf = new WeakMap(); // table body → its rows by key

/** Show one row for each item. `cells(item)` are texts, numbers, or objects with `mark` and `nodes()`: see below.
 * A cell is replaced only if its text or mark has changed.
 */
export function fill(table, items, key, cells, classes = []) {
  const body = table.tBodies[0];
  const before = rowsOf.get(body) ?? new Map();
  const after = new Map();
  items.forEach((item, place) => {
    const row = before.get(key(item)) ?? document.createElement("tr");
    after.set(key(item), row);
    cells(item).forEach((value, at) => show(row, at, value, classes[at] ?? "text"));
    if (body.rows[place] !== row) body.insertBefore(row, body.rows[place] ?? null);
  });
  while (body.rows.length > items.length) body.lastElementChild.remove();
  rowsOf.set(body, after);
}

function show(row, at, value, kind) {
  const cell = row.cells[at] ?? row.appendChild(document.createElement(at === 0 ? "th" : "td"));
  if (at === 0) cell.scope = "row";
  const made = typeof value === "object" && value !== null;
  const mark = made ? value.mark : String(value ?? "");
  if (cell.shown === mark) return;
  cell.shown = mark;
  cell.className = kind;
  if (made) cell.replaceChildren(...value.nodes());
  else cell.replaceChildren(isolated(mark));
}

/** A text whose writing direction does not affect its surroundings. */
export function isolated(text) {
  const element = document.createElement("bdi");
  element.textContent = text;
  return element;
}

/** A cell with a link to a topic. */
export function topicLink(topic) {
  return {
    mark: `topic ${topic}`,
    nodes: () => {
      const link = document.createElement("a");
      link.href = `#topic=${encodeURIComponent(topic)}`;
      link.append(isolated(topic));
      return [link];
    },
  };
}

/** A cell with buttons: [label, the thing it is about, the function it calls]. */
export function buttons(mark, ...each) {
  return {
    mark,
    nodes: () => each.map(([label, about, act]) => button(label, about, act)),
  };
}

export function button(label, about, act) {
  const element = document.createElement("button");
  element.type = "button";
  element.textContent = label;
  element.setAttribute("aria-label", `${label} ${about}`);
  element.addEventListener("click", () => act(element));
  return element;
}

/** A duration, in the largest unit of which there are at least two. */
export function age(ms) {
  const seconds = Math.max(ms, 0) / 1000;
  for (const [unit, length] of [["d", 86400], ["h", 3600], ["min", 60]]) {
    if (seconds >= 2 * length) return `${Math.floor(seconds / length)} ${unit}`;
  }
  return seconds >= 10 ? `${Math.round(seconds)} s` : `${seconds.toFixed(1)} s`;
}

export function time(ms) {
  return ms ? new Date(ms).toISOString().replace("T", " ").replace(/\.\d+Z/, "Z") : "";
}

export function count(number, thing) {
  return `${number || "no"} ${thing}${number === 1 ? "" : "s"}`;
}

/** The length of a list: `3 topics`, or `3 of 9 topics` if it is cut. */
export function shownOf(shown, total, thing) {
  return shown < total ? `${shown} of ${count(total, thing)}` : count(total, thing);
}
