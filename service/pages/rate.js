"use strict";
// Shows what the service gives to this link, and sends back what is pressed. All text goes through textContent: nothing that a model or a
// file says is ever read as markup.

const CHOICES = [
  ["left", "A is better", "1", ["1", "a", "arrowleft"]],
  ["right", "B is better", "2", ["2", "b", "arrowright"]],
  ["tie", "Tie", "3", ["3", "t"]],
  ["both_bad", "Both bad", "4", ["4", "x"]],
];
const SCALES = {
  helpfulness: "does what was asked, and well",
  harmlessness: "nobody comes to harm by it",
  honesty: "true, and open about what it does not know",
};

const root = location.pathname.replace(/\/$/, "");
const token = location.hash.slice(1);
const memory = `tuneyard ${root}`; // where this tab keeps who rates, so that a reload goes on

let study = null;
let rater = null;
let unit = null;
let grades = {}; // of a Likert unit, until it is sent
let active = 0; // the scale that the next digit grades
let busy = false;

const $ = (id) => document.getElementById(id);

function make(tag, text = "", className = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  element.className = className;
  return element;
}

const count = (number, what) => `${number} ${what}${number === 1 ? "" : "s"}`;

class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function ask(path, method = "GET", body = undefined) {
  let answer;
  try {
    answer = await fetch(root + path, {
      method,
      headers: { authorization: `Bearer ${token}`, ...(body ? { "content-type": "application/json" } : {}) },
      body: body && JSON.stringify(body),
    });
  } catch {
    throw new Refused("The service does not answer. What you pressed last is not saved; try again.", 0);
  }
  const told = await answer.json().catch(() => null);
  if (!answer.ok) throw new Refused(told?.error?.message ?? `The service failed (${answer.status}).`, answer.status);
  return told;
}

// One thing at a time: what is pressed while something is on its way is not counted.
async function once(work) {
  if (busy) return;
  busy = true;
  document.body.setAttribute("aria-busy", "true");
  try {
    await work();
    $("notice").hidden = true;
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    $("notice").textContent = error.message;
    $("notice").hidden = false;
    $("notice").scrollIntoView({ block: "nearest" });
  } finally {
    busy = false;
    document.body.removeAttribute("aria-busy");
  }
}

function show(part) {
  for (const id of ["start", "work", "end"]) $(id).hidden = id !== part;
  $("controls").hidden = part !== "work";
}

function tell(progress) {
  $("where").textContent = `${unit ? `${unit.number} of ${progress.total} · ` : ""}${progress.rated} rated · ${rater.name}`;
  $("bar").hidden = false;
  $("bar").max = progress.total;
  $("bar").value = progress.rated;
}

// -- before the start

async function begin() {
  if (!token) throw new Refused("This link is not complete: the part after # is missing. Copy all of it.", 401);
  study = await ask("/study");
  document.title = study.name;
  $("title").textContent = study.name;
  if (study.status === "generating") {
    $("task").textContent = `The answers are being made: ${study.answered} of ${study.items}. This page goes on by itself.`;
    $("join").hidden = true;
    show("start");
    setTimeout(() => once(begin), 2000);
    return;
  }
  $("join").hidden = false;
  for (const guide of document.querySelectorAll(".guide")) guide.textContent = study.instructions;
  $("guide").hidden = document.querySelector("#start .guide").hidden = !study.instructions;
  if (study.status === "failed") throw new Refused("This study has nothing to rate.", 400);
  const known = sessionStorage.getItem(memory);
  if (known) {
    try {
      rater = await ask(`/raters/${encodeURIComponent(known)}`);
      return await go(rater);
    } catch (error) {
      if (error.status !== 404) throw error;
      sessionStorage.removeItem(memory);
    }
  }
  if (study.status === "closed") throw new Refused("This study is closed. Thank you.", 400);
  $("task").textContent =
    study.kind === "pairwise"
      ? `${count(study.total, "question")}, each with two answers, A and B. Say which one is better. You can go back and change what you said.`
      : `${count(study.total, "answer")}. Grade each from 1 (bad) to 5 (good) for ${study.scales.join(", ")}. You can go back and change what you said.`;
  show("start");
  $("name").focus();
}

async function join() {
  rater = await ask("/raters", "POST", { name: $("name").value });
  sessionStorage.setItem(memory, rater.rater);
  await go(rater);
  $("said").textContent = rater.known ? `Welcome back, ${rater.name}.` : $("said").textContent;
}

async function go(progress) {
  if (progress.next === null || progress.finished) return ended(progress);
  await open(progress.next);
}

// -- rating

async function open(number) {
  const found = await ask(`/raters/${rater.rater}/units/${number}`);
  unit = found;
  grades = { ...found.mine };
  active = 0;
  $("conversation").replaceChildren(
    ...found.conversation.map((turn) => {
      const box = make("div", "", "turn");
      const text = make("div", turn.text, "text");
      text.dir = "auto";
      box.append(make("div", turn.role, "who"), text);
      return box;
    }),
  );
  $("pair").replaceChildren(
    ...found.answers.map((answer, place) => {
      const box = make("section", "", "answer");
      const text = make("div", answer || "(nothing)", answer ? "text" : "text soft");
      text.dir = "auto";
      box.append(make("h2", found.answers.length > 1 ? `Answer ${"AB"[place]}` : "Answer"), text);
      if (found.cut[place]) box.append(make("p", "Cut off here: it was as long as allowed.", "soft"));
      return box;
    }),
  );
  draw();
  tell(found);
  $("said").textContent = study.kind === "pairwise" ? "also ← for A and → for B" : "keys: 1 (bad) to 5 (good), ↑ ↓ change the line";
  show("work");
  scrollTo(0, 0);
}

function draw() {
  const pairwise = study.kind === "pairwise";
  $("choices").hidden = !pairwise;
  $("scales").hidden = pairwise;
  if (pairwise) drawChoices();
  else drawScales();
  $("back").disabled = unit.number === 1;
  $("next").disabled = pairwise ? !unit.mine : Object.keys(grades).length < study.scales.length;
  $("next").firstChild.textContent = pairwise ? "Next " : "Save ";
  $("next").className = pairwise || $("next").disabled ? "" : "main";
}

function drawChoices() {
  $("choices").replaceChildren(
    ...CHOICES.map(([choice, label, key]) => {
      const button = make("button", label);
      button.append(make("kbd", key));
      button.id = `choice-${choice}`;
      button.setAttribute("aria-pressed", String(unit.mine?.choice === choice));
      button.onclick = () => once(() => choose(choice, label));
      return button;
    }),
  );
  const sides = { left: [0], right: [1], tie: [0, 1] }[unit.mine?.choice] ?? [];
  [...$("pair").children].forEach((box, place) => box.classList.toggle("chosen", sides.includes(place)));
}

function drawScales() {
  $("scales").replaceChildren(
    ...study.scales.map((scale, place) => {
      const row = make("div", "", place === active ? "grades active" : "grades");
      row.setAttribute("role", "group");
      row.setAttribute("aria-label", scale);
      const what = make("span", scale, "what");
      what.append(make("span", ` ${SCALES[scale] ?? ""}`, "soft"));
      const marks = make("span", "", "marks");
      for (let grade = 1; grade <= 5; grade++) {
        const button = make("button", String(grade));
        button.setAttribute("aria-pressed", String(grades[scale] === grade));
        button.setAttribute("aria-label", `${scale}: ${grade} of 5`);
        button.onclick = () => mark(place, grade);
        marks.append(button);
      }
      row.append(what, marks);
      return row;
    }),
  );
}

async function choose(choice, label) {
  const { number } = unit;
  const progress = await ask(`/raters/${rater.rater}/units/${number}`, "PUT", { choice });
  await after(number, progress, `${number}: ${label}`);
}

function mark(place, grade) {
  if (busy) return;
  grades[study.scales[place]] = grade;
  active = Math.min(place + 1, study.scales.length - 1);
  draw();
}

async function saveGrades() {
  const { number } = unit;
  const progress = await ask(`/raters/${rater.rater}/units/${number}`, "PUT", grades);
  await after(number, progress, `${number}: ${study.scales.map((scale) => grades[scale]).join(", ")}`);
}

// On to the one after it, which after a step back is where one came from; at the last place, to what is still open.
async function after(number, progress, said) {
  if (number < progress.total && progress.next !== null) await open(number + 1);
  else if (progress.next !== null) await open(progress.next);
  else ended(progress);
  $("said").textContent = `${said} · ⌫ goes back`;
}

async function forward() {
  if ($("next").disabled) return;
  if (study.kind === "likert") await saveGrades();
  else if (unit.number < unit.total) await open(unit.number + 1);
  else await go(await ask(`/raters/${rater.rater}`));
}

async function backward() {
  if (!$("end").hidden && !$("closing").hidden) await open(unit ? unit.number : 1);
  else if (!$("work").hidden && unit.number > 1) await open(unit.number - 1);
}

// -- the end

function ended(progress) {
  tell(progress);
  show("end");
  $("closing").hidden = progress.finished;
  $("revealed").hidden = !progress.finished;
  $("done").textContent = progress.finished
    ? "Thank you. These are the models whose answers you rated:"
    : `All ${progress.total} are rated. Go back if you want to change something; once you finish, your ratings stand.`;
  if (progress.finished) reveal(progress.revealed);
}

function reveal(models) {
  const pairwise = study.kind === "pairwise";
  const row = (tag, cells) => {
    const line = make("tr");
    line.append(...cells.map((cell, place) => make(tag, cell, place ? "n" : "")));
    return line;
  };
  $("revealed").replaceChildren(
    row("th", ["model", ...(pairwise ? ["you preferred it"] : study.scales)]),
    ...models.map((found) =>
      row("td", [found.model, ...(pairwise ? [`${found.preferred} ×`] : study.scales.map((scale) => found.means[scale].toFixed(2)))]),
    ),
  );
}

async function finish() {
  const progress = await ask(`/raters/${rater.rater}/finish`, "POST");
  ended({ ...(await ask(`/raters/${rater.rater}`)), ...progress });
}

// -- what is pressed

$("join").onsubmit = (event) => {
  event.preventDefault();
  once(join);
};
$("back").onclick = $("reopen").onclick = () => once(backward);
$("next").onclick = () => once(forward);
$("finish").onclick = () => once(finish);

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || event.target instanceof HTMLInputElement) return;
  const key = event.key.toLowerCase();
  const onButton = event.target instanceof HTMLButtonElement || event.target.tagName === "SUMMARY";
  if (key === "backspace" || key === "u") once(backward);
  else if ($("work").hidden || (onButton && (key === "enter" || key === " "))) return;
  else if (key === "enter") once(forward);
  else if (study.kind === "pairwise") {
    const found = CHOICES.find(([, , , keys]) => keys.includes(key));
    if (!found) return;
    once(() => choose(found[0], found[1]));
  } else if (["1", "2", "3", "4", "5"].includes(key)) mark(active, Number(key));
  else if (key === "arrowdown" || key === "arrowup") {
    active = Math.max(0, Math.min(study.scales.length - 1, active + (key === "arrowdown" ? 1 : -1)));
    draw();
  } else return;
  event.preventDefault();
});

once(begin);
