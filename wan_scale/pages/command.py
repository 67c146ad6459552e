"""The commands of run.py that write pages: compare and report."""

from __future__ import annotations

from pathlib import Path

from wan_scale.config import Wan

PAGES = ("compare", "report")


def pages(cfg: Wan, command: str, out_given: bool, paths: list[str], tally: bool) -> str:
    """Do it; returns what was written, or the tally. ValueError or RuntimeError, in one sentence."""
    if command == "report":
        from wan_scale.pages import run_page

        return "\n".join(str(run_page.write(Path(run))) for run in paths or [cfg.out])
    from wan_scale.pages import study
    from wan_scale.pages import tally as tallied

    out = cfg.out if out_given else "runs/compare"
    if tally:
        return tallied.tally(paths, out)
    if len(paths) != 2:
        raise ValueError(f"compare takes two folders of samples, not {len(paths)}; for example compare A B --out DIR.")
    return study.write(*paths, out, cfg.seed, cfg.prompts)
