"""Which options of sbatch a training job may have, however they are written."""

import pytest

from mamba_dist.commands.sbatch_options import read_options


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--arra=0-3", "cannot have --array"),
        ("--outpu=/dev/null", "without --output"),
        ("--op=truncate", "without --open-mode"),
        ("--tasks-per-node=1", "give --ranks-per-node"),
        ("--nt=4", "may be --ntasks-per-node or --ntasks or --ntasks-per-gpu; write it in full"),
        ("--ntasks=4", "cannot have --ntasks"),
        ("--gpus-per-t=1", "cannot have --gpus-per-task"),
        ("--gpus=8", "give --gpus-per-node"),
        ("--gres=gpu:4", "give --gpus-per-node"),
        ("--gres=nvme:1,gpu:a100:4", "give --gpus-per-node"),
        ("--no-req", "give --no-requeue"),
        ("-d afterok:1", "no option of sbatch"),
    ],
)
def test_what_a_training_job_cannot_have_is_refused_also_abbreviated(word: str, said: str) -> None:
    options, [problem] = read_options([word])
    assert not options
    assert said in problem


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("--depend=afterany:1", "dependency"),
        ("--dependency=afterany:1", "dependency"),
        # Options of their own that begin like others, and those of which nothing is known here.
        ("--time-min=5", "time-min"),
        ("--wait-all-nodes=1", "wait-all-nodes"),
        ("--nodelist=n1", "nodelist"),
        ("--mem-bind=local", "mem-bind"),
        ("--mem-per-cpu=1G", "mem-per-cpu"),
        ("--gres=nvme:1", "gres"),
        ("--gres=gpu_memory:1", "gres"),
        ("--exclusive", "exclusive"),
    ],
)
def test_any_other_option_is_taken_by_its_name_in_full(word: str, name: str) -> None:
    assert read_options([word]) == ({name: word.partition("=")[2]}, [])
