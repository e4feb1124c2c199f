"use strict";

// Pure part: reading the packed record. Tested with node where there is one.

function unpack(text) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

function readRecord(data) {
  const place = new Map(data.recorded.map((block, i) => [block, i]));
  const firsts = [0];  // key blocks of one head before each recorded query block
  for (const block of data.recorded) firsts.push(firsts[firsts.length - 1] + block + 1);
  const layers = data.layers.map((layer) => ({
    ...layer,
    thresholds: new Float32Array(unpack(layer.thresholds).buffer),
    shares: new Float32Array(unpack(layer.shares).buffer),
    true_shares: new Float32Array(unpack(layer.true_shares).buffer),
    kept: unpack(layer.kept),
  }));
  return { ...data, place, firsts, layers };
}

// Where head `head` of query block `query` begins; it has query + 1 key blocks.
function rowStart(record, layer, query, head) {
  return record.firsts[record.place.get(query)] * layer.heads + head * (query + 1);
}

function isKept(record, layer, query, head, block) {
  const at = rowStart(record, layer, query, head) + block;
  return ((layer.kept[at >> 3] >> (at & 7)) & 1) === 1;
}

function describe(record, layer, query, head, block) {
  const start = rowStart(record, layer, query, head), share = layer.shares[start + block];
  const forced = block === query ? "diagonal" : block === 0 ? "sink" : "";
  let rank = 1;
  for (let other = 1; other < query; other++) {
    const value = layer.shares[start + other];
    if (value > share || (value === share && other < block)) rank++;
  }
  return {
    kept: isKept(record, layer, query, head, block),
    forced,
    share: forced ? null : Math.exp(share),
    rank: forced ? null : rank,
    of: Math.max(0, query - 1),
    threshold: Math.exp(layer.thresholds[record.place.get(query) * layer.heads + head]),
    true_share: query === record.query_block ? layer.true_shares[head * (query + 1) + block] : null,
  };
}

// The (layer, head) pairs that are looked at; null stands for all.
function lookedAt(record, layerIndex, head) {
  const pairs = [];
  for (const layer of record.layers) {
    if (layerIndex !== null && layer.index !== layerIndex) continue;
    for (let h = 0; h < layer.heads; h++) if (head === null || h === head) pairs.push([layer, h]);
  }
  return pairs;
}

// Of each key block up to the query block: how many of the pairs kept it.
function countKept(record, pairs, query) {
  const counts = new Array(query + 1).fill(0);
  for (const [layer, head] of pairs)
    for (let block = 0; block <= query; block++) if (isKept(record, layer, query, head, block)) counts[block]++;
  return counts;
}

// From here on: the page.

function percent(share) {
  if (share === null) return "–";
  return share >= 0.0995 ? (100 * share).toFixed(0) + " %" : (100 * share).toPrecision(2) + " %";
}

function startPage() {
  const record = readRecord(JSON.parse(document.getElementById("data").textContent));
  const find = (id) => document.getElementById(id);
  const texts = [...document.querySelectorAll("#text span")], cells = [...document.querySelectorAll("#strip i")];
  const state = { layer: null, head: null, query: record.query_block, block: null };

  function option(select, value, label) {
    const item = document.createElement("option");
    item.value = value; item.textContent = label;
    select.append(item);
  }

  function fillHeads() {
    const select = find("head"), heads = Math.max(...record.layers.map((layer) => layer.heads));
    select.replaceChildren();
    option(select, "", "all");
    for (let head = 0; head < heads; head++)
      option(select, head, `${head} (KV group ${Math.floor(head / record.layers[0].group)})`);
  }

  function draw() {
    const pairs = lookedAt(record, state.layer, state.head), counts = countKept(record, pairs, state.query);
    let kept = 0;
    for (const count of counts) kept += count;
    for (const list of [texts, cells]) list.forEach((item, i) => {
      item.style.setProperty("--k", i <= state.query && pairs.length ? counts[i] / pairs.length : 0);
      item.className = i > state.query ? "ahead" : i === state.query ? "query" : "";
    });
    const first = state.query * record.block_tokens;
    const last = Math.min(first + record.block_tokens, record.prompt_tokens) - 1;
    find("said").textContent = `Query block ${state.query} (tokens ${first} to ${last}): ` +
      `${percent(kept / (pairs.length * counts.length))} of its ${counts.length} blocks kept` +
      (pairs.length > 1 ? `, over ${pairs.length} heads` : "");
    find("query").value = record.place.get(state.query);
    tell();
  }

  function cell(row, text, kind) {
    const item = document.createElement(kind || "td");
    item.textContent = text;
    row.append(item);
  }

  function tell() {
    const title = find("which"), body = find("why");
    body.replaceChildren();
    if (state.block === null) { title.textContent = "Point at a block of the text"; return; }
    const first = state.block * record.block_tokens;
    title.textContent = `Block ${state.block}, tokens ${first} to ` +
      (Math.min(first + record.block_tokens, record.prompt_tokens) - 1);
    if (state.block > state.query) { title.textContent += ": ahead of the query block"; return; }
    const hasTrue = state.query === record.query_block, head = document.createElement("tr");
    for (const name of ["Layer.head", "Kept", "Share", "Threshold", "Rank", ...(hasTrue ? ["True share"] : [])])
      cell(head, name, "th");
    body.append(head);
    for (const [layer, h] of lookedAt(record, state.layer, state.head)) {
      const found = describe(record, layer, state.query, h, state.block), row = document.createElement("tr");
      row.className = found.kept ? "kept" : "";
      cell(row, `${layer.index}.${h}`);
      cell(row, found.forced || (found.kept ? "yes" : "no"));
      cell(row, percent(found.share));
      cell(row, percent(found.threshold));
      cell(row, found.rank === null ? "–" : `${found.rank} of ${found.of}`);
      if (hasTrue) cell(row, percent(found.true_share));
      body.append(row);
    }
  }

  const numbered = (text) => (text === "" ? null : Number(text));
  option(find("layer"), "", "all");
  for (const layer of record.layers) option(find("layer"), layer.index, layer.index);
  fillHeads();
  find("query").max = record.recorded.length - 1;
  find("layer").addEventListener("change", (e) => { state.layer = numbered(e.target.value); draw(); });
  find("head").addEventListener("change", (e) => { state.head = numbered(e.target.value); draw(); });
  find("query").addEventListener("input", (e) => { state.query = record.recorded[Number(e.target.value)]; draw(); });
  for (const list of [texts, cells]) list.forEach((item, i) => {
    const point = () => { state.block = i; tell(); };
    item.addEventListener("mouseenter", point);
    item.addEventListener("focus", point);
  });
  texts.forEach((item, i) => item.addEventListener("dblclick", () => {
    if (record.place.has(i)) { state.query = i; draw(); }
  }));
  cells.forEach((item, i) => item.addEventListener("click", () => texts[i].scrollIntoView({ block: "center" })));
  draw();
}

if (typeof document !== "undefined" && document.getElementById("layer")) startPage();
if (typeof module !== "undefined") module.exports = { readRecord, describe, lookedAt, countKept, percent };
