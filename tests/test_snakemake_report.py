"""`snakemake --report` collects the run's report and figures in one page."""

import base64
import re

RUN = "results/tests"


def test_it_has_the_report_the_figures_and_captions(finished_copy):
    run = finished_copy.directory / RUN
    finished_copy.run(
        ["snakemake", "--configfile", "config.yaml", "tests/config.yaml", "--report", "all.html"]
    )
    page = (finished_copy.directory / "all.html").read_text()
    figures = {path.name for path in run.glob("figures/*.png")}
    assert len(figures) >= 5
    assert figures == set(re.findall(rf"{RUN}/figures/(\w+\.png)", page))
    for category in ("Report", "Figures"):
        assert f'"{category}"' in page
    for caption in (
        "what the run measured",
        "what the extension changed",
        "A figure of the report",
    ):
        assert caption in page
    embedded = base64.b64encode((run / "report.html").read_bytes()).decode()
    assert embedded in page
