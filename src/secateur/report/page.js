"use strict";
const all = (what, within = document) => [...within.querySelectorAll(what)];
const at = (id) => document.getElementById(id);
document.documentElement.classList.add("js");

// Titles of SVG marks become our own tooltip: the browser's comes late, and not at all to fingers and keyboards.
for (const title of all("svg title")) {
  const mark = title.parentNode;
  mark.dataset.tip = title.textContent;
  if (!mark.hasAttribute("aria-label")) mark.setAttribute("aria-label", title.textContent);
  title.remove();
}
const tip = at("tip");
let told = null;
function show(mark, x, y) {
  told = mark;
  tip.textContent = mark.dataset.tip;
  tip.hidden = false;
  const held = mark.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const left = (x ?? held.left + held.width / 2) - own.width / 2, above = (y ?? held.top) - own.height - 12;
  tip.style.left = Math.max(8, Math.min(left, innerWidth - own.width - 8)) + "px";
  tip.style.top = (above < 8 ? (y ?? held.bottom) + 16 : above) + "px";
}
const hide = () => { tip.hidden = true; };
const marked = (event) => event.target instanceof Element && event.target.closest("[data-tip]");
function point(event) {
  const mark = marked(event);
  if (mark) show(mark, event.clientX, event.clientY);
  else if (!tip.hidden) hide();
}
addEventListener("pointermove", point);
addEventListener("pointerdown", point);
addEventListener("focusin", (event) => {
  const mark = marked(event);
  if (mark && mark.matches(":focus-visible")) show(mark); else if (!mark) hide();
});
addEventListener("focusout", hide);
addEventListener("scroll", () => {  // moving to a mark by keyboard may scroll: then its words go with it
  if (!tip.hidden && told === document.activeElement) show(told); else hide();
}, { passive: true });
addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

// One stop of the Tab key per chart; inside, the arrow keys go from mark to mark.
const seen = (chart) => all(".mark", chart).filter((mark) => !mark.closest(".off"));
function enter(chart) {
  all(".mark[tabindex='0']", chart).forEach((mark) => mark.setAttribute("tabindex", "-1"));
  seen(chart)[0]?.setAttribute("tabindex", "0");
}
for (const chart of all(".plot, .strip")) {
  enter(chart);
  chart.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    const marks = seen(chart), now = marks.indexOf(document.activeElement);
    if (!step || now < 0) return;
    event.preventDefault();
    const next = marks[(now + step + marks.length) % marks.length];
    marks[now].setAttribute("tabindex", "-1");
    next.setAttribute("tabindex", "0");
    next.focus({ focusVisible: true });
    show(next);
  });
}

// Legends: a click shows or hides a line; pointing at a name lets the others step back.
for (const legend of all(".legend")) {
  const chart = at(legend.dataset.for), lines = all("g[data-series]", chart), buttons = all("button[data-series]", legend);
  const set = (button, on) => {
    button.setAttribute("aria-pressed", on);
    lines[button.dataset.series].classList.toggle("off", !on);
  };
  const only = (button) => lines.forEach((line, n) => line.classList.toggle("faint", button !== null && n !== +button.dataset.series));
  legend.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.every) buttons.forEach((one) => set(one, button.dataset.every === "all"));
    else set(button, button.getAttribute("aria-pressed") !== "true");
    only(null);
    enter(chart.querySelector(".plot"));
  });
  for (const button of buttons) {
    const on = () => { if (button.getAttribute("aria-pressed") === "true") only(button); };
    button.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse") on(); });
    button.addEventListener("pointerleave", () => only(null));
  }
}

// Long tables: a box that filters, a button for the rest.
for (const box of all("input[data-filter]")) {
  const body = at(box.dataset.filter), rows = all("tbody tr", body), found = box.closest(".folding").querySelector(".found");
  box.addEventListener("input", () => {
    const words = box.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    let hits = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase(), hit = words.every((word) => text.includes(word));
      row.classList.toggle("hit", hit);
      hits += hit;
    }
    body.classList.toggle("filtered", words.length > 0);
    body.classList.toggle("folded", !words.length && folds.get(body) === true);
    found.textContent = words.length ? `${hits} of ${rows.length}` : "";
  });
}
const folds = new Map();
for (const more of all("button[data-more]")) {
  const body = at(more.dataset.more), closed = more.textContent;
  folds.set(body, true);
  more.addEventListener("click", () => {
    const open = more.getAttribute("aria-expanded") !== "true";
    more.setAttribute("aria-expanded", open);
    more.textContent = open ? "Show fewer" : closed;
    folds.set(body, !open);
    body.classList.toggle("folded", !open && !body.classList.contains("filtered"));
  });
}

// The section in sight is marked in the navigation.
const links = new Map(all("nav a").map((link) => [link.hash.slice(1), link]));
const watch = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting || !links.has(target.id)) continue;
    links.forEach((link) => link.removeAttribute("aria-current"));
    const link = links.get(target.id), row = link.closest("ul");
    link.setAttribute("aria-current", "true");
    row.scrollLeft = link.offsetLeft - row.offsetLeft - (row.clientWidth - link.offsetWidth) / 2;
  }
}, { rootMargin: "-15% 0px -75% 0px" });
all("main > section").forEach((section) => watch.observe(section));

// Copying and saving; both work on a page opened from the disk.
for (const button of all("button[data-copy]")) {
  button.addEventListener("click", async () => {
    const source = at(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(source.textContent);
    } catch {
      getSelection().selectAllChildren(source);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}
for (const button of all("button[data-save]")) {
  button.addEventListener("click", () => {
    const text = JSON.stringify(JSON.parse(at(button.dataset.save).textContent), null, 1);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text + "\n"], { type: "application/json" }));
    link.download = "report.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
}
