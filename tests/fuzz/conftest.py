"""The sum of what was tried, at the end."""

from collections import Counter


def pytest_terminal_summary(terminalreporter):
    counts = Counter()
    for report in terminalreporter.getreports("passed"):
        counts.update(dict(report.user_properties))
    if counts:
        terminalreporter.section("tried")
        terminalreporter.write_line(", ".join(f"{count} {what}" for what, count in counts.items()))
