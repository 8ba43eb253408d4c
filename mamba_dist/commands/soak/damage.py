"""What is done to the files of a run between two launches."""

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

from mamba_dist.checkpoint.layout import checkpoint_folder, checkpoints_folder, staging_folder
from mamba_dist.commands.soak.plan import DamagePlan

# A step that no run of ours comes to: nothing but the start may clear its folders away.
_JUNK_STEP: Final = 90_000_000


def damage_newest(run_dir: Path, whole: Collection[int], plan: DamagePlan) -> tuple[int, Path]:
    """The step and the file that were damaged; `whole` are steps of whole checkpoints."""
    step = max(whole)
    files = sorted(checkpoint_folder(run_dir, step).iterdir())
    victim = files[int(plan.which * len(files))]
    size = victim.stat().st_size
    place = int(plan.where * size)
    if plan.kind == "delete":
        victim.unlink()
    elif plan.kind == "truncate":
        with victim.open("r+b") as file:
            file.truncate(place)
    else:
        with victim.open("r+b") as file:
            file.seek(place)
            [byte] = file.read(1)
            file.seek(place)
            file.write(bytes([byte ^ (1 << place % 8)]))
    return step, victim


def leave_junk(run_dir: Path, committed: Mapping[int, object]) -> list[str]:
    """Names of unfinished folders as kills leave them, one of them with all a checkpoint holds."""
    checkpoints_folder(run_dir).mkdir(parents=True, exist_ok=True)
    staged = staging_folder(run_dir, _JUNK_STEP)
    removed = staging_folder(run_dir, _JUNK_STEP + 1).with_suffix(".removed")
    for folder in (staged, removed):
        shutil.rmtree(folder, ignore_errors=True)
    if committed:
        shutil.copytree(checkpoint_folder(run_dir, max(committed)), staged)
    else:
        staged.mkdir()
    removed.mkdir()
    (removed / "rank-00000.safetensors").write_bytes(bytes(1000))
    return [staged.name, removed.name]
