// The people: cards with their faces, adding photos by file, drop, paste and camera, drawn people.
const root = element.querySelector(".wa-people");
const h = (tag, attrs = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attrs)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
};
let busy = "";
let wrong = "";

const bring = async (files, person, dropped) => {
  const chosen = [...files];
  if (!chosen.length) return;
  const most = props.value.upload_bytes;
  wrong = "";
  busy = dropped ? "Reading the file …" : "Looking for faces …";
  render();
  const paths = [];
  for (const file of chosen) {
    if (file.size > most) {
      wrong = file.name + " has " + Math.round(file.size / 1e6) + " MB; photos of up to " +
        Math.round(most / 1e6) + " MB are taken. Save a smaller copy and try again.";
      continue;
    }
    try {
      paths.push({ path: (await upload(file)).path, name: file.name });
    } catch (error) {
      wrong = file.name + " did not arrive (" + String(error && error.message ? error.message : error) +
        "). Check the connection and try again.";
    }
  }
  busy = "";
  if (paths.length) {
    busy = "Looking for faces …";
    trigger("bring", { files: paths, person: person, dropped: !!dropped, at: Date.now() });
  }
  render();
};
const act = (what, more) => trigger("act", { do: what, at: Date.now(), ...more });

const picker = (label, person, more) => {
  const input = h("input", { type: "file", accept: "image/*", multiple: true, class: "wa-file",
    "aria-label": label, ...more,
    onchange: (event) => { bring(event.target.files, person, false); event.target.value = ""; } });
  return input;
};

const faceChoice = (person, photo) => {
  const row = h("div", { class: "wa-choice", role: "group", "aria-label": "Which face is " + person.name + "?" });
  row.append(h("span", { class: "wa-small" }, photo.faces.length + " faces: which one?"));
  photo.faces.forEach((face, i) => row.append(
    h("button", { type: "button", class: "wa-pick", "aria-pressed": String(i === photo.chosen),
      "aria-label": "Face " + (i + 1) + " of " + photo.faces.length,
      onclick: () => act("choose", { person: person.id, photo: photo.id, face: i }) },
      h("img", { src: face, alt: "" }))));
  row.append(h("button", { type: "button", class: "wa-link",
    onclick: () => act("split", { person: person.id, photo: photo.id }) },
    "Take all as " + photo.faces.length + " people"));
  return row;
};

const card = (person, index) => {
  const faces = h("div", { class: "wa-faces" });
  person.photos.forEach((photo, i) => faces.append(
    h("span", { class: "wa-face" },
      h("img", { src: photo.faces[photo.chosen], alt: "Face of " + person.name + (i ? ", photo " + (i + 1) : "") }),
      person.photos.length > 1
        ? h("button", { type: "button", class: "wa-x", "aria-label": "Remove photo " + (i + 1) + " of " + person.name,
            onclick: () => act("drop", { person: person.id, photo: photo.id }) }, "×")
        : null)));
  const node = h("div", { class: "wa-person", role: "listitem", style: "--c:" + person.color,
    "data-person": person.id },
    faces,
    h("input", { class: "wa-name", value: person.name, maxlength: props.value.name_length, "data-key": person.id,
      "aria-label": "Name of person " + (index + 1),
      onchange: (event) => act("rename", { person: person.id, name: event.target.value }) }),
    h("div", { class: "wa-buttons" },
      h("label", { class: "wa-link" }, "+ photo", picker("Another photo of " + person.name, person.id)),
      h("button", { type: "button", class: "wa-link", "aria-label": "Remove " + person.name,
        onclick: () => act("remove", { person: person.id }) }, "remove")));
  person.photos.filter((photo) => photo.faces.length > 1).forEach((photo) => node.append(faceChoice(person, photo)));
  return node;
};

const camera = () => {
  const video = h("video", { autoplay: true, playsinline: true, muted: true });
  const dialog = h("dialog", { class: "wa-dialog", "aria-label": "Camera" });
  let stream = null;
  const close = () => { if (stream) stream.getTracks().forEach((track) => track.stop()); dialog.close(); dialog.remove(); };
  const take = () => {
    const canvas = h("canvas");
    canvas.width = video.videoWidth;
    canvas.height = video.videoHeight;
    canvas.getContext("2d").drawImage(video, 0, 0);
    canvas.toBlob((blob) => { close(); bring([new File([blob], "camera.jpg", { type: "image/jpeg" })], null, false); },
      "image/jpeg", 0.95);
  };
  dialog.append(video, h("div", { class: "wa-buttons" },
    h("button", { type: "button", class: "wa-button", onclick: take }, "Take the photo"),
    h("button", { type: "button", class: "wa-button", onclick: close }, "Close")));
  dialog.addEventListener("cancel", close);
  root.append(dialog);
  dialog.showModal();
  navigator.mediaDevices.getUserMedia({ video: { facingMode: "user" } })
    .then((found) => { stream = found; video.srcObject = found; })
    .catch(() => { close(); wrong = "The camera could not be opened: allow it in the browser, or choose a file."; render(); });
};

const adder = (value) => h("div", { class: "wa-person wa-add", role: "listitem" },
  h("label", { class: "wa-zone" },
    h("span", { class: "wa-plus", "aria-hidden": "true" }, "+"),
    h("span", {}, value.people.length ? "Add another person" : "Add people"),
    h("span", { class: "wa-small" }, "choose, drop or paste photos"),
    picker("Add people: choose photos", null, { id: "wa-upload" })),
  navigator.mediaDevices && navigator.mediaDevices.getUserMedia
    ? h("button", { type: "button", class: "wa-link", onclick: camera }, "use the camera") : null);

const gallery = (value) => {
  if (!value.gallery.length) return null;
  const number = h("input", { type: "number", min: 0, max: value.last_number, step: 1, value: value.number, class: "wa-number",
    "aria-label": "Number of a drawn person", "data-key": "number" });
  const row = h("div", { class: "wa-gallery", role: "group", "aria-label": "Drawn people to take" });
  value.gallery.forEach((drawn) => row.append(
    h("button", { type: "button", class: "wa-drawn", "aria-label": "Take " + drawn.name,
      onclick: () => act("drawn", { number: drawn.number, name: drawn.name }) },
      h("img", { src: drawn.thumb, alt: "" }), h("span", {}, drawn.name))));
  return h("div", { class: "wa-gallery-box" }, row,
    h("div", { class: "wa-make" },
      h("span", {}, "Make a person: each number is one"), number,
      h("button", { type: "button", class: "wa-button", onclick: () => act("drawn", { number: Number(number.value) }) }, "Draw"),
      h("button", { type: "button", class: "wa-button", onclick: () => act("anybody", {}) }, "Anybody")));
};

const render = () => {
  const value = props.value;
  const key = document.activeElement && root.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  const cards = h("div", { class: "wa-cards", role: "list", "aria-label": "People in the picture" });
  value.people.forEach((person, i) => cards.append(card(person, i)));
  if (value.people.length < value.most) cards.append(adder(value));
  const text = busy || wrong || value.notice.text;
  const tone = busy ? "busy" : wrong ? "warn" : value.notice.tone;
  root.replaceChildren(cards,
    h("p", { class: "wa-notice wa-" + tone, role: "status", "aria-live": "polite" }, text || value.hint),
    ...[gallery(value)].filter(Boolean));
  if (key) { const again = root.querySelector('[data-key="' + key + '"]'); if (again) again.focus({ preventScroll: true }); }
};

watch("value", () => { busy = ""; wrong = ""; render(); });

const carriesFiles = (event) => event.dataTransfer && [...event.dataTransfer.types].includes("Files");
document.addEventListener("dragover", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  document.body.classList.add("wa-dropping");
});
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("wa-dropping"); });
document.addEventListener("drop", (event) => {
  document.body.classList.remove("wa-dropping");
  if (!carriesFiles(event)) return;
  event.preventDefault();
  const at = event.target.closest ? event.target.closest("[data-person]") : null;
  bring(event.dataTransfer.files, at ? at.dataset.person : null, !at);
});
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData ? event.clipboardData.files : [])].filter((file) => file.type.startsWith("image/"));
  if (files.length) { event.preventDefault(); bring(files, null, true); }
});
render();
