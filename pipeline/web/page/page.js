// Polls the API for the panels of the view in the address bar, while the tab is visible.
//
// A panel is a section with a URL and a function that shows the answer. An answer that comes after the panel's URL has
// changed is dropped. After an error the last answer stays, marked as stale, below the error.

import { age, buttons, count, fill, shownOf, time, topicLink } from "./tables.js";

const POLL_MS = 2000; // pause between two requests of a panel
const ANSWER_MS = 60000; // longer than the server's own limits for Redis and Kafka
const VIEWS = ["overview", "topic", "clients", "dead-letters", "console"];
const NUMBER = "number";

let token = null; // the operator's: only in memory, so it ends with the page
let part = ""; // the part that the listed client ids contain
let sleepers = []; // functions that end a pause early

const element = (id) => document.getElementById(id);
const chosen = () => {
  const [name, ...rest] = location.hash.slice(1).split("=");
  return [VIEWS.includes(name) ? name : "overview", decoded(rest.join("="))];
};

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // typed by hand, and not percent-encoded
  }
}

// -- panels: the URL of each, and how its answer is shown

const panels = [
  { section: element("agents"), url: () => "/api/agents", show: showAgents },
  { section: element("topics"), url: () => "/api/topics", show: showTopics },
  { section: element("topic"), url: () => `/api/topic?name=${encodeURIComponent(chosen()[1])}`, show: showTopic },
  { section: element("clients"), url: () => `/api/clients?contains=${encodeURIComponent(part)}`, show: showClients },
  { section: element("dead-letters"), url: () => "/api/dead-letters", show: showDeadLetters },
  { section: element("unreadable"), url: () => "/api/unreadable", show: showUnreadable },
];

function showAgents(section, found) {
  const classes = ["text", NUMBER, NUMBER, NUMBER, NUMBER, NUMBER];
  fill(section.querySelector("table"), found.agents, (each) => each.agent, (each) => [
    each.agent, each.partitions.length, each.behind,
    each.oldest_at === null ? "" : age(found.at - each.oldest_at),
    each.rate === null ? "…" : each.rate.toFixed(each.rate < 10 ? 1 : 0), each.uncommitted,
  ], classes);
}

function showTopics(section, found) {
  const classes = ["text", "text", NUMBER, NUMBER, NUMBER, NUMBER, NUMBER, NUMBER];
  fill(section.querySelector("table"), found.rows, (row) => `${row.agent} ${row.topic}`, (row) => [
    topicLink(row.topic), row.agent, row.messages, row.ready, row.leased,
    row.agent === "messages" ? "" : row.subscribers,
    row.oldest === null ? "" : age(found.at - row.oldest), row.dead || "",
  ], classes);
  const total = `${shownOf(found.rows.length, found.topics, "topic")}, ${count(found.messages, "message")}`;
  note(section, [total, ...found.notes]);
}

function showTopic(section, found) {
  const rule = found.rule && Object.entries(found.rule).map(([name, value]) => `${name} = ${value}`).join("\n");
  const facts = [
    ["agent", `${found.agent}, partition ${found.partition}`],
    ["applied offset", found.applied ?? "none"],
    ["messages", found.messages], ["ready", found.ready ?? ""], ["leased", found.leased ?? ""],
    ["subscribers", found.agent === "pubsub" ? found.subscribers_total : found.members_total],
    ["oldest", time(found.oldest)], ["newest", time(found.newest)],
    ["retained message", found.retained ?? "none"], ["dead letters", found.dead],
    ["expires after", found.expired_time === null ? "never" : `${found.expired_time} s`],
    ["rule", rule ?? "none"],
  ].filter(([, value]) => value !== "");
  element("topic-facts").hidden = false;
  fill(element("topic-facts"), facts, ([name]) => name, (each) => each);
  fill(element("topic-subscribers"), found.subscribers, (each) => each.subscriber, (each) => [
    each.subscriber, each.online, each.read_offset ?? (each.begun ? "before the first" : "not begun"),
    each.ready, each.leased, each.done_ahead, each.lost,
  ], ["text", NUMBER, "text", NUMBER, NUMBER, NUMBER, NUMBER]);
  fill(element("topic-members"), found.members, (each) => `${each.group ?? ""} ${each.client_id}`, (each) => [
    each.client_id, each.group, each.qos, each.in_hand, each.max_inflight,
  ], ["text", "text", NUMBER, NUMBER, NUMBER]);
  fill(element("topic-leases"), found.leases, (each) => `${each.number} ${each.subscriber}`, (each) => [
    each.message_id, each.client_id, each.subscriber ?? each.group, time(each.since), time(each.until),
    each.attempt, each.sent ? "yes" : "no",
  ], ["text", "text", "text", "text", "text", NUMBER, "text"]);
  for (const name of ["subscribers", "members", "leases"]) element(`topic-${name}`).hidden = !found[name].length;
  const cut = ["subscribers", "members", "leases"].filter((name) => found[name].length < found[`${name}_total`]);
  note(section, [...cut.map((name) => `${found[name].length} of ${found[`${name}_total`]} ${name}`), ...found.notes]);
}

function showClients(section, found) {
  fill(section.querySelector("table"), found.clients, (each) => each.client_id, (each) => [
    each.client_id, each.online ? "yes" : "no", time(each.online ? each.online_at : each.offline_at), each.node,
    [...each.subscriptions.map((one) => `${one.topic_filter} (QoS ${one.qos}, ${one.origin})`),
      ...(each.subscriptions.length < each.subscriptions_total ? [`… ${each.subscriptions_total} in all`] : [])].join("\n"),
  ]);
  note(section, [`${shownOf(found.clients.length, found.total, "client")}, ${found.online} online`]);
}

function showDeadLetters(section, found) {
  fill(section.querySelector("table"), found.dead_letters, (each) => `${each.agent} ${each.message_id}`, (each) => [
    each.message_id, topicLink(each.topic), time(each.at), each.deliveries, each.reason,
    each.subscribers.join("\n"), actions(each),
  ], ["text", "text", "text", NUMBER]);
  note(section, [shownOf(found.dead_letters.length, found.total, "dead letter")]);
}

function showUnreadable(section, found) {
  fill(section.querySelector("table"), found.records, (each) => `${each.partition} ${each.offset}`, (each) => [
    time(each.at), each.source, each.reader, each.size, each.begin, each.reason,
  ], ["text", "text", "text", NUMBER]);
  note(section, [count(found.records.length, "record") + (found.whole ? "" : ", and there may be more")]);
}

function actions(deadLetter) {
  if (token === null) return "";
  if (!deadLetter.carried_out) return "its topic has no delivery rule";
  const about = deadLetter.message_id;
  return buttons(
    "actions",
    ["Requeue", about, (pressed) => order("requeue", about, pressed)],
    ["Drop", about, (pressed) => confirm(`Drop ${about}, with its message?`) && order("drop", about, pressed)],
  );
}

function note(section, lines) {
  const text = lines.join("\n");
  const place = section.querySelector(".note");
  if (place.textContent !== text) place.textContent = text;
}

// -- requests

async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(ANSWER_MS), ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("Millpond’s web server does not answer; the page keeps trying");
  }
  if (answer.status === 204) return null;
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw Object.assign(new Error(body.error ?? `HTTP ${answer.status}`), { status: answer.status });
  return body;
}

async function follow(panel) {
  for (;;) {
    if (panel.section.dataset.view === chosen()[0] && !document.hidden) await update(panel);
    await pause();
  }
}

async function update(panel) {
  const url = panel.url();
  let found;
  try {
    found = await ask(url);
  } catch (error) {
    if (url !== panel.url()) return;
    if (error.status === 404) clear(panel.section); // the topic is gone: its last facts are wrong now
    setError(panel.section, error.message);
    return;
  }
  if (url !== panel.url()) return; // the user has chosen something else meanwhile
  panel.show(panel.section, found);
  setError(panel.section, null);
  element("updated").textContent = `Live. Last answer at ${time(found.at)}.`;
}

function clear(section) {
  for (const table of section.querySelectorAll("table")) {
    fill(table, [], String, () => []);
    table.hidden = table.caption !== null;
  }
  note(section, []);
}

/** Show an error, or none for null. The last answer stays readable. */
function setError(section, text) {
  // Setting the same text again would make screen readers repeat it.
  const place = section.querySelector(".error");
  if (place.textContent !== (text ?? "")) place.textContent = text ?? "";
  place.hidden = text === null;
  section.classList.toggle("stale", text !== null);
  if (text !== null) element("updated").textContent = "A request failed. The page tries again every two seconds.";
}

function pause() {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, POLL_MS);
    sleepers.push(() => {
      clearTimeout(timer);
      resolve();
    });
    if (sleepers.length > 10 * panels.length) sleepers = sleepers.slice(-panels.length);
  });
}

function wake() {
  const all = sleepers;
  sleepers = [];
  all.forEach((each) => each());
}

// -- the view

function showView() {
  const [view, name] = chosen();
  for (const section of document.querySelectorAll("main > section")) {
    section.hidden = section.dataset.view !== view;
  }
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const heading = element("topic-title").querySelector("bdi");
  if (view === "topic" && heading.textContent !== name) {
    heading.textContent = name;
    clear(element("topic"));
    setError(element("topic"), null);
  }
  document.title = `${view === "topic" ? name : view} – Millpond`;
  wake();
}

// -- orders of an operator

function setStatus(text) {
  element("operator-state").textContent = text;
}

function asOperator(path, with_, body) {
  return ask(path, { method: "POST", headers: { Authorization: `Bearer ${with_}` }, body });
}

async function order(what, id, pressed) {
  pressed.disabled = true;
  try {
    await asOperator(`/api/dead-letters/${what}`, token, JSON.stringify({ message_ids: [id] }));
    setStatus(`${id} will be ${what === "drop" ? "dropped" : "requeued"} when its agent reads the order`);
  } catch (error) {
    setStatus(`${what} of ${id}: ${error.message}`);
    pressed.disabled = false;
  }
  wake();
}

element("operator-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const field = element("operator-token");
  const tried = field.value;
  field.value = "";
  try {
    await asOperator("/api/operator", tried);
    token = tried;
    element("operator-form").hidden = true;
    setStatus("unlocked until this page is closed or reloaded");
    wake();
  } catch (error) {
    setStatus(error.message);
  }
});

element("topic-form").addEventListener("submit", (event) => {
  event.preventDefault();
  location.hash = `#topic=${encodeURIComponent(element("topic-name").value)}`;
});

element("client-form").addEventListener("submit", (event) => {
  event.preventDefault();
  part = element("client-part").value;
  wake();
});

/** Load what does not change while the server runs. */
async function begin() {
  for (;;) {
    try {
      const about = await ask("/api/web");
      element("app").textContent = about.app;
      element("operator-form").hidden = !about.operator || token !== null;
      if (!about.operator) setStatus("read-only: set [web] token_file to allow requeue and drop");
      dispatchEvent(new CustomEvent("broker", { detail: about.mqtt_url }));
      return;
    } catch {
      await pause();
    }
  }
}

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // #main in the address bar would change the view
  element("main").focus();
});
addEventListener("hashchange", () => {
  showView();
  element("main").focus({ preventScroll: true });
  scrollTo(0, 0);
});
document.addEventListener("visibilitychange", wake);
showView();
addEventListener("load", begin);
panels.forEach(follow);
