"""What tests of reports share: the page as elements, the command, and the parts of a report by name."""

from html.parser import HTMLParser

from typer.testing import CliRunner

from hybridlm.cli import app
from hybridlm.report.blocks import Table

VOID = {"meta", "link", "img", "br", "input", "base"}


class Page(HTMLParser):
    """Elements with their attributes and text, and whether all of them are closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.bad = [], [], []
        self.feed(text)
        self.bad += self.open

    def handle_starttag(self, tag, attrs):
        self.found.append({"tag": tag, "text": "", **dict(attrs)})
        if tag not in VOID:
            self.open.append((tag, len(self.found) - 1))

    def handle_startendtag(self, tag, attrs):
        self.found.append({"tag": tag, "text": "", **dict(attrs)})

    def handle_endtag(self, tag):
        if not self.open or self.open.pop()[0] != tag:
            self.bad.append(tag)

    def handle_data(self, data):
        for _, index in self.open:
            self.found[index]["text"] += data

    def all(self, tag, **attributes):
        return [e for e in self.found if e["tag"] == tag and attributes.items() <= e.items()]


def run(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def blocks(report, kind):
    found = [block for section in report.sections for block in section.blocks]
    return [block for block in found if isinstance(block, kind)]


def table(report, caption):
    (found,) = [block for block in blocks(report, Table) if block.caption == caption]
    return [[cell.text for cell in row] for row in found.rows]


def chart(report, title):
    (found,) = [found for found in report.charts if found.title == title]
    return found
