// The page of `llm2clip search`. Everything from the server is put in as text, never as markup.
const $ = (id) => document.getElementById(id);
const texts = [$("text-0"), $("text-1")];
const state = { info: null, image: null, comparing: false, request: 0 };

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.className = value;
    else if (name === "onclick") element.addEventListener("click", value);
    else if (value !== null && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer. Is llm2clip search still running?");
  }
  const content = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(content.error ? `Refused: ${content.error}` : `Error ${response.status}`);
  return content;
}

const searchText = (text, count) =>
  ask("/api/search", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ text, count }),
  });
const searchImage = (file, count) =>
  ask(`/api/search/image?count=${count}`, {
    method: "POST",
    headers: { "Content-Type": file.type || "application/octet-stream" },
    body: file,
  });
const searchSimilar = (item, count) => ask(`/api/similar/${item}?count=${count}`);

const number = (value) => value.toLocaleString("en");
const plural = (value, what) => `${number(value)} ${what}${value === 1 ? "" : "s"}`;
const shorten = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

function say(message) {
  $("message").textContent = message;
  $("message").hidden = !message;
}

// Small pictures are pixel art more often than not: they are enlarged without smoothing.
function markSmall(image) {
  image.toggleAttribute("data-small", Math.max(image.naturalWidth, image.naturalHeight) <= 96);
}

function card(result, place, best, also) {
  const image = make("img", { src: `/thumbnail/${result.item}`, alt: result.caption || result.key, loading: "lazy" });
  image.addEventListener("load", () => markSmall(image));
  const bar = make("i");
  bar.style.width = `${Math.max(2, (100 * Math.max(0, result.score)) / best)}%`;
  return make(
    "li",
    {},
    make(
      "button",
      { type: "button", class: also ? "card shared" : "card", "data-item": result.item, onclick: () => open(result) },
      image,
      make(
        "span",
        { class: "line" },
        make("span", {}, `#${place}`),
        also ? make("span", { class: "also", title: "also found by the other text" }, `#${also} there`) : null,
        make("span", { title: "cosine similarity" }, result.score.toFixed(3)),
      ),
      make("span", { class: "bar" }, bar),
      make("span", { class: "caption" }, result.caption || result.key),
    ),
  );
}

function timing(answer) {
  const { encode, compare } = answer.seconds;
  const how = state.info.exact ? "compared" : "searched through FAISS";
  const ms = (seconds) => `${(1000 * seconds).toFixed(seconds < 0.01 ? 1 : 0)} ms`;
  return `encoded in ${ms(encode)}, ${plural(state.info.images, "image")} ${how} in ${ms(compare)}`;
}

function reading(query) {
  if (!query.words) return "";
  const read = query.tokens ? `, ${plural(query.tokens, "token")}` : "";
  return `${plural(query.words, "word")}${read}${query.cut ? " read, the rest was cut" : ""} · `;
}

function column(title, answer, places = new Map(), shared = "") {
  const best = Math.max(1e-6, ...answer.images.map((result) => result.score));
  return make(
    "section",
    { class: "column images" },
    make("h2", { title }, title),
    make("p", {}, reading(answer.query) + timing(answer) + shared),
    make(
      "ol",
      { class: "grid" },
      ...answer.images.map((result, index) => card(result, index + 1, best, places.get(result.item))),
    ),
  );
}

function captionColumn(answer) {
  const lines = answer.captions.map((found) =>
    make(
      "li",
      {},
      make("b", { title: "cosine similarity" }, found.score.toFixed(3)),
      make("span", {}, shorten(found.text, 420)),
      make("button", { type: "button", class: "plain", onclick: () => fill([found.text]) }, "Search"),
    ),
  );
  const count = `the nearest of ${plural(state.info.captions, "caption")}`;
  return make("section", { class: "column" }, make("h2", {}, "Captions"), make("p", {}, count), make("ol", { class: "texts" }, ...lines));
}

// An image finds captions, where there are any, and images beside them.
function answers(title, answer) {
  const images = column(title, answer);
  return answer.captions.length ? [captionColumn(answer), images] : [images];
}

const placesOf = (answer) => new Map(answer.images.map((result, index) => [result.item, index + 1]));

async function run(load) {
  const request = ++state.request;
  $("go").disabled = true;
  say("");
  try {
    const columns = await load(Number($("amount").value));
    if (request !== state.request) return;
    $("results").replaceChildren(...columns);
    $("results").classList.toggle("answers", columns.length > columns.filter((one) => one.matches(".images")).length);
  } catch (error) {
    if (request === state.request) say(error.message);
  } finally {
    if (request === state.request) $("go").disabled = false;
  }
}

function search() {
  const given = texts.map((area) => area.value.trim());
  if (state.image && !given[0]) {
    const file = state.image;
    return run(async (count) => answers(`Images like ${file.name || "yours"}`, await searchImage(file, count)));
  }
  if (!given[0] && !(state.comparing && given[1])) return say("Type a text or choose an image first.");
  remember(given);
  if (!state.comparing || !given[1] || !given[0]) {
    const text = given[0] || given[1];
    return run(async (count) => [column(shorten(text, 160), await searchText(text, count))]);
  }
  return run(async (count) => {
    const found = await Promise.all(given.map((text) => searchText(text, count)));
    const places = found.map(placesOf);
    const shared = found[0].images.filter((result) => places[1].has(result.item)).length;
    const note = ` · ${shared} of ${found[0].images.length} in both`;
    return found.map((answer, side) => column(shorten(given[side], 160), answer, places[1 - side], note));
  });
}

function setComparing(comparing) {
  state.comparing = comparing;
  $("side-1").hidden = !comparing;
  $("query").classList.toggle("comparing", comparing);
  $("compare").setAttribute("aria-pressed", String(comparing));
  $("label-0").textContent = comparing ? "One text" : "Describe what you look for, in a word or a page";
}

function fill(given) {
  setImage(null);
  if ($("detail").open) $("detail").close();
  setComparing(given.length > 1);
  texts.forEach((area, side) => {
    area.value = given[side] || "";
    counted(side);
  });
  window.scrollTo({ top: 0 });
  return search();
}

function setImage(file) {
  const figure = document.querySelector(".chosen");
  const shown = figure.querySelector("img");
  if (shown.src) URL.revokeObjectURL(shown.src);
  shown.removeAttribute("src");
  state.image = file;
  figure.hidden = !file;
  $("file").value = "";
  if (file) shown.src = URL.createObjectURL(file);
}

function takeImage(file) {
  if (!file) return;
  if (file.size > state.info.max_upload_bytes) {
    return say(`The image is larger than the ${Math.round(state.info.max_upload_bytes / 2 ** 20)} MiB allowed.`);
  }
  texts[0].value = "";
  setComparing(false);
  setImage(file);
  return search();
}

function counted(side) {
  const words = texts[side].value.split(/\s+/).filter(Boolean).length;
  $(`count-${side}`).textContent = words ? plural(words, "word") : "";
}

// The query stands in the address, so that a reload and the back button find it again; it never leaves the page.
function remember(given) {
  const entries = (state.comparing ? given : given.slice(0, 1)).map((text, side) => [side ? "b" : "a", text]);
  const hash = `#${new URLSearchParams(entries)}`;
  if (hash.length < 8000 && hash !== location.hash) history.pushState(null, "", hash);
}

function recall() {
  const entries = new URLSearchParams(location.hash.slice(1));
  const given = ["a", "b"].filter((name) => entries.has(name)).map((name) => entries.get(name));
  if (given.length) fill(given);
}

async function open(result) {
  const image = $("detail-image");
  image.onload = () => markSmall(image);
  image.src = `/image/${result.item}`;
  image.alt = result.caption || result.key;
  $("detail-key").textContent = result.key;
  $("detail-captions").replaceChildren();
  $("detail-meta").replaceChildren();
  $("detail-compare").hidden = true;
  $("detail-similar").onclick = () => {
    $("detail").close();
    texts.forEach((area) => (area.value = ""));
    setImage(null);
    setComparing(false);
    run(async (count) => answers(`Images like ${result.key}`, await searchSimilar(result.item, count)));
  };
  $("detail").showModal();
  const about = await ask(`/api/item/${result.item}`).catch(() => null);
  if (!about || about.key !== $("detail-key").textContent) return;
  const captions = Object.entries(about.captions).flatMap(([field, own]) => own.map((text) => [field, text]));
  const definitions = (pairs) => pairs.flatMap(([name, text]) => [make("dt", {}, name), make("dd", {}, text)]);
  $("detail-captions").append(...definitions(captions));
  $("detail-meta").append(...definitions(Object.entries(about.meta)));
  const lengths = captions.map(([, text]) => text).sort((a, b) => a.length - b.length);
  $("detail-compare").hidden = lengths.length < 2;
  $("detail-compare").onclick = () => fill([lengths[0], lengths[lengths.length - 1]]);
}

function showExamples(examples) {
  if (!examples.length) return;
  for (const example of examples.slice(0, 4)) {
    const chip = { type: "button", class: "chip", title: example.short, onclick: () => fill([example.short]) };
    $("examples").append(make("button", chip, shorten(example.short, 60)));
  }
  const pair = examples[examples.length - 1];
  const chip = { type: "button", class: "chip", title: pair.long, onclick: () => fill([pair.short, pair.long]) };
  $("examples").append(make("button", chip, "a short against a long description"));
  $("examples").hidden = false;
}

function listen() {
  $("query").addEventListener("submit", (event) => {
    event.preventDefault();
    search();
  });
  texts.forEach((area, side) => {
    area.addEventListener("input", () => {
      counted(side);
      if (side === 0 && area.value) setImage(null);
    });
    area.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      search();
    });
  });
  $("compare").addEventListener("click", () => {
    setComparing(!state.comparing);
    if (state.comparing) {
      setImage(null);
      texts[1].focus();
    }
  });
  $("amount").addEventListener("change", () => (texts[0].value.trim() || state.image ? search() : null));
  $("file").addEventListener("change", () => takeImage($("file").files[0]));
  document.querySelector("[data-clear]").addEventListener("click", () => setImage(null));
  document.querySelector("[data-close]").addEventListener("click", () => $("detail").close());
  $("detail").addEventListener("click", (event) => event.target === $("detail") && $("detail").close());
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
    if (file) {
      event.preventDefault();
      takeImage(file);
    }
  });
  const dragging = (event) => event.dataTransfer && [...event.dataTransfer.types].includes("Files");
  let depth = 0;
  document.addEventListener("dragenter", (event) => dragging(event) && ($("drop").hidden = ++depth < 1));
  document.addEventListener("dragleave", (event) => dragging(event) && ($("drop").hidden = --depth < 1));
  document.addEventListener("dragover", (event) => dragging(event) && event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (!dragging(event)) return;
    event.preventDefault();
    depth = 0;
    $("drop").hidden = true;
    takeImage(event.dataTransfer.files[0]);
  });
  window.addEventListener("popstate", recall);
}

async function start() {
  try {
    state.info = await ask("/api/info");
  } catch (error) {
    $("facts").textContent = "";
    return say(error.message);
  }
  const { images, captions, model, dim, exact, recall: found, max_tokens: most } = state.info;
  const how = exact ? "exact search" : `approximate search, finds ${(100 * found).toFixed(1)} % of the first ten`;
  const limit = most ? `, texts up to ${number(most)} tokens` : "";
  $("facts").textContent =
    `${plural(images, "image")}, ${plural(captions, "caption")} · ${model} · ${dim} dimensions · ${how}${limit}`;
  $("results").dataset.empty = "Results appear here, best first, with their cosine similarity.";
  showExamples(state.info.examples);
  listen();
  recall();
  document.body.dataset.ready = "";
}

start();
