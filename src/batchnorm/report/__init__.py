"""From a Run on disk to what people read: the answer in words, the page as data, one HTML file, pictures.

    answer.answer(run)              the answer, in words computed from the numbers     pure NumPy
    summary.summary(run)            one row of numbers for each arm                    pure NumPy
    page.build(run)                 everything the report shows, as dataclasses        Altair
    html.write(run)                 RUN/report.html, self-contained                    Jinja2, vl-convert
    pictures.write_pictures(page, folder)   the main charts as PNG                     vl-convert

Nothing here imports torch. This module imports nothing: the plotting libraries load with the modules that need them.
"""
