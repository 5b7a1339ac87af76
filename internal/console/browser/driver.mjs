// Drives a real Chromium for the console's tests. Each line on standard input is a JSON string:
// the body of an async function of (page, context, tools), whose JSON result is one line on
// standard output, as {"result"} or {"error"}. It ends with its input.
//
//   node driver.mjs CHROMIUM [CHROMIUM'S FLAG...]
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { createInterface } from 'node:readline'
import { chromium } from 'playwright-core'

const axe = readFileSync(createRequire(import.meta.url).resolve('axe-core/axe.min.js'), 'utf8')
const [executablePath, ...flags] = process.argv.slice(2)
const browser = await chromium.launch({ executablePath, args: ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', ...flags] })
const seen = { violations: [], hosts: new Set(), bodies: [] }

async function open(options = {}) {
  const context = await browser.newContext({ acceptDownloads: true, ...options })
  context.setDefaultTimeout(30_000)
  await context.exposeBinding('reportViolation', (_, text) => { seen.violations.push(text) })
  await context.addInitScript(() => {
    document.addEventListener('securitypolicyviolation', (e) => window.reportViolation(`${e.violatedDirective} ${e.blockedURI} on ${location.pathname}`))
  })
  context.on('request', (request) => seen.hosts.add(new URL(request.url()).host))
  context.on('console', (message) => {
    if (/Content Security Policy|TrustedHTML|TrustedScript/.test(message.text())) seen.violations.push(message.text())
  })
  context.on('weberror', (error) => seen.violations.push(String(error.error())))
  return context
}

const tools = {
  seen, open, browser,
  // What axe-core finds. It runs outside the page's own policy.
  async axe(page) {
    await page.evaluate(axe)
    const found = await page.evaluate(() => window.axe.run(document, { runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice'] }))
    return found.violations.map((v) => `${v.id}: ${v.nodes.map((n) => `${n.html.slice(0, 200)} ${n.failureSummary}`).join(' | ')}`)
  },
  // How far the page is wider than its window, and the first element that is.
  overflow: (page) => page.evaluate(() => {
    const width = document.documentElement.clientWidth
    const wide = [...document.querySelectorAll('body *')].find((e) => e.getBoundingClientRect().right > width + 1 && getComputedStyle(e).position !== "absolute" && !e.closest("thead"))
    return { by: document.documentElement.scrollWidth - width, element: wide?.outerHTML.slice(0, 200) ?? '' }
  }),
}

const context = await open()
const page = await context.newPage()
const AsyncFunction = (async () => {}).constructor
console.log(JSON.stringify({ result: browser.version() }))
for await (const line of createInterface({ input: process.stdin })) {
  let answer
  try {
    answer = { result: (await new AsyncFunction('page', 'context', 'tools', JSON.parse(line))(page, context, tools)) ?? null }
  } catch (error) {
    answer = { error: `${error.stack ?? error}\nat ${page.url()}` }
  }
  console.log(JSON.stringify(answer))
}
await browser.close()
