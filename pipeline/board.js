// Sorts and filters the rows of the run board, and keeps both in the address. Without it the page shows every run.
"use strict";
(() => {
  const body = document.querySelector("#runs tbody");
  if (!body) return;
  const find = (id) => document.getElementById(id);
  const [controls, filter, order, turn, count] = ["controls", "filter", "order", "turn", "count"].map(find);
  const chips = [...controls.querySelectorAll("[data-state]")];
  const heads = [...document.querySelectorAll("#runs thead th[data-order]")];
  const defaults = new Map([...order.options].map((one) => [one.value.replace("-", ""), one.value]));
  const rows = [...body.rows].map((row, place) => ({ row, place, state: row.className, text: "" }));
  const collator = new Intl.Collator("en", { numeric: true, sensitivity: "base" });
  const view = { key: "", down: false, grouped: false };

  function value(row, key) {
    const text = row.dataset[key];
    if (text === undefined) return undefined;
    return ["experiment", "base", "dataset", "flavor"].includes(key) ? text : Number(text);
  }

  function compare(a, b, key, down) {
    const [x, y] = [value(a.row, key), value(b.row, key)];
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    const sign = typeof x === "string" ? collator.compare(x, y) : x - y;
    return down ? -sign : sign;
  }

  function sort(key, down) {
    Object.assign(view, { key, down });
    // Runs of one experiment stand newest first, whichever way the names go; the place on the page decides the rest.
    const list = [...rows].sort(
      (a, b) => compare(a, b, key, down) || compare(a, b, "when", true) || a.place - b.place,
    );
    body.append(...list.map(({ row }) => row));
    body.classList.toggle("grouped", key === "experiment");
    order.value = defaults.get(key);
    turn.textContent = down ? "↓" : "↑";
    turn.setAttribute("aria-label", `Turn the order round: now ${down ? "descending" : "ascending"}`);
    for (const head of heads) {
      const here = head.dataset.order.replace("-", "") === key;
      if (here) head.setAttribute("aria-sort", down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
    mark();
  }

  function mark() {
    let last;
    for (const row of body.rows) {
      if (row.hidden) continue;
      row.classList.toggle("first", last !== undefined && last !== row.dataset.experiment);
      last = row.dataset.experiment;
    }
  }

  function show() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const states = chips.filter((chip) => chip.ariaPressed === "true").map((chip) => chip.dataset.state);
    let left = 0;
    for (const one of rows) {
      if (words.length && !one.text) one.text = one.row.textContent.toLowerCase();
      const fits = (!states.length || states.includes(one.state)) && words.every((word) => one.text.includes(word));
      one.row.hidden = !fits;
      left += fits;
    }
    count.textContent = left === rows.length ? `${left} shown` : `${left} of ${rows.length} shown`;
    mark();
  }

  function remember() {
    const said = new URLSearchParams();
    const states = chips.filter((chip) => chip.ariaPressed === "true").map((chip) => chip.dataset.state);
    if (filter.value) said.set("q", filter.value);
    if (states.length) said.set("state", states.join(","));
    if (view.key !== "when" || !view.down) said.set("sort", (view.down ? "-" : "") + view.key);
    history.replaceState(null, "", `#${said}`);
  }

  function restore() {
    const said = new URLSearchParams(location.hash.slice(1));
    const states = (said.get("state") ?? "").split(",");
    filter.value = said.get("q") ?? "";
    for (const chip of chips) chip.ariaPressed = String(states.includes(chip.dataset.state));
    const wanted = said.get("sort") ?? "-when";
    const known = defaults.has(wanted.replace("-", "")) ? wanted : "-when";
    sort(known.replace("-", ""), known.startsWith("-"));
    show();
  }

  function choose(wanted) {
    const key = wanted.replace("-", "");
    sort(key, key === view.key ? !view.down : wanted.startsWith("-"));
    remember();
  }

  for (const head of heads) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.addEventListener("click", () => choose(head.dataset.order));
    head.replaceChildren(button);
  }
  for (const chip of chips) {
    chip.addEventListener("click", () => {
      chip.ariaPressed = String(chip.ariaPressed !== "true");
      show();
      remember();
    });
  }
  filter.addEventListener("input", () => {
    show();
    remember();
  });
  order.addEventListener("change", () => {
    view.key = "";
    choose(order.value);
  });
  turn.addEventListener("click", () => choose(view.key));
  addEventListener("hashchange", restore);
  controls.hidden = false;
  restore();
})();
