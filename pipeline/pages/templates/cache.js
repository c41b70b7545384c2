// The table of samples, and the view of one: its tokens in place, with mask, anchors and norms.
(() => {
  const table = dataOf("table-data"), samples = dataOf("shown-data");
  const view = document.getElementById("sample"), box = view.querySelector(".tokens");
  const layer = document.getElementById("layer");
  const layerIds = [...layer.options].map((option) => option.textContent);
  const number = (row) => (table.sample ? table.sample[row] : row);
  const place = new Map(samples.map((one, i) => [one.sample, i]));
  const columns = [
    { name: "sample", value: number },
    { name: "source", value: (row) => table.sources[table.source[row]] },
    ...["row", "answer", "tokens", "supervised", "anchors", "shard"].filter((name) => table[name]).map((name) => ({ name, value: (row) => table[name][row] })),
    { name: "opens", value: (row) => (place.has(number(row)) ? "yes" : "no") },
  ];
  let sample = null;

  function colour() {
    const norms = sample.norms && sample.norms[layer.value];
    const [least, most] = norms ? norms.reduce(([a, b], v) => [v > 0 ? Math.min(a, v) : a, Math.max(b, v)], [Infinity, 0]) : [0, 0];
    const span = Math.log(most / least);
    view.querySelector(".scale").hidden = !norms;
    view.querySelector(".least").textContent = norms ? `norm ${written(least)}` : "";
    view.querySelector(".most").textContent = norms ? written(most) : "";
    for (const token of box.children) {
      const norm = norms ? norms[token.dataset.i] : 0;
      token.style.setProperty("--v", norm > 0 && span > 0 ? (Math.log(norm / least) / span).toFixed(3) : 0);
    }
  }

  function open(row) {
    sample = samples[place.get(number(row))];
    view.hidden = false;
    view.querySelector("h3").textContent = `Sample ${sample.sample}, ${columns[1].value(row)}:${table.row[row]}` +
      (table.answer?.[row] ? `, answer ${table.answer[row]}` : "");
    const supervised = table.supervised[row], part = sample.ids.length < sample.tokens ? `, the first ${sample.ids.length} shown` : "";
    view.querySelector(".summary").textContent =
      `${sample.tokens} tokens${part}; ${supervised} supervised; ${table.anchors[row]} anchors; shard ${table.shard[row]}` +
      (sample.norms ? "" : `; no norms: ${sample.no_features}`);
    box.replaceChildren(...sample.texts.map((text, i) => {
      const kind = !sample.mask[i] ? "" : sample.anchors[i] ? "anchor" : "tail";
      const token = element("span", `token norm ${kind}`, text === "" ? "◦" : text);
      token.dataset.i = i;
      return token;
    }));
    colour();
    reset();
  }

  function describe(i) {
    const kind = !sample.mask[i] ? "not supervised" : sample.anchors[i] ? "supervised, can anchor a block" : "supervised, too near the end";
    const norms = sample.norms ? layerIds.map((id, l) => `layer ${id} ${written(sample.norms[l][i])}`).join(" · ") : "none";
    return `position ${i}, token ${sample.ids[i]}, slot ${sample.start + i}: ${kind}; norms: ${norms}`;
  }

  const list = browse(document.getElementById("samples"), columns, table.count, (row) => place.has(number(row)), open);
  const reset = readTokens(view, list.move, describe);
  layer.addEventListener("change", () => sample && colour());
  list.move(0);
})();
