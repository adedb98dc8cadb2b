"""The command line of train_voc.py. Some arguments decide the defaults of the others, so they are read first."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import tyro

from .backbones import BACKBONES
from .settings import PRESETS, Settings, paper_settings


def parse_arguments(argv: Sequence[str] | None) -> Settings:
    """Read the command line. Defaults come from the run to be resumed, or else from the preset."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--preset", choices=PRESETS)
    peek.add_argument("--backbone", choices=BACKBONES, default="efficientnet_lite0")
    peek.add_argument("--data")
    peek.add_argument("--resume", type=Path)
    chosen, _ = peek.parse_known_args(argv)
    if chosen.resume is not None:
        default = resumed_settings(chosen.resume)
    else:
        preset = chosen.preset or ("toy" if chosen.data is None else "photographs")
        default = paper_settings(chosen.backbone) if preset == "paper" else PRESETS[preset]
    return tyro.cli(Settings, default=default, args=argv)


def resumed_settings(resume: Path) -> Settings:
    """Return the settings of the run in a folder, or of the run to which a checkpoint belongs."""
    folder = resume if resume.is_dir() else resume.parent
    path = folder / "settings.json"
    if not resume.exists() or not path.is_file():
        raise ValueError(f"--resume: no run to go on with: looked for {resume if not resume.exists() else path}")
    try:
        settings = Settings.from_json(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"--resume: cannot read settings {path}: {error}") from error
    return replace(settings, output=folder, resume=resume)
