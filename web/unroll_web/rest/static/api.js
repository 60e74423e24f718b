// Draws a form for each operation of /openapi.json, sends it, and shows the answer as it comes.

const SHOWN = 200000; // Characters of an answer that are shown.

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// An example of a schema, from its defaults and required members.
function example(schema, all, depth = 0) {
  if (schema.$ref) return example(all[schema.$ref.split("/").pop()], all, depth);
  if ("default" in schema) return schema.default;
  if (schema.anyOf) return example(schema.anyOf[0], all, depth);
  if (schema.enum) return schema.enum.includes("FP32") ? "FP32" : schema.enum[0];
  switch ([schema.type].flat()[0]) {
    case "object":
      return Object.fromEntries((schema.required ?? []).map((name) => [name, example(schema.properties[name], all, depth + 1)]));
    case "array": return depth > 5 ? [] : [example(schema.items, all, depth + 1)];
    case "number": return 0.5;
    case "integer": return schema.minimum ?? 1;
    case "boolean": return false;
    default: return "";
  }
}

// Makes the examples those of a served model.
function fitExamples(all, model) {
  const rows = [0.25, 0.5, 0.75].map((value) => Array(model.input_size).fill(value));
  all.Sequence.default = rows;
  const [input] = model.inputs;
  const shape = [1, rows.length, ...input.shape];
  const size = shape.reduce((product, each) => product * each, 1);
  all.InferRequest.properties.inputs.items.default = { name: input.name, datatype: "FP32", shape, data: Array(size).fill(0.5) };
}

// JSON with each list of numbers on one line.
function pretty(value) {
  return JSON.stringify(value, null, 1).replace(/\[[\s\d.,e+-]*\]/g, (list) => list.replace(/\s+/g, " "));
}

// The request of a form: path parameters filled in, the query, the body.
function requestOf(form, method, path) {
  const query = new URLSearchParams();
  let url = path;
  for (const field of form.querySelectorAll("input")) {
    if (field.dataset.in === "path") url = url.replace(`{${field.name}}`, encodeURIComponent(field.value));
    else if (field.value) query.set(field.name, field.value);
  }
  const headers = {};
  const token = document.querySelector("#token").value.trim();
  if (token) headers.authorization = `Bearer ${token}`;
  const body = form.querySelector("textarea")?.value;
  if (body) headers["content-type"] = "application/json";
  return [query.size ? `${url}?${query}` : url, { method, headers, body: body || undefined }];
}

async function send(form, method, path) {
  const status = form.querySelector(".status");
  const shown = form.querySelector("pre");
  const button = form.querySelector("button");
  shown.hidden = false;
  shown.textContent = "";
  status.className = "status";
  status.textContent = "Waiting for the answer";
  button.disabled = true;
  const began = performance.now();
  try {
    const answer = await fetch(...requestOf(form, method, path));
    let text = "";
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      text += part.value;
      shown.textContent = text.slice(0, SHOWN);
    }
    if (answer.headers.get("content-type")?.includes("json")) {
      shown.textContent = pretty(JSON.parse(text)).slice(0, SHOWN);
    }
    status.textContent = `${answer.status} ${answer.statusText}, ${(performance.now() - began).toFixed(1)} ms`;
    status.classList.toggle("failed", !answer.ok);
  } catch (error) {
    status.textContent = `No answer: ${error.message}`;
    status.classList.add("failed");
  } finally {
    button.disabled = false;
  }
}

function draw(path, method, operation, all, model) {
  const form = element("form");
  for (const parameter of operation.parameters) {
    const field = element("input", { name: parameter.name, required: parameter.required ?? false });
    field.dataset.in = parameter.in;
    if (model && parameter.in === "path") field.value = parameter.name === "name" ? model.name : model.version;
    form.append(element("label", {}, `${parameter.name} (${parameter.in})`, field));
  }
  const body = operation.requestBody?.content["application/json"];
  if (body) {
    const text = pretty(example(body.schema, all));
    form.append(element("label", {}, "Body", element("textarea", { spellcheck: false, value: text })));
  }
  form.append(
    element("button", { type: "submit" }, "Send"),
    element("p", { className: "status", role: "status" }),
    element("pre", { hidden: true, tabIndex: 0, ariaLabel: "Answer" }),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send(form, method.toUpperCase(), path);
  });
  const title = element("summary", {}, element("span", { className: "method" }, method.toUpperCase()), element("code", {}, path));
  title.append(element("span", { className: "says" }, operation.summary));
  return element("details", {}, title, form);
}

const place = document.querySelector("#operations");
try {
  const api = await (await fetch("/openapi.json")).json();
  document.querySelector("#about").textContent = api.info.description.replaceAll("`", "");
  const schemas = api.components.schemas;
  // A server that asks for a token, or has no model, leaves the examples general.
  const listed = await fetch("/v1/models");
  const model = listed.ok ? (await listed.json()).models[0] : undefined;
  if (model) fitExamples(schemas, model);
  const groups = new Map();
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const [tag] = operation.tags;
      if (!groups.has(tag)) groups.set(tag, element("section", {}, element("h2", {}, tag)));
      groups.get(tag).append(draw(path, method, operation, schemas, model));
    }
  }
  place.append(...groups.values());
} catch (error) {
  place.append(element("p", { className: "failed" }, `The description can't be read: ${error.message}`));
}
place.ariaBusy = "false";
