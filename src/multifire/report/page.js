"use strict";
const report = JSON.parse(document.getElementById("report").textContent);
const root = document.documentElement;
const hidden = new Set(); // groups of runs that are switched off
const drawn = new Map(); // plot -> the card it belongs to
const coarse = matchMedia("(pointer: coarse)").matches;
const prefersDark = matchMedia("(prefers-color-scheme: dark)");

const style = (name) => getComputedStyle(root).getPropertyValue(name).trim();

function themed() {
  const [ink, quiet, line, card] = ["--ink", "--quiet", "--line", "--card"].map(style);
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, tickcolor: line };
  return {
    axis,
    layout: {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: quiet },
      hoverlabel: { bgcolor: card, bordercolor: line, font: { color: ink, size: 12.5 } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: quiet, activecolor: ink },
    },
  };
}

function parts(card) {
  const chart = report.charts[card.dataset.chart];
  const facet = chart.facets[card.querySelector("select.facet")?.value ?? 0];
  const { axis, layout } = themed();
  const data = facet.data.map((trace) => ({ ...trace, visible: isShown(trace.meta?.run) }));
  return {
    data,
    layout: {
      ...facet.layout, ...layout,
      xaxis: { ...facet.layout.xaxis, ...axis }, yaxis: { ...facet.layout.yaxis, ...axis },
      dragmode: coarse ? false : "zoom",
    },
  };
}

const isShown = (run) => run === undefined || run === null || !hidden.has(report.runs[run].group);

function draw(card) {
  const plot = card.querySelector(".plot");
  const { data, layout } = parts(card);
  const options = {
    responsive: true, displaylogo: false, displayModeBar: coarse || "hover",
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]], // no others: one sends to a cloud
    toImageButtonOptions: { filename: report.charts[card.dataset.chart].key, scale: 3 },
  };
  Plotly.react(plot, data, layout, options);
  drawn.set(plot, card);
}

const redraw = () => drawn.forEach((card) => card.offsetParent && draw(card));

const watcher = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      watcher.unobserve(target);
      draw(target);
    }
  },
  { rootMargin: "500px" },
);
const cards = [...document.querySelectorAll(".card[data-chart]")];
cards.forEach((card) => {
  watcher.observe(card);
  card.querySelector("select.facet")?.addEventListener("change", () => draw(card));
});
addEventListener("beforeprint", () => cards.filter((card) => !card.hidden).forEach(draw));

// a card that would stand alone in a row fills it
function fillRows() {
  document.querySelectorAll(".cards").forEach((grid) => {
    const shown = [...grid.children].filter((card) => !card.hidden);
    shown.forEach((card, i) => card.classList.toggle("wide", i === shown.length - 1 && i % 2 === 0));
  });
}
fillRows();

// which runs are shown, and whose details
document.querySelectorAll(".chip").forEach((chip) =>
  chip.addEventListener("click", () => {
    const group = Number(chip.dataset.group);
    const on = chip.getAttribute("aria-pressed") !== "true";
    chip.setAttribute("aria-pressed", String(on));
    on ? hidden.delete(group) : hidden.add(group);
    redraw();
  }),
);
const pickers = [...document.querySelectorAll("select.whose")];
function showDetails(run) {
  pickers.forEach((picker) => (picker.value = run));
  document.querySelectorAll("[data-run]").forEach((part) => (part.hidden = part.dataset.run !== run));
  document.querySelectorAll(".whose-section").forEach((section) => {
    section.querySelector(".nothing").hidden = Boolean(section.querySelector("[data-run]:not([hidden])"));
  });
  fillRows();
  redraw();
}
pickers.forEach((picker) => picker.addEventListener("change", () => showDetails(picker.value)));

// light and dark
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches);
document.querySelector(".theme").addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  redraw();
});
prefersDark.addEventListener("change", redraw);

// recordings, step by step
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
document.querySelectorAll(".player").forEach((player) => {
  const { running, names, label } = report.recordings[player.dataset.recording];
  const [screen, votes] = [player.querySelector(".screen"), player.querySelector(".votes")];
  const [button, slider, step] = [player.querySelector("button"), player.querySelector("input"), player.querySelector("output")];
  const best = names.map((_, k) => k).sort((a, b) => Math.max(...running.map((p) => p[b])) - Math.max(...running.map((p) => p[a])));
  const shown = [...new Set([label, ...best])].slice(0, 5).sort((a, b) => a - b);
  const rows = shown.map((k) => {
    const row = document.createElement("div");
    row.className = k === label ? "vote true" : "vote";
    const [name, track, share] = ["span", "span", "span"].map((tag) => row.appendChild(document.createElement(tag)));
    name.textContent = name.title = names[k];
    const bar = track.appendChild(document.createElement("b"));
    votes.append(row);
    return { k, bar, share };
  });
  const show = (t) => {
    slider.value = t;
    step.textContent = `${t + 1} / ${running.length}`;
    screen.style.backgroundPosition = `${(100 * t) / Math.max(running.length - 1, 1)}% 0`;
    for (const { k, bar, share } of rows) {
      bar.style.width = `${100 * running[t][k]}%`;
      share.textContent = `${Math.round(100 * running[t][k])} %`;
    }
  };
  let timer = 0;
  const play = (on) => {
    clearInterval(timer);
    timer = on ? setInterval(() => player.offsetParent && show((Number(slider.value) + 1) % running.length), Math.max(120, 2400 / running.length)) : 0;
    button.textContent = on ? "❚❚" : "▶";
    button.setAttribute("aria-label", on ? "pause" : "play");
  };
  button.addEventListener("click", () => play(!timer));
  slider.addEventListener("input", () => (play(false), show(Number(slider.value))));
  screen.style.backgroundSize = `${100 * running.length}% 100%`;
  show(running.length - 1);
  play(!still);
});
