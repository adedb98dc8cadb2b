"""The command line of train_voc.py. Some arguments decide the defaults of the others, so they are read first."""

import argparse
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import tyro

from .backbones import BACKBONES
from .presets import PRESETS, preset_settings
from .settings import Settings


def parse_arguments(argv: Sequence[str] | None) -> Settings:
    """Read the command line. Defaults come from the run to be resumed, or else from the preset."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--preset", choices=("auto", *PRESETS), default="auto")
    peek.add_argument("--backbone", choices=BACKBONES)
    peek.add_argument("--data")
    peek.add_argument("--resume", type=Path)
    chosen, _ = peek.parse_known_args(argv)
    if chosen.resume is not None:
        default = resumed_settings(chosen.resume)
    else:
        automatic = "toy" if chosen.data is None else "photographs"
        default = preset_settings(automatic if chosen.preset == "auto" else chosen.preset, chosen.backbone)
    return tyro.cli(Settings, default=default, args=argv)


def resumed_settings(resume: Path) -> Settings:
    """Return the settings of the run in a folder, or of the run to which a checkpoint belongs."""
    if not resume.exists():
        raise ValueError(f"--resume: no run to resume: looked for {resume}")
    folder = resumed_folder(resume)
    try:
        return replace(run_settings(folder), output=folder, resume=resume)
    except ValueError as error:
        raise ValueError(f"--resume: {error}") from error


def resumed_folder(resume: Path) -> Path:
    """Return the folder of the run to resume: `resume` is this folder or one of its checkpoints."""
    return resume.parent if resume.is_file() else resume


def run_settings(folder: Path) -> Settings:
    """Return the settings of the run in a folder."""
    path = folder / "settings.json"
    if not path.is_file():
        raise ValueError(f"no run of train_voc.py in {folder}: looked for {path}")
    try:
        return Settings.from_json(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"cannot read settings {path}: {error}") from error


def check_same_run(folder: Path, settings: Settings, ignored: Collection[str]) -> None:
    """Raise a ValueError if the run in a folder has other settings than these, except for the ignored ones."""
    wanted, found = asdict(settings), asdict(run_settings(folder))
    for key, value in wanted.items():
        same = value == found[key]
        if isinstance(value, Path) and isinstance(found[key], Path):
            same = value.resolve() == found[key].resolve()
        if key not in (*ignored, "output") and not same:  # the folder may have been moved
            option = f"--{key.replace('_', '-')}"
            raise ValueError(f"the run in {folder} has {option} {found[key]}, not {value}: give another --output")
