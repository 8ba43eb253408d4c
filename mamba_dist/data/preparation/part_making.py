"""The parts of many units, made by this process or by a crew."""

from collections.abc import Callable, Generator

from mamba_dist.data.preparation.crew import Crew
from mamba_dist.data.preparation.fast_backends import Encoder
from mamba_dist.data.preparation.part_records import PartRecord
from mamba_dist.data.preparation.parts import PartSettings, make_part, place_in_unit, tokenize_units
from mamba_dist.data.preparation.sources import Unit
from mamba_dist.data.preparation.staging import Staging


def make_parts(
    workers: int,
    todo: list[Unit],
    settings: PartSettings,
    *,
    encoder: Encoder,
    staging: Staging,
    notice: Callable[[str], None],
) -> Generator[list[PartRecord]]:
    """Makes the parts, in any order; those that come together are to be committed together.

    One worker is this process, since a process more would import and load everything again: half a
    second. If this process dies of a document, the next run has a crew, which says which it was.
    """
    if workers == 1 and not staging.died_at_work():
        with staging.at_work():
            for unit in todo:
                yield [make_part(unit, settings, encoder=encoder)]
        return
    if workers == 1:
        notice("an earlier run died at its work, so this one does it in a process of its own")
    count = min(workers, len(todo))
    with Crew(tokenize_units, settings, count=count, place=place_in_unit, notice=notice) as crew:
        yield from crew.answers(todo)
    staging.unmark()
