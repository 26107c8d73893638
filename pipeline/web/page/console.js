// The console: an MQTT client (MQTT.js) that connects, subscribes, publishes, and shows the messages it gets.

import { button, fill, isolated, time } from "./tables.js";

const SHOWN_MAX = 200; // messages
const PAYLOAD_MAX = 10000; // characters shown of each
const RECONNECT_MS = 2000;

const element = (id) => document.getElementById(id);
let url = null;
let client = null;
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
  setOpen(true);
  say("connecting");
  mine.on("connect", (answer) => {
    setConnected(true);
    say(`connected as ${name}${answer.sessionPresent ? "; the broker has kept its session" : ""}`);
  });
  mine.on("reconnect", () => say("reconnecting"));
  mine.on("close", () => {
    setConnected(false);
    if (client === mine) say("the connection is closed; the console will reconnect");
  });
  mine.on("error", (error) => say(`error: ${error.message}`));
  mine.on("message", (topic, payload, packet) => received(topic, payload, packet));
});

element("console-disconnect").addEventListener("click", () => {
  const gone = client;
  client = null;
  gone.end();
  setConnected(false);
  setOpen(false);
  element("subscriptions").replaceChildren();
  say("not connected");
});

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
  client.publish(topic, element("publish-payload").value, { qos, retain }, (error) => {
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
