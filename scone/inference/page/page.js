// The page's behaviour. Whatever comes from a model goes into text nodes only, never into markup.
"use strict";

const $ = (id) => document.getElementById(id);
const LONGEST_COLOUR = 5;
let tokens = [], latest = 0, modelName = "", running = null;

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function shown(text) {
  return text.replaceAll("\r", "␍").replaceAll("\n", "⏎\n").replaceAll("\t", "⇥");
}

function shownInLine(text) {
  return text.replaceAll("\r", "␍").replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "·");
}

function complain(error) {
  $("error").textContent = error ? String(error.message || error) : "";
  $("error").hidden = !error;
}

async function ask(path, body, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  const init = body === undefined ? { headers } : { method: "POST", headers, body: JSON.stringify(body) };
  const response = await fetch(path, { ...init, ...options });
  if (response.status === 401) $("key-field").hidden = false;
  if (!response.ok) {
    const answer = await response.json().catch(() => null);
    throw new Error(answer?.error?.message || `the server answered ${response.status}`);
  }
  return response;
}

// ---------------------------------------------------------------- tokens

function colour(length) {
  return length > 1 ? `length-${Math.min(length, LONGEST_COLOUR)}` : "length-1";
}

function drawLegend(maxN) {
  const lengths = Array.from({ length: Math.max(1, Math.min(maxN, LONGEST_COLOUR)) }, (_, index) => index + 1);
  $("legend").replaceChildren(...lengths.map((length) => {
    const more = length === LONGEST_COLOUR && maxN > length ? " or more" : "";
    const name = length === 1 ? "no f-gram" : `f-gram of ${length}${more}`;
    return element("span", {}, element("i", { className: `token ${colour(length)}` }), name);
  }));
}

function drawTokens() {
  $("tokens").replaceChildren(...tokens.map((token, index) => {
    const span = element("span", { className: `token ${colour(token.match_length)}`, tabIndex: 0 }, shown(token.text));
    span.addEventListener("mouseenter", () => choose(index));
    span.addEventListener("focus", () => choose(index));
    return span;
  }));
  const matched = tokens.filter((token) => token.match_length > 1);
  const mean = matched.reduce((sum, token) => sum + token.match_length, 0) / (matched.length || 1);
  $("summary").textContent = tokens.length
    ? `${matched.length} of ${tokens.length} tokens end an f-gram` +
      (matched.length ? `, ${mean.toFixed(2)} tokens long on average.` : ".")
    : "";
}

function choose(index) {
  const token = tokens[index];
  [...$("tokens").children].forEach((span, place) => {
    span.classList.toggle("part", place <= index && place > index - token.match_length);
    span.classList.toggle("chosen", place === index);
  });
  const facts = token.rank === null || token.rank === undefined
    ? "No f-gram ends here: the token's own embedding is used."
    : `${token.match_length} tokens · rank ${token.rank.toLocaleString("en")} · ` +
      `${token.count.toLocaleString("en")} times in the corpus`;
  $("f-gram").replaceChildren(
    element("p", { className: "name" }, shownInLine(token.f_gram_text ?? token.text)),
    element("p", { className: "quiet" }, facts),
  );
}

// ---------------------------------------------------------------- asking

async function look() {
  const mine = ++latest;
  const text = $("text").value;
  try {
    const found = await (await ask("page/inspect", { text })).json();
    if (mine !== latest) return;
    complain(null);
    tokens = found.tokens;
    drawTokens();
    const longest = tokens.reduce((best, token, index) => (token.match_length > tokens[best].match_length ? index : best), 0);
    if (tokens.length) choose(longest);
  } catch (error) { if (mine === latest) complain(error); }
}

async function generate() {
  if (running) return running.abort();
  running = new AbortController();
  $("generate").textContent = "Stop";
  $("take").disabled = true;
  const written = element("span", { id: "written" });
  $("output").replaceChildren(element("span", { className: "prompt" }, $("text").value), written);
  try {
    const body = {
      model: modelName, prompt: $("text").value, stream: true,
      max_tokens: Number($("max-tokens").value), temperature: Number($("temperature").value),
    };
    const response = await ask("v1/completions", body, { signal: running.signal });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let waiting = "";
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      const events = (waiting + part.value).split("\n\n");
      waiting = events.pop();
      for (const event of events) {
        if (event === "data: [DONE]") continue;
        const chunk = JSON.parse(event.slice(6));
        if (chunk.error) throw new Error(chunk.error.message);
        written.append(chunk.choices[0]?.text ?? "");
      }
    }
    complain(null);
  } catch (error) { if (error.name !== "AbortError") complain(error); }
  running = null;
  $("generate").textContent = "Generate";
  $("take").disabled = !written.textContent;
}

async function start() {
  try {
    const about = (await (await ask("v1/models")).json()).data[0];
    modelName = about.id;
    const frequent = about.f_grams ? `${about.f_grams.toLocaleString("en")} f-grams of 2 to ${about.max_n} tokens` : "no f-grams";
    $("about").textContent = `${modelName} · ${frequent} · ${about.table ?? "no table"}`;
    drawLegend(about.max_n);
    await look();
  } catch (error) { complain(error); }
}

let typing = 0;
$("text").addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(look, 250); });
$("generate").addEventListener("click", generate);
$("take").addEventListener("click", () => { $("text").value += $("written").textContent; look(); });
$("key").addEventListener("change", start);
start();
