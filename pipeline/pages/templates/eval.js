// The list of prompts, and the view of one: its rounds, what was drafted in each, accepted, rejected, the target's own.
(() => {
  const view = document.getElementById("decoded");
  if (!view) return;
  const prompts = dataOf("prompts");
  const columns = [
    ["prompt", (p) => p.place],
    ["kind", (p) => p.kind],
    ["tokens", (p) => p.tokens],
    ["rounds", (p) => p.rounds.length],
    ["acceptance length", (p) => p.acceptance],
    ["accepted share", (p) => p.accepted_share],
    ["identical", (p) => p.identical],
  ].map(([name, value]) => ({ name, value: (row) => value(prompts[row]) }));
  const answer = view.querySelector(".tokens");
  let described = [];

  function token(kind, piece, id, text) {
    const made = element("span", `token ${kind}`, piece === "" ? "◦" : piece);
    made.dataset.i = described.length;
    described.push(`token ${id}, ${text}`);
    return made;
  }

  function block(round, number) {
    const made = element("span", `block ${number % 2 ? "odd" : "even"}`, "");
    const place = (slot, what) => `round ${number + 1}, slot ${slot + 1}: ${what}`;
    for (let slot = 0; slot < round.accepted; slot++)
      made.append(token("accepted", round.texts[slot], round.ids[slot], place(slot, "accepted")));
    if (round.accepted < round.texts.length) {
      const lost = element("span", "lost", "");
      for (let slot = round.accepted; slot < round.texts.length; slot++) {
        const rejected = slot === round.accepted && round.own !== null;
        const why = rejected ? "rejected" : round.own === null ? "after the answer's end" : "after a rejected token";
        // What is not part of the answer does not break its lines.
        const piece = round.texts[slot].replaceAll("\n", "");
        lost.append(token(rejected ? "rejected" : "unused", piece, round.ids[slot], place(slot, why)));
      }
      made.append(lost);
    }
    if (round.own !== null) made.append(token("own", round.own, round.own_id, `round ${number + 1}: the target's own`));
    return made;
  }

  function open(row) {
    const prompt = prompts[row];
    described = [];
    view.hidden = false;
    view.querySelector("h3").textContent = `${prompt.place}${prompt.kind === null ? "" : `, ${prompt.kind}`}`;
    view.querySelector(".summary").textContent =
      `${prompt.tokens} tokens in ${prompt.rounds.length} rounds, acceptance length ${written(prompt.acceptance)}` +
      (prompt.identical === false ? "; NOT the target's own answer" : "");
    view.querySelector(".prompt").textContent = prompt.text;
    const first = token("own", prompt.first, prompt.first_id, "the first: the prompt's own forward gives it");
    answer.replaceChildren(first, ...prompt.rounds.map(block));
    reset();
  }

  const list = browse(document.getElementById("prompt-list"), columns, prompts.length, () => true, open);
  const reset = readTokens(view, list.move, (i) => described[i]);
  document.getElementById("show-lost").addEventListener("change", (event) =>
    answer.classList.toggle("hide-lost", !event.target.checked));
  list.choose(0);
})();
