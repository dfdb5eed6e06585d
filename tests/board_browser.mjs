// Opens the pages of the run board in Chromium and tells what a person would see: node board_browser.mjs WORK.json.
// Prints one JSON object; every page is opened in a context of its own, and any request but for the file is aborted.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const work = JSON.parse(readFileSync(process.argv[2], "utf8"));
const { chromium } = createRequire(join(work.packages, "package.json"))("playwright-core");
const browser = await chromium.launch({ executablePath: work.browser, args: ["--no-sandbox", "--disable-gpu"] });
const DESK = { width: 1440, height: 1000 };
const PHONE = { width: 375, height: 812 };
const requests = [];
const errors = [];

async function open(name, { hash = "", viewport = DESK, scheme = "light", script = true } = {}) {
  const context = await browser.newContext({ viewport, colorScheme: scheme, javaScriptEnabled: script });
  const page = await context.newPage();
  page.setDefaultTimeout(20_000);
  const address = pathToFileURL(work.pages[name]).href;
  await context.route("**", (route) => (route.request().url() === address ? route.continue() : route.abort()));
  page.on("request", (request) => {
    if (request.url().split("#")[0] !== address) requests.push(`${name}: ${request.url()}`);
  });
  page.on("console", (message) => errors.push(`${name}: ${message.type()}: ${message.text()}`));
  page.on("pageerror", (error) => errors.push(`${name}: ${error}`));
  page.on("dialog", (dialog) => {
    errors.push(`${name}: dialog ${dialog.message()}`);
    dialog.dismiss();
  });
  await page.goto(address + hash);
  return page;
}

// The rows that are seen, from the top, by experiment and fingerprint.
const seen = (page) =>
  page.$$eval("#runs tbody tr", (rows) =>
    rows
      .filter((row) => row.getClientRects().length)
      .map((row) => row.querySelector("th").firstChild.textContent.trim() + " " + row.querySelector("code").textContent),
  );
const sorted = (page) => page.$$eval("thead [aria-sort]", (all) => all.map((one) => [one.dataset.order, one.ariaSort]));
const head = (page, name) => page.getByRole("columnheader", { name }).getByRole("button");
const address = (page) => page.evaluate(() => location.hash);
const overflow = (page) => page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
const picture = (page, name) => (work.pictures ? page.screenshot({ path: join(work.pictures, `${name}.png`) }) : null);

async function sorting() {
  const page = await open("season");
  const told = { first: [await seen(page), await sorted(page)] };
  await picture(page, "light");
  for (const name of ["Held-out loss", "Experiment", "Cost", "When", "State", "Made from"]) {
    await head(page, name).click();
    const once = [await seen(page), await sorted(page), await address(page)];
    await head(page, name).click();
    told[name] = [once, [await seen(page), await sorted(page), await address(page)]];
  }
  const cost = head(page, "Cost");
  await cost.focus();
  await page.keyboard.press("Enter");
  told.enter = [await seen(page), await sorted(page)];
  await page.keyboard.press("Space");
  told.space = [await seen(page), await sorted(page)];
  await page.getByLabel("Sort by").focus();
  await page.getByLabel("Sort by").selectOption("flavor");
  told.flavor = [await seen(page), await sorted(page), await address(page)];
  await page.keyboard.press("Tab");
  await page.keyboard.press("Enter"); // the button beside the list turns the order round
  told.turned = [await seen(page), await sorted(page), await address(page)];
  return told;
}

async function filtering() {
  const page = await open("season");
  const told = { status: [await page.getByRole("status").textContent()] };
  await page.getByRole("searchbox").fill("GEMMA  coach");
  told.words = [await seen(page), await address(page), await page.getByRole("status").textContent()];
  await page.getByRole("button", { name: /failed/ }).click();
  told.failed = [await seen(page), await address(page), await page.getByRole("status").textContent()];
  await head(page, "Cost").click();
  told.left = [await seen(page), await address(page)];
  const again = await open("season", { hash: told.left[1] });
  told.restored = [await seen(again), await address(again)];
  told.controls = [
    await again.getByRole("searchbox").inputValue(),
    await again.$$eval(".chip[aria-pressed=true]", (all) => all.map((one) => one.dataset.state)),
    await again.getByLabel("Sort by").inputValue(),
  ];
  await again.evaluate(() => (location.hash = "state=done,live"));
  await again.waitForFunction(() => document.querySelector("#filter").value === "");
  told.went = await seen(again);
  const odd = await open("season", { hash: "#sort=constructor&state=nonsense&q=%00&x=%E0%A4%A" });
  told.odd = [await seen(odd), await sorted(odd)];
  return told;
}

async function colours(scheme) {
  const page = await open("season", { scheme });
  await picture(page, scheme);
  return page.evaluate(() => {
    const of = (selector) => getComputedStyle(document.querySelector(selector));
    const texts = ["body", "h1", ".made", "dt", "tbody th a", "tbody th p", "small", "code", "thead button"];
    texts.push(".done td b", ".failed td b", ".live td b", ".blocked td b", ".cancelled td b", ".words", "span.e", ".better");
    const found = texts.filter((text) => document.querySelector(text));
    return { page: of("body").backgroundColor, text: Object.fromEntries(found.map((text) => [text, of(text).color])) };
  });
}

async function phone(name) {
  const page = await open(name, { viewport: PHONE });
  await picture(page, `phone-${name}`);
  // What lies off the screen is laid out only when it is looked at: look at all of it.
  const widest = await page.$$eval("#runs tbody tr", (rows) =>
    rows.map((row) => {
      row.style.contentVisibility = "visible";
      return Math.max(...[row, ...row.querySelectorAll("*")].map((one) => one.getBoundingClientRect().right));
    }),
  );
  const labels = await page.$$eval("#runs tbody tr:nth-child(4) td:not(:empty)", (cells) =>
    cells.map((cell) => getComputedStyle(cell, "::before").content.replaceAll('"', "")),
  );
  const small = await page.$$eval("button:not([hidden]), select", (all) =>
    all.filter((one) => one.getClientRects().length).map((one) => one.getBoundingClientRect().height),
  );
  return { overflow: await overflow(page), widest: Math.max(0, ...widest), labels, lowest: Math.min(...small) };
}

async function withoutScript() {
  const page = await open("season", { script: false });
  return { rows: await page.locator("#runs tbody tr").count(), controls: await page.locator("#controls").isVisible() };
}

async function hostile() {
  const page = await open("hostile");
  const told = await page.evaluate(() => ({
    hacked: window.hacked ?? null,
    tags: [...new Set([...document.querySelectorAll("body *")].map((one) => one.localName))].sort(),
    hrefs: [...document.querySelectorAll("a")].map((one) => one.getAttribute("href")),
    handlers: [...document.querySelectorAll("*")].flatMap((one) =>
      one.getAttributeNames().filter((name) => name.startsWith("on") || name === "style"),
    ),
    text: document.body.innerText,
    overflow: document.documentElement.scrollWidth - innerWidth,
  }));
  await picture(page, "hostile"); // last: the driver writes a style into the page to take it
  return told;
}

// What an injection would try, were one found: the policy forbids each of them.
async function policy() {
  const page = await open("empty");
  const before = [errors.length, requests.length];
  const told = await page.evaluate(async () => {
    const blocked = [];
    document.addEventListener("securitypolicyviolation", (event) => blocked.push(event.effectiveDirective));
    const add = (name, change) => document.body.append(Object.assign(document.createElement(name), change));
    add("script", { textContent: "window.hacked = 1" });
    add("style", { textContent: "body { color: red }" });
    add("img", { src: "http://127.0.0.1:9/a.png" });
    add("iframe", { src: "http://127.0.0.1:9/" });
    document.body.setAttribute("style", "color: red");
    await fetch("http://127.0.0.1:9/").catch(() => 0);
    await new Promise((resolve) => setTimeout(resolve, 100));
    return { blocked: [...new Set(blocked)].sort(), hacked: window.hacked ?? null };
  });
  errors.splice(before[0]); // the browser says that it has blocked them
  requests.splice(before[1]);
  return { ...told, main: await page.locator("main").innerText() };
}

async function thousand() {
  const page = await open("thousand");
  const times = await page.evaluate(() => {
    const button = () => document.querySelectorAll("thead button");
    return [...button(), ...button()].map((one) => {
      const start = performance.now();
      one.click();
      document.body.getBoundingClientRect(); // the layout is part of it
      return performance.now() - start;
    });
  });
  const start = Date.now();
  await page.getByRole("searchbox").fill("gemma");
  return { times, filter_ms: Date.now() - start, rows: (await seen(page)).length };
}

async function accessibility() {
  const page = await open("season");
  const session = await page.context().newCDPSession(page);
  const { nodes } = await session.send("Accessibility.getFullAXTree");
  const counts = {};
  const nameless = [];
  for (const node of nodes.filter((one) => !one.ignored)) {
    const role = node.role?.value;
    counts[role] = (counts[role] ?? 0) + 1;
    if (["button", "link", "searchbox", "combobox", "table"].includes(role) && !node.name?.value) nameless.push(role);
  }
  return { counts, nameless };
}

async function paper() {
  const page = await open("season");
  const pdf = await page.pdf({ preferCSSPageSize: true });
  await page.emulateMedia({ media: "print" });
  await page.setViewportSize({ width: 1040, height: 700 });
  await picture(page, "paper");
  return {
    bytes: pdf.length,
    controls: await page.locator("#controls").isVisible(),
    overflow: await overflow(page),
    table: await page.$eval("#runs", (table) => table.getBoundingClientRect().right),
    fold: await page.locator("details p, details li").first().isVisible(),
  };
}

async function widths() {
  const told = {};
  for (const width of [641, 800, 1024, 1280, 1440, 1920]) {
    const page = await open("season", { viewport: { width, height: 900 } });
    told[width] = await overflow(page);
    if (width === 1280) await picture(page, "laptop");
    await page.context().close();
  }
  return told;
}

try {
  const told = { sorting: await sorting(), filtering: await filtering(), light: await colours("light") };
  told.dark = await colours("dark");
  told.phone = await phone("season");
  told.narrow = await phone("hostile");
  told.plain = await withoutScript();
  told.hostile = await hostile();
  told.policy = await policy();
  told.thousand = await thousand();
  told.accessibility = await accessibility();
  told.paper = await paper();
  told.widths = await widths();
  console.log(JSON.stringify({ ...told, requests, errors }));
} finally {
  await browser.close();
}
