"""configs/790m.yaml under ZeRO-3 on two CPU ranks: two steps, a checkpoint, a resume, in 22 GiB.

By hand, and the peak as it printed it: `pytest -m slow -s tests/launch/test_memory_of_790m.py`.
Another config: MEMORY_TEST_CONFIG=370m. One that has twice its plan keeps what it frees, and more.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from launching import deepspeed_command
from memory_watch import MemoryWatch
from processes import ROOT, clean_environment

from mamba_dist.checkpoint.free_memory import available_bytes
from mamba_dist.checkpoint.layout import committed_steps
from mamba_dist.config.load import load_config
from mamba_dist.train.memory import memory_plan

NAME = os.environ.get("MEMORY_TEST_CONFIG", "790m")
CONFIG = ROOT / f"configs/{NAME}.yaml"
RANKS = 2
MOST_BYTES = 22 << 30


def overrides(made: Path, run_dir: Path) -> list[str]:
    return [
        f"training.run_dir={run_dir}",
        "training.micro_batch_size=1",
        f"training.global_batch_size={RANKS}",
        "training.max_tokens=null",
        "training.warmup_steps=1",
        "training.eval_steps=null",
        "training.eval_sequences=2",
        "engine.zero_stage=3",
        "engine.timeout_minutes=60",
        "engine.hang_timeout_minutes=null",
        "checkpoint.save_mode=streaming",
        "checkpoint.keep_last=1",
        f"data.dataset_path={made / 'shards'}",
        f"data.tokenizer_path={made / 'tokenizer.json'}",
        "data.sequence_length=128",
        "data.num_workers=0",
        "data.train_split=0.9",
        "data.val_split=0.1",
        "model.pad_token_id=0",
        "telemetry.log_steps=1",
        "telemetry.tensorboard=false",
    ]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_ranks_train_save_and_resume_within_the_memory(tiny_data: Path, tmp_path: Path) -> None:
    words = overrides(tiny_data, tmp_path / "run")
    config = load_config(CONFIG, [*words, "training.max_steps=2"]).config
    planned = RANKS * memory_plan(config, ranks=RANKS, on_gpu=False).peak
    if available_bytes() < planned:
        pytest.skip(f"{planned / 2**30:.1f} GiB are needed, {available_bytes() / 2**30:.1f} free")
    peaks = {}
    for steps in (2, 3):
        log = tmp_path / f"log-{steps}"
        with log.open("wb") as file:
            process = subprocess.Popen(
                deepspeed_command(CONFIG, *words, f"training.max_steps={steps}", ranks=RANKS),
                env=clean_environment(),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            with MemoryWatch(process.pid) as watch:
                code = process.wait(timeout=1700)
        finally:
            process.kill()
        assert code == 0, log.read_text()[-4000:]
        peaks[steps] = watch.peak_bytes
        print(f"to step {steps}: {watch.peak_bytes / 2**30:.2f} GiB, {planned / 2**30:.2f} planned")
        assert committed_steps(tmp_path / "run") == [steps]
    # 9.5 GB, of which pytest would keep three.
    shutil.rmtree(tmp_path / "run")
    assert "resumed after step 2" in (tmp_path / "log-3").read_text()
    assert max(peaks.values()) <= MOST_BYTES
    # The launcher comes on top of what is planned.
    if "goes back to the system" in (tmp_path / "log-2").read_text():
        assert planned * 0.85 <= max(peaks.values()) <= planned * 1.15 + (1 << 30)
