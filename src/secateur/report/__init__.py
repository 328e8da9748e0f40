"""Facts → one self-contained page. `report.json` holds every number; `report.html` shows them and computes nothing.

    sheet = facts(job, latency=[...], sensitivity=[...])
    write("out/", sheet)                    # report.json and report.html
    rewrite("out/")                         # report.html again, from report.json
"""

from secateur.report.facts import facts as facts
from secateur.report.files import put as put
from secateur.report.files import read as read
from secateur.report.files import rewrite as rewrite
from secateur.report.files import write as write
from secateur.report.hardware import hardware as hardware
from secateur.report.page import render as render
from secateur.report.training import carried as carried
