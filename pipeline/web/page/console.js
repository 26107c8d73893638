// The console: an MQTT client (MQTT.js) that connects, subscribes, publishes, and shows the messages it gets.

import { button, fill, isolated, time } from "./tables.js";

const SHOWN_MAX = 200; // messages
const PAYLOAD_MAX = 10000; // characters shown of each
const RECONNECT_MS = 2000;
// MQTT.js sends an unacknowledged publish again on each connection. A broker that refuses it closes each of them. One close
// may be chance.
const PUBLISH_CLOSES_MAX = 2;

const element = (id) => document.getElementById(id);
let url = null;
let client = null;
// The publishes that the broker has not acknowledged: each has a topic, and how many connections closed behind it.
let unacknowledged = new Set();
let messages = [];
let number = 0;

function say(text) {
  element("console-state").textContent = text;
}

function setConnected(connected) {
  for (const id of ["subscribe-form", "publish-form"]) element(id).querySelector("fieldset").disabled = !connected;
}

function setOpen(open) {
  for (const id of ["console-client", "console-user", "console-password", "console-clean", "console-connect"]) {
    element(id).disabled = open;
  }
  element("console-disconnect").disabled = !open;
}

addEventListener("broker", (event) => {
  url = event.detail;
  element("console-url").textContent = url ?? "none: set [web] mqtt_url";
  element("console-connect").disabled = url === null;
});

element("console-client").value = `console-${Math.random().toString(16).slice(2, 10)}`;

element("connect-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (url === null || client !== null) return;
  const name = element("console-client").value;
  const mine = globalThis.mqtt.connect(url, {
    clientId: name,
    username: element("console-user").value || undefined,
    password: element("console-password").value || undefined,
    clean: element("console-clean").checked,
    protocolVersion: 4,
    reconnectPeriod: RECONNECT_MS,
    timerVariant: "native", // the default is a worker made from text, which our Content-Security-Policy forbids
  });
  client = mine;
  let accepted = false; // this connection, by the broker
  unacknowledged = new Set();
  setOpen(true);
  say("connecting");
  mine.on("connect", (answer) => {
    setConnected(true);
    say(`connected as ${name}${answer.sessionPresent ? "; the broker has kept its session" : ""}`);
  });
  // MQTT.js emits "connect" of a second connection only after it has sent the unacknowledged publishes again.
  mine.on("packetreceive", (packet) => {
    if (packet.cmd === "connack" && packet.returnCode === 0) accepted = true;
  });
  mine.on("reconnect", () => say("reconnecting"));
  mine.on("close", () => {
    setConnected(false);
    if (client !== mine) return;
    const refused = accepted ? refusedPublish() : null;
    accepted = false;
    if (refused === null) {
      say("the connection is closed; the console will reconnect");
      return;
    }
    disconnect(
      `the broker closed the connection ${PUBLISH_CLOSES_MAX} times after the publish to ${refused}: it refuses it. ` +
        "Its log says why. The console has disconnected",
    );
  });
  mine.on("error", (error) => {
    if (client !== mine) return;
    // The code of a CONNACK. The same user name and password would be refused again.
    if (typeof error.code === "number" && error.code > 0) disconnect(`the broker refuses the connection: ${error.message}`);
    else say(`error: ${error.message}`);
  });
  mine.on("message", (topic, payload, packet) => received(topic, payload, packet));
});

/** Counts a closed connection. Returns the topic of a publish that closed too many, or null. */
function refusedPublish() {
  for (const publish of unacknowledged) {
    publish.closed += 1;
    if (publish.closed >= PUBLISH_CLOSES_MAX) return publish.topic;
  }
  return null;
}

function disconnect(why) {
  const gone = client;
  client = null;
  gone.end(true);
  setConnected(false);
  setOpen(false);
  element("subscriptions").replaceChildren();
  say(why);
}

element("console-disconnect").addEventListener("click", () => disconnect("not connected"));

element("subscribe-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const filter = element("subscribe-filter").value;
  const qos = Number(element("subscribe-qos").value);
  client.subscribe(filter, { qos }, (error, granted) => {
    const refused = error?.message ?? (granted?.some((each) => each.qos > 2) ? "the broker refused the subscription" : null);
    if (refused) {
      say(`${filter}: ${refused}`);
      return;
    }
    say(`subscribed to ${filter}, QoS ${qos}`);
    list(filter, qos);
  });
});

function list(filter, qos) {
  for (const old of element("subscriptions").children) if (old.filter === filter) old.remove();
  const item = document.createElement("li");
  item.filter = filter;
  const end = button("Unsubscribe", filter, () =>
    client?.unsubscribe(filter, (error) => {
      if (error) {
        say(`${filter}: ${error.message}`);
        return;
      }
      item.remove();
      say(`unsubscribed from ${filter}`);
    }),
  );
  item.append(isolated(filter), ` QoS ${qos} `, end);
  element("subscriptions").append(item);
}

element("publish-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const topic = element("publish-topic").value;
  const qos = Number(element("publish-qos").value);
  const retain = element("publish-retain").checked;
  const mine = client;
  const publish = { topic, closed: 0 };
  if (qos) unacknowledged.add(publish);
  client.publish(topic, element("publish-payload").value, { qos, retain }, (error) => {
    unacknowledged.delete(publish);
    if (client !== mine) return;
    if (error) say(`${topic}: ${error.message}`);
    else say(`published to ${topic}${qos ? ", and the broker has acknowledged it" : ""}`);
  });
});

function received(topic, payload, packet) {
  number += 1;
  messages.unshift({ number, at: Date.now(), topic, qos: packet.qos, retain: packet.retain, text: read(payload) });
  messages = messages.slice(0, SHOWN_MAX);
  show();
}

/** The payload as text, or as hexadecimal digits if it is no UTF-8. */
function read(payload) {
  const part = payload.subarray(0, PAYLOAD_MAX);
  const rest = payload.length > part.length ? ` … ${payload.length} bytes in total` : "";
  try {
    // A cut payload may end within a character: `stream` accepts that.
    return new TextDecoder("utf-8", { fatal: true }).decode(part, { stream: rest !== "" }) + rest;
  } catch {
    return Array.from(part, (byte) => byte.toString(16).padStart(2, "0")).join(" ") + rest;
  }
}

function show() {
  fill(element("messages"), messages, (each) => each.number, (each) => [
    time(each.at), each.topic, each.qos, each.retain ? "yes" : "no", each.text,
  ], ["text", "text", "number", "text", "text"]);
}

element("messages-clear").addEventListener("click", () => {
  messages = [];
  show();
});
