"""What the browser tests do on the demo's page, and read from it."""

SIDES = tuple(f"#lp-answers section[aria-label={side}]" for side in ("Original", "Compressed"))
SAMPLING = ["max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed"]
TEACHER = "The old man looked out of the window and"
WATCH = """() => {
    window.lengths = {};
    const look = () => document.querySelectorAll('#lp-answers section').forEach(card =>
        (window.lengths[card.ariaLabel] ??= new Set()).add(card.querySelector('.lp-words')?.textContent.length));
    new MutationObserver(look).observe(document.body, {childList: true, subtree: true, characterData: true});
}"""
"""Remember every length that the answers have had."""
CONTRAST = """element => {
  const parse = color => {
    const [r, g, b, a = 1] = (color.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number)
    return [r, g, b, a]
  }
  const layers = []
  for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor))
  let background = [255, 255, 255]
  for (const [r, g, b, a] of layers.reverse())
    background = [r, g, b].map((v, i) => a * v + (1 - a) * background[i])
  const linear = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b)
  const both = [light(parse(getComputedStyle(element).color)), light(background)]
  return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05)
}"""
"""The contrast of an element's text against its background, as WCAG defines it."""


def ask(page, prompt=TEACHER):
    page.fill("#lp-prompt textarea", prompt)
    page.click("#lp-run")


def words(page, side):
    return page.locator(f"{SIDES[side]} .lp-words").inner_text()


def facts(page, side):
    cells = page.locator(f"{SIDES[side]} dl div").all_inner_texts()
    return dict(cell.split("\n") for cell in cells)


def set_sampling(page, name, value):
    fields = page.locator("#lp-sampling input[type=number]")
    if not fields.first.is_visible():
        page.click("#lp-sampling button")
    field = fields.nth(SAMPLING.index(name))
    for _ in range(20):  # a page that has not drawn all of it yet takes the value back
        field.fill(str(value))
        field.press("Tab")
        page.wait_for_timeout(500)
        if field.input_value() == str(value):
            return
    raise AssertionError(f"{name} is {field.input_value()}, not {value}")
