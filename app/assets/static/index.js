const MAX_FILES = 64; // of one request; both are below the service's default limits
const MAX_BYTES = 16e6;
const SAMPLES = {
  "chelsea.jpg": "cat", "airplane.png": "airplane", "bird.png": "bird", "cat.png": "cat", "frog.png": "frog",
  "horse.png": "horse", "ship.png": "ship", "truck.png": "truck",
};
const WORDS = {
  "malformed-upload": "This file is empty.",
  "unsupported-image": "This is not a PNG, JPEG, WebP, BMP or GIF picture.",
  "undecodable-image": "This picture is damaged or incomplete.",
  unauthorized: "The service requires an API key.",
  "queue-full": "The service is busy.",
  "not-ready": "The service is not ready.",
  "deadline-exceeded": "The service took too long.",
};
const STEPS = { decode: "decoding", queue: "waiting", model: "network" };
const ABOUT_FILES = [400, 413, 415, 422];

const find = (id) => document.getElementById(id);
const plural = (n) => (n === 1 ? "1 picture" : `${n} pictures`);
const percent = (share) => (share > 0.9995 ? "> 99.9 %" : share < 0.0005 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`);
const setStatus = (text) => { find("status").textContent = text; };

let key = "";
let card = null;
let queue = Promise.resolve();

class Refusal extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

function element(tag, className, ...children) {
  const node = document.createElement(tag);
  node.className = className;
  node.append(...children);
  return node;
}

function inWords({ type, title, detail }) {
  return WORDS[type.split(":").pop()] ?? `${title}. ${detail.replaceAll(/000000\b/g, " million")}`;
}

/** The service's predictions for these files; throws a Refusal with a message for users. */
async function predict(files) {
  const form = new FormData();
  for (const file of files) form.append("file", file);
  const headers = key ? { "X-API-Key": key } : {};
  const count = card ? `?top_k=${Math.min(3, card.classes.length)}` : "";
  const response = await fetch(`predict${count}`, { method: "POST", body: form, headers }).catch(() => {
    throw new Refusal("The service cannot be reached.");
  });
  if (response.status === 401 && (await askForKey())) return predict(files);
  const body = await response.json().catch(() => ({}));
  if (body.predictions) return { predictions: body.predictions, times: times(response.headers.get("Server-Timing")) };
  const words = body.type ? inWords(body) : `Unexpected response (status ${response.status}).`;
  const wait = Number(response.headers.get("Retry-After"));
  throw new Refusal(wait ? `${words} Try again in ${wait} s.` : words, response.status);
}

function times(header) {
  return [...(header ?? "").matchAll(/(\w+);dur=([\d.]+)/g)].map(([, name, ms]) => [name, Number(ms)]);
}

/** True once the user gave a key. It is kept in this variable only. */
function askForKey() {
  const dialog = find("key-dialog");
  dialog.returnValue = "";
  dialog.showModal();
  find("refused").textContent = key ? "That key was not accepted." : "";
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      if (dialog.returnValue) key = find("key").value;
      find("key").value = "";
      resolve(Boolean(dialog.returnValue));
    }, { once: true });
  });
}

/** Fills in these items. An error of a whole request may be due to one file, so each half is sent again. */
async function fill(items, batch) {
  try {
    const answer = await predict(items.map((item) => item.file));
    answer.predictions.forEach((prediction, i) => showPrediction(items[i], prediction));
    showTimes(batch, answer.times);
  } catch (refusal) {
    if (!ABOUT_FILES.includes(refusal.status)) throw refusal;
    if (items.length === 1) return showFailure(items[0], refusal.message);
    await fill(items.slice(0, items.length / 2), batch);
    await fill(items.slice(items.length / 2), batch);
  }
}

function* requests(items) {
  let part = [];
  let bytes = 0;
  for (const item of items) {
    if (part.length && (part.length === MAX_FILES || bytes + item.file.size > MAX_BYTES)) {
      yield part;
      [part, bytes] = [[], 0];
    }
    part.push(item);
    bytes += item.file.size;
  }
  yield part;
}

async function run(batch) {
  const open = batch.items.filter((item) => !item.done);
  setStatus(`Classifying ${plural(open.length)}…`);
  batch.section.ariaBusy = "true";
  try {
    for (const part of requests(open)) await fill(part, batch);
    setStatus(summary(batch.items));
  } catch (refusal) {
    showRetry(batch, refusal.message);
    setStatus(refusal.message);
  }
  batch.section.ariaBusy = "false";
}

function summary(items) {
  const good = items.filter((item) => item.node.className === "card");
  if (items.length === 1) return `${items[0].file.name}: ${items[0].text.firstChild.textContent}`;
  return good.length === items.length
    ? `${plural(items.length)} classified.`
    : `${good.length} of ${plural(items.length)} classified; the others show an error.`;
}

function showBatch(files) {
  const title = element("h2", "", plural(files.length));
  title.tabIndex = -1; // gets the focus when "Try again" goes away
  const header = element("header", "", title, element("p", ""));
  const items = files.map(showItem);
  const section = element("section", "batch", header, element("ul", "cards", ...items.map((item) => item.node)));
  find("results").prepend(section);
  return { section, header, items, times: new Map() };
}

function showItem(file) {
  const picture = element("img", "picture");
  picture.alt = `picture ${file.name}`;
  picture.src = URL.createObjectURL(file);
  picture.addEventListener("load", () => {
    picture.classList.toggle("small", picture.naturalWidth <= 96);
    URL.revokeObjectURL(picture.src);
  });
  picture.addEventListener("error", () => picture.replaceWith(element("div", "picture broken")));
  const text = element("div", "", element("h3", "", "not yet classified"), showName(file));
  return { file, text, node: element("li", "card open", picture, text), done: false };
}

function showName(file) {
  const name = element("p", "name", file.name);
  name.title = file.name;
  return name;
}

function showPrediction(item, prediction) {
  if (prediction.error) return showFailure(item, inWords(prediction.error));
  const bars = prediction.top.map(({ label, probability }) => {
    const bar = element("div", "");
    bar.style.width = `${100 * probability}%`;
    return element("li", "", bar, element("span", "", label), element("span", "", percent(probability)));
  });
  item.text.replaceChildren(element("h3", "", prediction.label), element("ol", "bars", ...bars), showName(item.file));
  if (prediction.ood) item.text.append(element("p", "ood", "unlike the training pictures"));
  if (prediction.resized_from) {
    const [width, height] = prediction.resized_from;
    const cut = width === height ? "" : ", cut at the centre";
    item.text.append(element("p", "", `resized from ${width} × ${height}${cut}`));
  }
  item.node.className = "card";
  item.done = true;
}

function showFailure(item, message) {
  item.text.replaceChildren(element("h3", "", message), showName(item.file));
  item.node.className = "card failed";
  item.done = true;
}

function showTimes(batch, times) {
  for (const [name, ms] of times) batch.times.set(name, (batch.times.get(name) ?? 0) + ms);
  const total = [...batch.times.values()].reduce((a, b) => a + b, 0);
  const steps = [...batch.times].map(([name, ms]) => `${STEPS[name] ?? name} ${ms.toFixed(1)}`);
  batch.header.lastChild.textContent = total ? `${total.toFixed(1)} ms: ${steps.join(", ")}` : "";
}

function showRetry(batch, message) {
  const button = element("button", "quiet", "Try again");
  const notice = element("div", "notice", element("p", "", message), button);
  button.addEventListener("click", () => {
    notice.remove();
    batch.header.firstChild.focus();
    start(batch);
  });
  batch.header.after(notice);
}

function start(batch) {
  queue = queue.then(() => run(batch));
}

function classify(files) {
  if (files.length) start(showBatch([...files]));
}

async function fetchSample(name) {
  const response = await fetch(`static/samples/${name}`);
  return new File([await response.blob()], name);
}

function sampleButton(content, names) {
  const button = element("button", "", content);
  button.type = "button";
  button.addEventListener("click", async () => classify(await Promise.all(names.map(fetchSample))));
  return element("li", "", button);
}

function showSamples(classes) {
  const names = Object.keys(SAMPLES).filter((name) => classes.includes(SAMPLES[name]));
  const items = names.map((name) => {
    const picture = element("img", "small");
    picture.src = `static/samples/${name}`;
    picture.alt = `sample ${name}`;
    return sampleButton(picture, [name]);
  });
  find("samples").lastElementChild.append(...items, sampleButton("All", names));
  find("samples").hidden = !names.length;
}

find("files").addEventListener("change", (event) => {
  classify(event.target.files);
  event.target.value = "";
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  const items = [...event.dataTransfer.items].filter((item) => item.kind === "file");
  const files = items.filter((item) => !item.webkitGetAsEntry()?.isDirectory).map((item) => item.getAsFile());
  if (files.length < items.length) setStatus("Folders are not supported; drop the pictures themselves.");
  classify(files);
});
document.addEventListener("paste", (event) => classify(event.clipboardData.files));

card = await fetch("model").then((response) => (response.ok ? response.json() : null), () => null);
if (card) {
  const known = card.classes.length > 20 ? `${card.classes.length} classes` : card.classes.join(", ");
  find("about").textContent =
    `The ${card.name} network has the classes ${known}. Every picture is assigned to one of them. ` +
    `Its accuracy is ${percent(card.test_accuracy)} on the test pictures of ${card.dataset}.`;
  showSamples(card.classes);
}
