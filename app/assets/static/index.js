const results = document.getElementById("results");
const status = document.getElementById("status");
const drop = document.getElementById("drop");
const input = document.getElementById("files");

function element(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}

function bar(label, probability) {
  const row = element("div", undefined, "bar");
  const meter = element("meter");
  meter.value = probability;
  meter.setAttribute("aria-label", label);
  row.append(element("span", label), meter, element("span", `${(100 * probability).toFixed(1)} %`));
  return row;
}

function show(file, answer) {
  const item = element("li");
  const picture = element("img");
  picture.src = URL.createObjectURL(file);
  picture.alt = file.name || "pasted image";
  const text = element("div");
  if (answer.error) {
    text.append(element("h2", answer.error.title), element("p", answer.error.detail));
  } else {
    text.append(element("h2", answer.label), ...answer.top.map((t) => bar(t.label, t.probability)));
    if (answer.resized_from) text.append(element("p", `resized from ${answer.resized_from.join(" × ")}`));
  }
  text.append(element("p", file.name));
  item.append(picture, text);
  results.prepend(item);
}

async function classify(files) {
  if (!files.length) return;
  const form = new FormData();
  for (const file of files) form.append("file", file, file.name || "pasted");
  status.textContent = "Classifying…";
  try {
    const response = await fetch("predict", { method: "POST", body: form });
    const answer = await response.json();
    if (!response.ok) {
      status.textContent = `${answer.title}: ${answer.detail}`;
      return;
    }
    answer.predictions.forEach((prediction, i) => show(files[i], prediction));
    status.textContent = response.headers.get("Server-Timing").replaceAll(";dur=", " ").replaceAll(",", " ms,") + " ms";
  } catch (error) {
    status.textContent = `The service cannot be reached: ${error.message}`;
  }
}

input.addEventListener("change", () => classify([...input.files]));
for (const type of ["dragover", "drop", "dragleave"]) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", type === "dragover");
    if (type === "drop") classify([...event.dataTransfer.files]);
  });
}
document.addEventListener("paste", (event) => classify([...event.clipboardData.files]));

fetch("model").then((response) => response.json()).then((card) => {
  document.getElementById("about").textContent =
    `${card.name} ${card.version} knows ${card.classes.length} classes: ${card.classes.join(", ")}.`;
});
