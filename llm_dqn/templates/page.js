"use strict";
(() => {
  const readout = document.getElementById("readout");
  let anchor = null; // gives the rectangle that the readout belongs to

  function element(name, text, look) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (look) made.className = look;
    return made;
  }

  function number(value) {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    return value.toLocaleString("en-US", { maximumSignificantDigits: 4 }).replace("-", "−");
  }

  function signed(value) {
    return (value > 0 ? "+" : "") + number(value);
  }

  function show(content, where) {
    readout.replaceChildren(...content);
    anchor = where;
    readout.hidden = false;
    place();
  }

  function hide() {
    readout.hidden = true;
    anchor = null;
  }

  function place() {
    if (!anchor) return;
    const at = anchor();
    const { width, height } = readout.getBoundingClientRect();
    const room = document.documentElement.clientWidth;
    const left = Math.max(8, Math.min(at.left + at.width / 2 - width / 2, room - width - 8));
    const top = at.top - height - 12 > 4 ? at.top - height - 12 : at.bottom + 12;
    readout.style.transform = `translate(${Math.round(left)}px,${Math.round(top)}px)`;
  }

  addEventListener("scroll", place, { passive: true, capture: true });
  addEventListener("resize", place);
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
  });

  // --- charts: the values at the nearest point, by pointer or arrow keys ---

  const SVG = "http://www.w3.org/2000/svg";

  function drawn(name, attributes) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  function numbers(text) {
    return text === undefined ? undefined : text.split(" ").map((part) => (part === "-" ? NaN : Number(part)));
  }

  function follow(svg) {
    const [left, top, right, bottom, x0, x1, y0, y1] = numbers(svg.dataset.plot);
    const series = [...svg.querySelectorAll(".series")].map(({ dataset }) => ({
      label: dataset.label,
      kind: dataset.kind,
      half: Number(dataset.half || 0),
      x: numbers(dataset.x),
      y: numbers(dataset.y),
      low: numbers(dataset.low),
      high: numbers(dataset.high),
    }));
    const places = [...new Set(series.flatMap((one) => one.x))].sort((a, b) => a - b);
    const title = svg.querySelector("title");
    svg.setAttribute("aria-label", title.textContent + ". " + svg.querySelector("desc").textContent);
    title.remove(); // the browser's own tooltip would cover the readout
    svg.setAttribute("tabindex", "0");
    const marks = svg.appendChild(drawn("g", { "aria-hidden": "true" }));
    let index = places.length - 1;

    const across = (x) => left + ((x - x0) / (x1 - x0)) * (right - left);
    const up = (y) => bottom - ((y - y0) / (y1 - y0)) * (bottom - top);

    function look() {
      const x = places[index];
      const rows = [];
      marks.replaceChildren(drawn("path", { class: "cursor", d: `M${across(x)} ${top}V${bottom}` }));
      for (const one of series) {
        const i = one.x.indexOf(x);
        if (i < 0 || Number.isNaN(one.y[i])) continue;
        if (!one.half) marks.append(drawn("circle", { class: `at s${one.kind}`, cx: across(x), cy: up(one.y[i]), r: 4 }));
        const row = element("p");
        const swatch = drawn("svg", { class: "chart", viewBox: "0 0 22 8", "aria-hidden": "true" });
        swatch.append(drawn("path", { class: `line s${one.kind}`, d: "M0 4h22" }));
        const interval = one.low && !Number.isNaN(one.low[i]) ? ` (${number(one.low[i])} to ${number(one.high[i])})` : "";
        row.append(swatch, `${one.label} `, element("b", number(one.y[i])), interval);
        rows.push(row);
      }
      const half = series[0].half;
      const where = half ? `${number(x - half)} to ${number(x + half)}` : number(x);
      show([element("h4", `${svg.dataset.across}: ${where}`), ...rows], () => {
        const box = svg.getBoundingClientRect();
        const scale = box.width / svg.viewBox.baseVal.width;
        const at = box.left + across(x) * scale;
        return { left: at, width: 0, top: box.top + top * scale, bottom: box.top + bottom * scale };
      });
    }

    function leave() {
      marks.replaceChildren();
      hide();
    }

    function nearest(event) {
      const box = svg.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      const distance = (i) => Math.abs(across(places[i]) - at);
      index = places.reduce((best, _, i) => (distance(i) < distance(best) ? i : best), 0);
      look();
    }

    svg.addEventListener("pointermove", nearest);
    svg.addEventListener("pointerdown", nearest);
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("blur", leave);
    svg.addEventListener("focus", () => {
      if (svg.matches(":focus-visible")) look();
    });
    svg.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: places.length - 1 };
      if (!(event.key in moves)) return;
      event.preventDefault();
      index = Math.max(0, Math.min(moves[event.key], places.length - 1));
      look();
    });
  }

  document.querySelectorAll("svg.chart[data-plot]").forEach(follow);

  // --- heat maps: what the network thinks of a token, and where the base model would have gone ---

  const known = new WeakMap();

  function facts(token) {
    const map = token.closest(".heat");
    if (!known.has(map)) known.set(map, JSON.parse(map.querySelector("script").textContent));
    const { tokens, reward } = known.get(map);
    const [first, last = first] = token.dataset.i.split(" ").map(Number);
    return { tokens, reward, first, last };
  }

  function about({ tokens, reward }, i) {
    const [text, q, value, advantage, rank, baseRank, alternatives] = tokens[i];
    const ends = i + 1 === tokens.length;
    const after = ends ? reward : tokens[i + 1][2];
    const content = [element("h4", text ? `“${text}”` : "part of a character")];
    content.push(element("p", `advantage ${signed(advantage)}  ·  Q ${number(q)}`));
    if (after !== null) {
      const change = value === null ? "" : ` (${signed(after - value)})`;
      content.push(element("p", `value ${number(value)} → ${ends ? "reward " : ""}${number(after)}${change}`));
    }
    if (rank !== null) {
      content.push(element("p", `choice ${number(rank)} of the tuned model, ${number(baseRank)} of the base`, "dim"));
    }
    if (!alternatives.length) return content;
    const same = baseRank === 1;
    content.push(element("p", same ? "the base would have written the same; its likeliest:" : "the base would have written:", "dim"));
    const table = element("table");
    const head = table.createTHead().insertRow();
    for (const name of ["token", "base", "tuned", "Q"]) head.append(element("th", name));
    const body = table.createTBody();
    const percent = (share) => (share === null ? "–" : `${number(Math.round(share * 1000) / 10)} %`);
    for (const [other, base, tuned, otherQ] of alternatives) {
      const row = body.insertRow();
      const name = row.insertCell();
      name.append(element("bdi", other));
      for (const cell of [percent(base), percent(tuned), number(otherQ)]) row.append(element("td", cell));
    }
    content.push(table);
    return content;
  }

  function tell(token) {
    const all = facts(token);
    const content = [];
    if (all.last > all.first) content.push(element("p", `${all.last - all.first + 1} tokens make up this character`, "dim"));
    for (let i = all.first; i <= all.last; i++) content.push(...about(all, i));
    token.setAttribute("aria-describedby", "readout");
    show(content, () => token.getClientRects()[0] || token.getBoundingClientRect());
  }

  const tokenAt = (event) => (event.target instanceof Element ? event.target.closest(".heat .t") : null);
  const focused = () => (document.activeElement && document.activeElement.matches(".heat .t") ? document.activeElement : null);

  document.addEventListener("pointerover", (event) => tokenAt(event) && tell(tokenAt(event)));
  document.addEventListener("pointerout", (event) => {
    if (tokenAt(event)) focused() ? tell(focused()) : hide();
  });
  document.addEventListener("focusin", (event) => tokenAt(event) && tell(tokenAt(event)));
  document.addEventListener("focusout", (event) => tokenAt(event) && hide());
  document.addEventListener("keydown", (event) => {
    const token = tokenAt(event);
    if (!token) return;
    const forward = getComputedStyle(token.parentElement).direction === "rtl" ? "ArrowLeft" : "ArrowRight";
    const back = forward === "ArrowLeft" ? "ArrowRight" : "ArrowLeft";
    const goal = {
      [forward]: token.nextElementSibling,
      [back]: token.previousElementSibling,
      Home: token.parentElement.firstElementChild,
      End: token.parentElement.lastElementChild,
    }[event.key];
    if (!goal) return;
    event.preventDefault();
    token.tabIndex = -1;
    goal.tabIndex = 0;
    goal.focus();
  });
})();
