// The easel: people's boxes drawn by mouse, touch and keys, and behind them the picture as it forms.
const NS = "http://www.w3.org/2000/svg";
const root = element.querySelector(".wa-easel");
const h = (tag, attrs = {}, ...children) => {
  const svg = ["svg", "g", "rect", "text", "circle"].includes(tag);
  const node = svg ? document.createElementNS(NS, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attrs)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
};
let drag = null;
let selected = 0;
let shown = true; // are the boxes to be seen?
let wasPicture = false;

const frame = h("div", { class: "wa-frame" });
const picture = h("img", { class: "wa-picture", alt: "" });
const grid = h("div", { class: "wa-grid", role: "group", "aria-label": "Slider positions to choose from" });
const svg = h("svg", { class: "wa-boxes", role: "group", "aria-label": "Where each face goes" });
const hint = h("p", { class: "wa-hint" });
const bar = h("div", { class: "wa-bar" });
const progress = h("progress", { max: "1", value: "0", "aria-label": "Progress of the picture" });
const status = h("p", { class: "wa-status", role: "status", "aria-live": "polite" });
bar.append(progress, status);
frame.append(picture, grid, svg, hint, bar);
const arrangement = h("select", { class: "wa-select", "aria-label": "Arrangement of the boxes",
  onchange: () => { if (arrangement.value) trigger("arrange", { name: arrangement.value, at: Date.now() }); arrangement.value = ""; } });
const toggle = h("button", { type: "button", class: "wa-button", "aria-pressed": "true",
  onclick: () => { shown = !shown; render(); } }, "Boxes");
const copy = h("button", { type: "button", class: "wa-button",
  onclick: async () => {
    const text = JSON.stringify(props.value.boxes);
    try { await navigator.clipboard.writeText(text); } catch { window.prompt("The boxes as JSON", text); return; }
    copy.textContent = "Copied";
    setTimeout(() => { copy.textContent = "Copy boxes"; }, 1500);
  } }, "Copy boxes");
const download = h("button", { type: "button", class: "wa-button", onclick: async () => {
  const blob = await (await fetch(props.value.picture)).blob();
  const link = h("a", { href: URL.createObjectURL(blob), download: props.value.file });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
} }, "Download");
const reuse = h("button", { type: "button", class: "wa-button",
  onclick: () => trigger("reuse", { seed: props.value.seed, at: Date.now() }) }, "Use as next seed");
root.append(frame, h("div", { class: "wa-tools", role: "toolbar", "aria-label": "Boxes and picture" },
  arrangement, toggle, copy, h("span", { class: "wa-space" }), reuse, download));

const clamp = (v, low, high) => Math.max(low, Math.min(high, v));
const least = () => Math.max(8, Math.round(0.06 * Math.min(props.value.width, props.value.height)));
const valid = (box) => { // inside the picture, and of a size that a face can have
  const { width, height } = props.value, m = least();
  let [x1, y1, x2, y2] = [Math.min(box[0], box[2]), Math.min(box[1], box[3]), Math.max(box[0], box[2]), Math.max(box[1], box[3])];
  x1 = clamp(x1, 0, width - m); y1 = clamp(y1, 0, height - m);
  x2 = clamp(x2, x1 + m, width); y2 = clamp(y2, y1 + m, height);
  return [x1, y1, x2, y2].map(Math.round);
};
const moved = (box, dx, dy) => {
  const { width, height } = props.value;
  dx = clamp(dx, -box[0], width - box[2]); dy = clamp(dy, -box[1], height - box[3]);
  return valid([box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy]);
};
const resized = (box, corner, dx, dy) => {
  const b = [...box], m = least();
  if (corner.includes("w")) b[0] = clamp(b[0] + dx, 0, b[2] - m);
  if (corner.includes("e")) b[2] = clamp(b[2] + dx, b[0] + m, props.value.width);
  if (corner.includes("n")) b[1] = clamp(b[1] + dy, 0, b[3] - m);
  if (corner.includes("s")) b[3] = clamp(b[3] + dy, b[1] + m, props.value.height);
  return valid(b);
};
const point = (event) => {
  const r = svg.getBoundingClientRect();
  return [clamp((event.clientX - r.left) / r.width, 0, 1) * props.value.width,
    clamp((event.clientY - r.top) / r.height, 0, 1) * props.value.height];
};
const put = (i, box) => {
  const boxes = props.value.boxes.map((b) => [...b]);
  boxes[i] = box;
  props.value = { ...props.value, boxes: boxes };
  drawBoxes();
};
const done = () => { window.withanyoneBoxes = JSON.stringify(props.value.boxes); trigger("moved", { boxes: props.value.boxes }); };

const drawBoxes = () => {
  const { width, height, people, boxes } = props.value;
  svg.setAttribute("viewBox", "0 0 " + width + " " + height);
  const unit = width / 100, focused = svg.contains(document.activeElement) ? document.activeElement.dataset.i : null;
  svg.replaceChildren(...boxes.map((b, i) => {
    const person = people[i] || { name: String(i + 1), color: "#888" };
    const corners = { nw: [b[0], b[1]], ne: [b[2], b[1]], sw: [b[0], b[3]], se: [b[2], b[3]] };
    const label = person.name.slice(0, 14);
    const top = b[1] > 7 * unit ? b[1] - 6.2 * unit : b[1] + 0.6 * unit;
    const g = h("g", { class: "wa-box" + (i === selected ? " wa-selected" : ""), "data-i": i, tabindex: "0", role: "button",
      "aria-label": person.name + "'s box: arrow keys move it, with Shift they change its size" },
      h("rect", { class: "wa-body", "data-i": i, x: b[0], y: b[1], width: b[2] - b[0], height: b[3] - b[1], rx: unit,
        style: "--c:" + person.color }),
      h("rect", { x: b[0], y: top, width: (label.length * 2.7 + 3) * unit, height: 5.4 * unit, rx: unit, fill: person.color, "pointer-events": "none" }),
      h("text", { x: b[0] + 1.5 * unit, y: top + 4 * unit, "font-size": 4.2 * unit, fill: "#fff", "pointer-events": "none" }, label));
    for (const [corner, at] of Object.entries(corners)) {
      g.append(h("circle", { class: "wa-grip wa-" + corner, "data-i": i, "data-corner": corner, cx: at[0], cy: at[1], r: 1.7 * unit, fill: person.color }),
        h("circle", { class: "wa-reach wa-" + corner, "data-i": i, "data-corner": corner, cx: at[0], cy: at[1], r: 4.5 * unit }));
    }
    return g;
  }));
  if (focused !== null && focused !== undefined) { const again = svg.querySelector('g[data-i="' + focused + '"]'); if (again) again.focus({ preventScroll: true }); }
};

const locked = () => props.value.state === "making" || props.value.state === "waiting";
svg.addEventListener("pointerdown", (event) => {
  if (locked() || !props.value.boxes.length || event.button) return;
  event.preventDefault();
  svg.setPointerCapture(event.pointerId);
  const at = point(event), i = event.target.dataset.i, corner = event.target.dataset.corner;
  if (i !== undefined) {
    selected = Number(i);
    drag = { i: selected, at: at, box: [...props.value.boxes[selected]], corner: corner };
    const g = svg.querySelector('g[data-i="' + i + '"]');
    if (g) g.focus({ preventScroll: true });
  } else {
    selected = clamp(selected, 0, props.value.boxes.length - 1);
    drag = { i: selected, at: at, box: [at[0], at[1], at[0], at[1]], corner: "new", moved: false };
  }
  drawBoxes();
});
svg.addEventListener("pointermove", (event) => {
  if (!drag) return;
  const at = point(event), dx = at[0] - drag.at[0], dy = at[1] - drag.at[1];
  if (drag.corner === "new") {
    if (Math.abs(dx) + Math.abs(dy) < least() / 2) return;
    drag.moved = true;
    put(drag.i, valid([drag.at[0], drag.at[1], at[0], at[1]]));
  } else put(drag.i, drag.corner ? resized(drag.box, drag.corner, dx, dy) : moved(drag.box, dx, dy));
});
const release = () => { if (drag && (drag.corner !== "new" || drag.moved)) done(); drag = null; };
svg.addEventListener("pointerup", release);
svg.addEventListener("pointercancel", release);
svg.addEventListener("focusin", (event) => { const i = event.target.dataset.i; if (i !== undefined && Number(i) !== selected) { selected = Number(i); drawBoxes(); } });
svg.addEventListener("keydown", (event) => {
  const step = Math.max(1, Math.round(props.value.width / 64));
  const way = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
  const i = Number(event.target.dataset.i);
  if (!way || locked() || !props.value.boxes[i]) return;
  event.preventDefault();
  put(i, event.shiftKey ? resized(props.value.boxes[i], "se", ...way) : moved(props.value.boxes[i], ...way));
  done();
});

const render = () => {
  const v = props.value;
  if (!!v.picture !== wasPicture && v.state !== "making") { shown = !v.picture; wasPicture = !!v.picture; }
  frame.style.aspectRatio = v.width + " / " + v.height;
  frame.style.setProperty("--tall", v.height / v.width);
  root.dataset.state = v.state;
  picture.hidden = !v.picture || !!v.grid;
  if (v.picture) picture.src = v.picture; else picture.removeAttribute("src");
  picture.alt = v.alt || "";
  picture.classList.toggle("wa-forming", v.state === "making");
  grid.hidden = !v.grid;
  if (v.grid) {
    grid.style.gridTemplateColumns = "repeat(" + v.grid.columns + ", 1fr)";
    grid.replaceChildren(...v.grid.cells.map((cell) => cell.thumb
      ? h("button", { type: "button", class: "wa-cell", "aria-label": "Choose " + cell.label,
          onclick: () => trigger("choose", { id: cell.id, at: Date.now() }) },
          h("img", { src: cell.thumb, alt: "" }), h("span", {}, cell.label))
      : h("div", { class: "wa-cell wa-empty" }, h("span", {}, cell.label))));
  }
  svg.classList.toggle("wa-off", !!v.grid || (!shown && !!v.picture) || v.state === "making");
  toggle.setAttribute("aria-pressed", String(shown));
  toggle.disabled = !v.boxes.length || !v.picture;
  copy.disabled = arrangement.disabled = !v.boxes.length;
  hint.textContent = v.hint || "";
  hint.hidden = !v.hint || !!v.picture || !!v.grid || v.state === "making";
  const works = v.state === "making" || v.state === "waiting";
  bar.classList.toggle("wa-quiet", !works && !v.text);
  progress.hidden = !works;
  if (v.fraction === null) progress.removeAttribute("value"); else progress.value = v.fraction || 0;
  if (status.textContent !== (v.text || "")) status.textContent = v.text || "";
  status.dataset.tone = v.state === "failed" ? "warn" : "";
  download.disabled = !(v.picture && v.file) || works || !!v.grid;
  reuse.disabled = !(v.seed >= 0) || works || !v.picture;
  arrangement.replaceChildren(h("option", { value: "" }, "Arrange …"), ...v.arrangements.map((name) => h("option", { value: name }, name)));
  selected = clamp(selected, 0, Math.max(0, v.boxes.length - 1));
  if (!drag) drawBoxes();
};
watch("value", render);
render();
