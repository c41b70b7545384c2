// What a person would see and mind, asked of a page. Each function returns one line for everything it minds.

// Text that has less than 4.5:1 contrast to what lies behind it.
function contrast() {
  // A mixed colour is written as color(srgb r g b / a) with parts from 0 to 1.
  const parse = (text) => {
    const parts = (text.match(/[\d.e-]+/g) || []).map(Number).filter((part) => !Number.isNaN(part));
    return text.startsWith("color(") ? parts.map((part, i) => (i < 3 ? part * 255 : part)) : parts;
  };
  const part = (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  // Layers of half-transparent colour are mixed, the undermost first.
  const paper = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.unshift(parse(getComputedStyle(e).backgroundColor));
    return layers.reduce((under, [r, g, b, a = 1]) => under.map((c, i) => c * (1 - a) + [r, g, b][i] * a), [255, 255, 255]);
  };
  const poor = new Set();
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || !e.getClientRects().length) continue;
    if (e.closest("script, style, :disabled")) continue;
    const style = getComputedStyle(e), ink = parse(e.closest("svg") ? style.fill : style.color);
    const [low, high] = [light(ink), light(paper(e))].sort((x, y) => x - y);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) poor.add(`${e.tagName} ${e.getAttribute("class")} ${ratio.toFixed(2)}: ${e.textContent.slice(0, 30)}`);
  }
  return [...poor];
}

// Labels of plots that are cut off by the plot's edge, or lie over one another.
function clipped() {
  const poor = [];
  for (const svg of document.querySelectorAll("svg")) {
    const box = svg.getBoundingClientRect();
    if (!box.width) continue;
    const texts = [...svg.querySelectorAll("text")].map((t) => [t.getBoundingClientRect(), t.textContent]);
    for (const [r, text] of texts) {
      const outside = r.left < box.left - 1 || r.right > box.right + 1 || r.top < box.top - 1 || r.bottom > box.bottom + 1;
      if (outside) poor.push(`clipped: ${text}`);
    }
    texts.forEach(([a, first], i) => texts.slice(i + 1).forEach(([b, second]) => {
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (across > 1 && down > 3) poor.push(`overlap: ${first} / ${second}`);
    }));
  }
  return poor;
}

// What is wider than the window and cannot be scrolled to within a box of its own.
function spilled() {
  const root = document.documentElement, wide = root.clientWidth;
  const all = [...document.querySelectorAll("main *")].filter((e) => !e.closest(".scroll, svg, script"));
  const boxes = all.filter((e) => e.getBoundingClientRect().right > wide + 1 || (e.scrollWidth > e.clientWidth + 1 && e.clientWidth));
  const hidden = (e) => getComputedStyle(e).display === "inline" || getComputedStyle(e).overflowX === "auto";
  const poor = boxes.filter((e) => !hidden(e)).map((e) => `${e.tagName} ${e.className}`);
  return root.scrollWidth > wide ? [`the page scrolls sideways by ${root.scrollWidth - wide}`, ...poor] : poor;
}
