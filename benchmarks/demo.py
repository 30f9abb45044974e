"""What a small picture costs over HTTP with the demo model: where the way weighs most."""

from benchmarks import overhead
from benchmarks.processes import baseline, serve
from benchmarks.results import Findings
from benchmarks.setting import Setting
from shared.settings import BUNDLED_MODEL

NAME = "demo"
SIZE_PX, STEPS = 256, 9
PAIRS, QUICK_PAIRS = 40, 2
AIM = 1.10


def run(setting: Setting) -> Findings:
    """Alternates server and script, as `overhead` does it."""
    model = BUNDLED_MODEL
    pairs = QUICK_PAIRS if setting.quick else PAIRS
    with serve(model, setting.data_dir) as server, baseline(model, setting.data_dir / "bench-demo.log") as script:
        taken = overhead.pairs(server, script, pairs, size_px=SIZE_PX, steps=STEPS)
    return overhead.findings(NAME, taken, aim=AIM, threads=script.facts["threads"])
