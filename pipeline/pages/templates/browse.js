// A table over columns of data, with a filter, sorting and pages; rows that can be opened answer to clicks and keys.

const PAGE_ROWS = 20;

// Words that a row must hold, and comparisons with a column, as in: tokens>500 kind=copy
function wanted(columns, text) {
  const tests = text.toLowerCase().split(/\s+/).filter(Boolean).map((term) => {
    const compared = term.match(/^(.+?)(<=|>=|<|>|=)(.+)$/);
    const column = compared && columns.find((one) => one.name.toLowerCase().replace(/\s/g, "-").startsWith(compared[1]));
    if (!column) return (row) => columns.some((one) => String(one.value(row)).toLowerCase().includes(term));
    const [, , sign, right] = compared;
    return (row) => {
      const value = column.value(row);
      if (value === null) return false;
      if (sign === "=") return typeof value === "number" ? value === Number(right) : String(value).toLowerCase().includes(right);
      const number = Number(right);
      return sign === "<" ? value < number : sign === ">" ? value > number : sign === "<=" ? value <= number : value >= number;
    };
  });
  return (row) => tests.every((test) => test(row));
}

function written(value) {
  if (value === null) return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  return typeof value === "number" ? value.toLocaleString("en", { maximumFractionDigits: 3 }) : value;
}

function browse(root, columns, count, canOpen, open) {
  const body = root.querySelector("tbody"), heads = [...root.querySelectorAll("thead th")];
  const said = root.querySelector(".count"), filter = root.querySelector("input");
  const [back, forward] = root.querySelectorAll(".pages button");
  let rows = [...Array(count).keys()], sorted = null, up = true, page = 0, opened = null;

  function arrange() {
    const keep = wanted(columns, filter.value);
    rows = [...Array(count).keys()].filter(keep);
    if (sorted !== null) {
      const value = columns[sorted].value;
      rows.sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        return (x === null || y === null || up ? 1 : -1) * byValue(x, y) || a - b;
      });
    }
    page = 0;
    draw();
  }

  function draw() {
    const pages = Math.max(1, Math.ceil(rows.length / PAGE_ROWS));
    const part = rows.slice(page * PAGE_ROWS, (page + 1) * PAGE_ROWS);
    body.replaceChildren(...part.map((row) => {
      const line = document.createElement("tr");
      columns.forEach((column) => {
        const value = column.value(row), cell = line.insertCell();
        cell.textContent = written(value);
        if (typeof value === "number") cell.dataset.value = value;
      });
      line.dataset.row = row;
      if (canOpen(row)) {
        line.tabIndex = 0;
        line.className = "opens";
      }
      if (row === opened) line.setAttribute("aria-current", "true");
      return line;
    }));
    said.textContent = `${rows.length.toLocaleString("en")} of ${count.toLocaleString("en")}, page ${page + 1} of ${pages.toLocaleString("en")}`;
    back.disabled = page === 0;
    forward.disabled = page + 1 >= pages;
  }

  function choose(row, turn = true) {
    opened = row;
    if (turn && rows.includes(row)) page = Math.floor(rows.indexOf(row) / PAGE_ROWS);
    draw();
    open(row);
  }

  // The next row that can be opened, in the order shown.
  function move(step) {
    const all = rows.filter(canOpen), at = all.indexOf(opened);
    if (all.length) choose(all[at < 0 ? 0 : Math.max(0, Math.min(all.length - 1, at + step))]);
  }

  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    up = sorted === column ? !up : true;
    sorted = column;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    arrange();
  }));
  filter.addEventListener("input", arrange);
  back.addEventListener("click", () => { page -= 1; draw(); });
  forward.addEventListener("click", () => { page += 1; draw(); });
  body.addEventListener("click", (event) => {
    const line = event.target.closest("tr.opens");
    if (line) choose(Number(line.dataset.row), false);
  });
  body.addEventListener("keydown", (event) => {
    const line = event.target.closest("tr.opens"), step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!line || (step === undefined && event.key !== "Enter" && event.key !== " ")) return;
    event.preventDefault();
    if (step === undefined) {
      choose(Number(line.dataset.row), false);
      body.querySelector("tr[aria-current]").focus({ preventScroll: true });
      return;
    }
    const lines = [...body.querySelectorAll("tr.opens")];
    lines[lines.indexOf(line) + step]?.focus();
  });
  arrange();
  return { move, choose };
}

// A view of tokens: its buttons and Page Up and Down change what is shown; arrow keys and the pointer read out a token.
function readTokens(root, move, describe) {
  const tokens = root.querySelector(".tokens"), reading = root.querySelector(".reading");
  let at = -1;

  function show(index) {
    const all = tokens.querySelectorAll("[data-i]");
    tokens.querySelector(".at")?.classList.remove("at");
    at = Math.max(0, Math.min(all.length - 1, index));
    if (!all[at]) return;
    all[at].classList.add("at");
    reading.textContent = describe(Number(all[at].dataset.i));
  }

  tokens.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    const turn = { PageUp: -1, PageDown: 1 }[event.key];
    if (step === undefined && turn === undefined) return;
    event.preventDefault();
    if (turn) move(turn);
    else {
      show(at + step);
      tokens.querySelector(".at")?.scrollIntoView({ block: "nearest" });
    }
  });
  const point = (event) => {
    const token = event.target.closest("[data-i]");
    if (token) show([...tokens.querySelectorAll("[data-i]")].indexOf(token));
  };
  tokens.addEventListener("pointerover", point);
  tokens.addEventListener("click", point);
  root.querySelectorAll("button[data-move]").forEach((button) =>
    button.addEventListener("click", () => move(Number(button.dataset.move))));
  return () => { at = -1; reading.textContent = ""; tokens.scrollTop = 0; };
}

function dataOf(id) {
  return JSON.parse(document.getElementById(id).textContent);
}

function element(name, className, text) {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}
