"""What can be known before the first clip is made, each in a sentence: settings against the transformer, packages."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from wan_scale.config import Wan
from wan_scale.cost.sizes import known, tokens
from wan_scale.data.files import read_json
from wan_scale.pictures import needs_ffmpeg

SMALL = ("scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json", "tokenizer/tokenizer.json")
TRAINING = {None, "stage1", "stage2", "kd", "dmd2v", "teacher"}  # None: the ladder


def check(cfg: Wan, command: str | None) -> None:
    """ValueError or RuntimeError for what `command` would otherwise meet after hours."""
    config = read_json(Path(cfg.model) / "transformer" / "config.json")
    blocks = known(config)["num_layers"]
    for path in (Path(cfg.model) / name for name in SMALL):
        if path.exists():
            read_json(path)
    if command in (None, "stage1", "stage2") and not 1 <= cfg.H < blocks:
        baseline = "; H = 0 is the baseline: `dmd2v`" if cfg.H == 0 else ""
        raise ValueError(f"H is {cfg.H}; of {blocks} blocks the flow head may have 1 to {blocks - 1}{baseline}.")
    if command in TRAINING:
        check_taps(cfg, blocks)
        tokens(config, cfg.frames, cfg.height, cfg.width)
        if config["num_attention_heads"] % cfg.context_parallel:
            heads = f"does not divide the {config['num_attention_heads']} heads of this transformer"
            raise ValueError(f"context_parallel {cfg.context_parallel} {heads}; take a divisor.")
        if cfg.lora:
            needs_peft()
    if command == "kd" and not (cfg.skip_layer < blocks and (cfg.skip_layer < 0 or cfg.data_guidance > 1)):
        last = f"give a block from 0 to {blocks - 1} and guidance above 1, or -1 for none"
        raise ValueError(f"skip_layer is {cfg.skip_layer} at data_guidance {cfg.data_guidance:g}; {last}.")
    if command in (None, "sample", "eval") or (command == "data" and cfg.videos):
        needs_ffmpeg()


def check_taps(cfg: Wan, blocks: int) -> None:
    """ValueError if the discriminator would see a block that the network does not have."""
    if cfg.tap_blocks[-1] >= blocks:
        beyond = f"taps names block {cfg.tap_blocks[-1]} of a network of {blocks}"
        raise ValueError(f"{beyond}; give block numbers with --taps.")


def needs_peft() -> None:
    """RuntimeError in a sentence where no adapters could be made."""
    if find_spec("peft") is None:
        raise RuntimeError("--lora needs peft; `pip install -r wan_scale/requirements.txt` brings it.")
