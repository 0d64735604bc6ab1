"use strict";
(() => {
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const narrow = matchMedia("(max-width: 600px)");
  const config = { displayModeBar: false, responsive: true };

  // --- charts: each is {data, layout, narrow}; `narrow` holds layout values for small screens, keyed by path

  function layoutOf(figure) {
    const layout = structuredClone(figure.layout);
    if (matchMedia("(pointer: coarse)").matches) layout.dragmode = false; // a finger scrolls the page
    for (const [path, value] of narrow.matches ? Object.entries(figure.narrow) : []) {
      const keys = path.split(".");
      const last = keys.pop();
      keys.reduce((inner, key) => (inner[key] ??= {}), layout)[last] = structuredClone(value);
    }
    return layout;
  }

  function draw() {
    const charts = Object.entries(page.figures).map(([name, figure]) =>
      Plotly.react(document.getElementById("chart-" + name), figure.data, layoutOf(figure), config)
    );
    return Promise.all(charts);
  }

  draw().then(() => (document.documentElement.dataset.drawn = "yes"));
  narrow.addEventListener("change", draw);

  for (const button of document.querySelectorAll(".key button")) {
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") === "false";
      button.setAttribute("aria-pressed", String(shown));
      for (const name of button.dataset.charts.split(" ")) {
        const index = Number(button.dataset.trace);
        page.figures[name].data[index].visible = shown;
        Plotly.restyle("chart-" + name, { visible: shown }, [index]);
      }
    });
  }

  // --- the picker: one panel per budget, one of them shown

  const picks = [...document.querySelectorAll(".pick")];
  for (const pick of picks) {
    pick.addEventListener("click", () => {
      for (const other of picks) {
        other.setAttribute("aria-pressed", String(other === pick));
        document.getElementById(other.getAttribute("aria-controls")).hidden = other !== pick;
      }
    });
  }

  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      return copyOldWay(text); // no clipboard object (a page from a file or plain http), or not allowed
    }
  }

  function copyOldWay(text) {
    const area = document.createElement("textarea");
    area.value = text;
    area.setAttribute("readonly", "");
    area.style.cssText = "position:fixed;top:0;left:0;opacity:0";
    document.body.append(area);
    area.select();
    try {
      return document.execCommand("copy");
    } catch {
      return false;
    } finally {
      area.remove();
    }
  }

  for (const button of document.querySelectorAll(".copy")) {
    const status = button.parentElement.querySelector(".copied");
    let timer;
    button.addEventListener("click", async () => {
      const text = page.widths[Number(button.dataset.net)];
      const done = await copy(text);
      button.focus();
      clearTimeout(timer);
      if (done) {
        status.textContent = "Copied to the clipboard";
        timer = setTimeout(() => (status.textContent = ""), 6000);
        return;
      }
      status.textContent = "The browser does not allow copying: take the text below";
      const panel = button.closest(".net");
      const area = panel.querySelector(".by-hand") ?? document.createElement("textarea");
      area.className = "by-hand";
      area.setAttribute("aria-label", "Widths as JSON");
      area.readOnly = true;
      area.value = text;
      button.parentElement.after(area);
      area.select();
    });
  }
})();
