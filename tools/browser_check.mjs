// Looks at every page of the built documentation in a real browser, wide and as narrow as a phone.
//
//     make docs
//     mkdir -p runs/browser && cd runs/browser
//     npm install playwright-core @sparticuz/chromium
//     node ../../tools/browser_check.mjs ../../docs/_build/html screenshots [PAGE ...]
//
// The two packages bring a headless Chromium; they are looked for in the folder that the script is
// started from. CHROMIUM=/path/to/a/browser uses one that is installed. The site is served from this
// machine, and a request to any other is a failure, so what passes needs no network. A page fails
// for an error on its console, a file that does not load, a picture that is not drawn, a formula
// that MathJax has not set, or contents wider than the window. Screenshots are written to the
// folder that is named, to be looked at.

import { createServer } from "node:http";
import { createRequire } from "node:module";
import { mkdirSync, readdirSync, readFileSync } from "node:fs";
import { extname, join, relative, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [site, shots, ...only] = process.argv.slice(2);
if (!site || !shots) {
  console.error("usage: node browser_check.mjs SITE SCREENSHOTS [PAGE ...]");
  process.exit(2);
}

const WIDTHS = { wide: 1280, narrow: 390 };
const TYPES = {
  ".html": "text/html",
  ".css": "text/css",
  ".js": "text/javascript",
  ".mjs": "text/javascript",
  ".json": "application/json",
  ".svg": "image/svg+xml",
  ".png": "image/png",
  ".woff2": "font/woff2",
  ".woff": "font/woff",
};

const installed = createRequire(join(process.cwd(), "here.js"));
const load = async (name) => (await import(pathToFileURL(installed.resolve(name)).href)).default;
const { chromium } = await load("playwright-core");
const packed = process.env.CHROMIUM ? undefined : await load("@sparticuz/chromium");

const root = resolve(site);
const server = createServer((request, response) => {
  const path = decodeURIComponent(new URL(request.url, "http://localhost").pathname);
  try {
    const body = readFileSync(join(root, path));
    response.writeHead(200, { "Content-Type": TYPES[extname(path)] ?? "application/octet-stream" });
    response.end(body);
  } catch {
    response.writeHead(404).end();
  }
});
await new Promise((listening) => server.listen(0, "127.0.0.1", listening));
const origin = `http://127.0.0.1:${server.address().port}`;

const pages = readdirSync(root, { recursive: true })
  .map((file) => relative(root, join(root, file)))
  .filter((file) => file.endsWith(".html") && !/^(_modules|_static)/.test(file))
  .filter((file) => !only.length || only.some((page) => file.startsWith(page)))
  .sort();

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? (await packed.executablePath()),
  args: packed?.args ?? [],
});
mkdirSync(shots, { recursive: true });
const page = await browser.newPage();
let found = [];
page.on("console", (message) => message.type() === "error" && found.push(message.text()));
page.on("pageerror", (error) => found.push(String(error)));
page.on("requestfailed", (request) => found.push(`not loaded: ${request.url()}`));
page.on("response", (answer) => answer.status() >= 400 && found.push(`${answer.status()} ${answer.url()}`));
await page.route("**/*", (route) => {
  const url = route.request().url();
  if (url.startsWith(origin) || /^(data|blob):/.test(url)) return route.continue();
  found.push(`asks the network: ${url}`);
  return route.abort();
});

// What the page itself can say, once its pictures are asked for and its formulas are set.
async function inspect() {
  for (const image of document.images) image.loading = "eager";
  await Promise.all([...document.images].map((image) => image.decode().catch(() => {})));
  const formulas = document.querySelectorAll(".math").length;
  if (formulas) await window.MathJax?.startup?.promise;
  const undrawn = [...document.images].filter((image) => !image.naturalWidth).map((i) => i.src);
  const set = document.querySelectorAll(".math mjx-container").length;
  const wrong = document.querySelectorAll("mjx-merror, [data-mjx-error]").length;
  const width = document.documentElement.scrollWidth - window.innerWidth;
  return { formulas, set, wrong, undrawn, width };
}

let failures = 0;
for (const file of pages) {
  for (const [name, width] of Object.entries(WIDTHS)) {
    found = [];
    await page.setViewportSize({ width, height: 900 });
    await page.goto(`${origin}/${file}`, { waitUntil: "load", timeout: 300000 });
    const seen = await page.evaluate(inspect);
    if (seen.set < seen.formulas) found.push(`${seen.formulas - seen.set} formulas are not set`);
    if (seen.wrong) found.push(`${seen.wrong} formulas are wrong`);
    if (seen.undrawn.length) found.push(`pictures are not drawn: ${seen.undrawn.join(", ")}`);
    if (seen.width > 1) found.push(`${seen.width} pixels wider than the window`);
    const shot = join(shots, `${file.replace(/\.html$/, "").replaceAll("/", "-")}-${name}.png`);
    await page.screenshot({ path: shot, fullPage: true, timeout: 300000 });
    const what = `${seen.formulas} formulas, ${found.length ? found.join("; ") : "well"}`;
    console.log(`${file}, ${name}: ${what}`);
    failures += found.length > 0;
  }
}
await browser.close();
server.close();
console.log(`${pages.length} pages, ${failures} failures`);
process.exit(failures ? 1 : 0);
