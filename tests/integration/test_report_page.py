"""The report in headless Chromium: sorted by mouse and keyboard, dark, on a phone, and nothing asked of the network.

Needs Debian's packages chromium and chromium-driver and the extra `browser` (selenium); skipped without them.
"""

import json
import shutil

import pytest
from report_files import eval_file, needle, score, write, write_all

from hybridlm.report import make_report, write_report

HOSTILE = "<script>document.title='run'</script><img src='https://example.com/x.png'>"


@pytest.fixture(scope="module")
def driver():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium (extra browser) is not installed")
    from selenium.webdriver.chrome.service import Service

    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("Debian's packages chromium and chromium-driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--force-prefers-reduced-motion"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(chromedriver))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_all(folder / "in")
    shades = needle(384, score(0.5), {tenth / 10: tenth / 10 for tenth in range(11)})
    hostile = eval_file(HOSTILE, "f" * 64)
    write(folder / "in" / "hostile.json", hostile | {"cells": [*hostile["cells"], shades]})
    page, _ = write_report(make_report([folder / "in"]), folder / "out")
    return page


@pytest.fixture
def page(driver, path):
    for log in ("browser", "performance"):
        driver.get_log(log)  # what other tests left
    set_width(driver, 1280)
    driver.get(path.as_uri())
    return driver


def set_width(driver, width):
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def score_table(driver):
    return driver.find_element("xpath", "//figure[figcaption='Scores by likelihood']//table")


def heads(table):
    return table.find_elements("css selector", "thead th")


def column(driver, table, index):
    script = "return [...arguments[0].tBodies[0].rows].map(row => row.cells[arguments[1]].dataset.sort)"
    return [float(value) for value in driver.execute_script(script, table, index) if value is not None]


def test_a_click_sorts_a_table_and_a_second_one_turns_it_round(page):
    table = score_table(page)
    head = heads(table)[1]
    assert [h.get_attribute("aria-sort") for h in heads(table)] == ["none"] * len(heads(table))
    assert column(page, table, 1) == [256, 384, 1024]
    button = head.find_element("tag name", "button")
    button.click()
    assert head.get_attribute("aria-sort") == "ascending"
    button.click()
    assert head.get_attribute("aria-sort") == "descending"
    assert column(page, table, 1) == [1024, 384, 256]
    assert [h.get_attribute("aria-sort") for h in heads(table)].count("none") == len(heads(table)) - 1


def test_the_keyboard_reaches_a_heading_and_sorts_by_value(page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    ActionChains(page).send_keys(Keys.TAB).perform()
    skip = page.switch_to.active_element
    assert skip.text == "Skip to the results"
    skip.send_keys(Keys.ENTER)
    assert page.execute_script("return location.hash") == "#main"
    table = score_table(page)
    wanted = heads(table)[5].find_element("tag name", "button")
    for _ in range(60):  # as a reader who has no mouse
        ActionChains(page).send_keys(Keys.TAB).perform()
        if page.switch_to.active_element == wanted:
            break
    assert page.switch_to.active_element == wanted
    outline = page.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "the focus must be seen"
    ActionChains(page).send_keys(Keys.SPACE).perform()
    assert heads(table)[5].get_attribute("aria-sort") == "ascending"
    assert column(page, table, 5) == [0.125, 0.9]
    ActionChains(page).send_keys(Keys.ENTER).perform()
    assert column(page, table, 5) == [0.9, 0.125]


def test_empty_cells_come_last_whichever_way(page):
    rows = "return [...document.querySelectorAll('#routing table.sortable tbody tr')].map(r => r.cells[2].textContent)"
    button = page.find_element("css selector", "#routing table.sortable th:nth-child(3) button")
    found = []
    for _ in range(2):
        page.execute_script("arguments[0].click()", button)
        found.append(page.execute_script(rows))
    assert [texts[-1] for texts in found] == ["–", "–"]
    assert found[0][0] != "–"


def test_the_button_makes_the_page_dark_and_light_again(page):
    background = "return getComputedStyle(document.body).backgroundColor"
    light = page.execute_script(background)
    button = page.find_element("id", "theme")
    assert button.get_attribute("aria-pressed") == "false"
    button.click()
    dark = page.execute_script(background)
    assert button.get_attribute("aria-pressed") == "true"
    assert sum(map(int, dark[4:-1].split(", "))) < 150 < 600 < sum(map(int, light[4:-1].split(", ")))
    button.click()
    assert page.execute_script(background) == light


def test_a_reader_who_prefers_dark_gets_it(page, path):
    feature = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
    try:
        page.get(path.as_uri())
        background = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert sum(map(int, background[4:-1].split(", "))) < 150
        assert page.find_element("id", "theme").get_attribute("aria-pressed") == "true"
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_nothing_is_asked_of_the_network_and_nothing_goes_wrong(page, path):
    for button in page.find_elements("css selector", "thead button"):
        page.execute_script("arguments[0].click()", button)
    page.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    page.find_element("id", "theme").click()
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked == [path.as_uri()]
    assert page.get_log("browser") == []
    assert page.title.startswith("hybridlm: ")  # the hostile name did not run


def test_the_policy_stops_a_request_that_a_script_would_make(page):
    blocked = page.execute_async_script(
        "const done = arguments[0];"
        "document.addEventListener('securitypolicyviolation', e => done(e.effectiveDirective));"
        "document.body.append(Object.assign(new Image(), { src: 'https://example.com/x.png' }));"
    )
    assert blocked == "img-src"


@pytest.mark.parametrize("width", [320, 375, 1280])
def test_the_page_never_scrolls_sideways_but_wide_tables_do(page, path, width):
    set_width(page, width)
    page.get(path.as_uri())
    page.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    wide = page.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert wide[0] <= wide[1] == width
    boxes = "return [...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth).length"
    assert page.execute_script(boxes) > 0 or width > 1000
    page.execute_script("window.scrollTo(500, 0)")
    assert page.execute_script("return window.scrollX") == 0


def test_text_stands_out_from_its_background_in_both_themes(page):
    script = """
      const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
      const light = css => {
        canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = css; canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)
          .map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      const paper = light(getComputedStyle(document.body).backgroundColor);
      const found = {};
      for (const choice of ['body', '.note', 'nav a', 'thead th', '.dim', '.tick', 'summary']) {
        const style = getComputedStyle(document.querySelector(choice));
        found[choice] = ratio(light(choice === '.tick' ? style.fill : style.color), paper);
      }
      for (const cell of document.querySelectorAll('text.in')) {
        const under = light(getComputedStyle(cell.previousElementSibling).fill);
        found['cell ' + cell.textContent] = ratio(light(getComputedStyle(cell).fill), under);
      }
      return found;
    """
    for _ in range(2):
        ratios = page.execute_script(script)
        assert len(ratios) >= 7 + 11
        assert {name: round(value, 2) for name, value in ratios.items() if value < 4.5} == {}
        page.find_element("id", "theme").click()
