// The shelf: the pictures made in this visit, newest first.
const root = element.querySelector(".wa-shelf");
const render = () => {
  const items = props.value.items.map((item) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "wa-thumb";
    button.setAttribute("aria-label", "Show the picture of seed " + item.seed);
    button.setAttribute("aria-pressed", String(item.id === props.value.current));
    button.addEventListener("click", () => trigger("show", { id: item.id, at: Date.now() }));
    const image = document.createElement("img");
    image.src = item.thumb;
    image.alt = "";
    const label = document.createElement("span");
    label.textContent = item.seed;
    button.append(image, label);
    return button;
  });
  root.replaceChildren(...items);
  root.dataset.empty = String(!items.length);
};
watch("value", render);
render();
