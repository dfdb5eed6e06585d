// Draws the pages that render_markdown.py wrote: node render_markdown.mjs WORK.json. No request leaves the machine.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const work = JSON.parse(readFileSync(process.argv[2], "utf8"));
const need = createRequire(join(work.packages, "package.json"));
const { chromium } = need("playwright-core");
const mermaid = join(work.packages, "node_modules/mermaid/dist/mermaid.min.js");

const browser = await chromium.launch({ executablePath: work.browser, args: ["--no-sandbox", "--disable-gpu"] });
let failed = false;
try {
  for (const { page: file, picture } of work.pages) {
    for (const scheme of ["light", "dark"]) await drawPage(file, picture, scheme);
  }
} finally {
  await browser.close();
}
process.exit(failed ? 1 : 0);

async function drawPage(file, picture, scheme) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, colorScheme: scheme });
  const page = await context.newPage();
  page.setDefaultTimeout(30_000);
  await context.route("**", (route) => (route.request().url().startsWith("file:") ? route.continue() : route.abort()));
  await page.goto(pathToFileURL(file).href);
  await drawCharts(page, scheme);
  const shut = scheme === "light" ? `${picture}.png` : `${picture}.dark.png`;
  await shoot(page, shut);
  const folds = await page.locator("details").count();
  const height = await page.evaluate(() => {
    const [fold, body] = [document.querySelector("details"), document.querySelector("main")];
    const bottom = fold ? fold.getBoundingClientRect().top : body.getBoundingClientRect().bottom;
    return Math.round(bottom - body.getBoundingClientRect().top);
  });
  if (scheme === "light") console.error(`${shut}: ${height} px ${folds ? "before the folds" : "high"}`);
  if (folds) {
    await page.evaluate(() => document.querySelectorAll("details").forEach((one) => (one.open = true)));
    await shoot(page, scheme === "light" ? `${picture}.open.png` : `${picture}.open.dark.png`);
  }
  await context.close();
}

async function drawCharts(page, scheme) {
  if (!(await page.locator("pre.mermaid").count())) return;
  await page.addScriptTag({ path: mermaid });
  const wrong = await page.evaluate(async (theme) => {
    window.mermaid.initialize({ startOnLoad: false, theme, securityLevel: "strict" });
    try {
      await window.mermaid.run({ querySelector: "pre.mermaid" });
    } catch (error) {
      return String(error.message ?? error).replaceAll("\n", " ");
    }
  }, scheme === "light" ? "default" : "dark");
  if (wrong) {
    failed = true;
    console.error(`a chart is broken: ${wrong}`);
  }
}

async function shoot(page, path) {
  await page.screenshot({ path, fullPage: true });
  console.log(path);
}
