"use strict";
const element = (id) => document.getElementById(id);

async function unpack(text, Kind) {  // the numbers that Pack.base64 packed
  const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Kind(await new Response(stream).arrayBuffer());
}

// Buttons of which one is chosen: choices {name: [[value, words], ...]} into the elements of those names.
function radios(choices, state, changed) {
  for (const [name, options] of Object.entries(choices))
    for (const [value, words] of options) {
      const label = document.createElement("label"), input = document.createElement("input");
      Object.assign(input, { type: "radio", name, value, checked: state[name] === value });
      input.addEventListener("change", () => { state[name] = value; changed(name); });
      label.append(input, words);
      element(name).append(label);
    }
}

// What the address asks for, as in explore.html#model=tmd&frame=5: into state where it is a choice.
// Returns {frame: number or null, and the rest as text}.
function asked(state, choices) {
  const found = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  for (const [name, options] of Object.entries(choices))
    if (options.some(([value]) => value === found[name])) state[name] = found[name];
  return { ...found, frame: "frame" in found ? Number(found.frame) || 0 : null };
}

// The bar with the elements back, run, on, at and loop, and its keys. A page gives last() and show().
const player = {
  frame: 0, timer: null, last: () => 0, show: () => {},
  pause() { return Math.max(120, Math.min(700, 6000 / (this.last() + 1))); },  // ms between two frames
  stop() { clearInterval(this.timer); this.timer = null; element("run").textContent = "Play"; },
  to(frame) {
    this.frame = Math.max(0, Math.min(this.last(), frame));
    element("at").max = this.last();
    element("at").value = this.frame;
    this.show();
  },
  move(by) {
    if (by > 0 && this.frame >= this.last()) {
      if (!element("loop").checked) return this.stop();
      return this.to(0);
    }
    this.to(this.frame + by);
  },
  play() {
    if (this.timer) return this.stop();
    element("run").textContent = "Pause";
    this.timer = setInterval(() => this.move(1), this.pause());
  },
  start() {
    element("run").addEventListener("click", () => this.play());
    element("back").addEventListener("click", () => { this.stop(); this.move(-1); });
    element("on").addEventListener("click", () => { this.stop(); this.move(1); });
    element("at").addEventListener("input", (event) => { this.stop(); this.to(Number(event.target.value)); });
    document.addEventListener("keydown", (event) => {
      const { type, tagName } = event.target, arrow = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.ctrlKey || event.metaKey || event.altKey || tagName === "SELECT") return;  // the browser's own
      if (event.key === " " && tagName !== "BUTTON" && type !== "checkbox") { event.preventDefault(); this.play(); }
      else if (arrow && type !== "radio" && type !== "range") { this.stop(); this.move(arrow); }
    });
  },
};
