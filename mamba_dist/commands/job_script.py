"""A job script as text: the directives of launch/slurm/train.sbatch replaced, the rest as it is."""

import re
import shlex
from collections.abc import Mapping, Sequence

_DIRECTIVE = re.compile(r"#SBATCH --([a-z][a-z-]*)(?:=(.*))?")
_TIME = re.compile(
    r"(?:(?P<days>\d+)-(?P<dhours>\d+)(?::(?P<dminutes>\d+)(?::(?P<dseconds>\d+))?)?"
    r"|(?P<hours>\d+):(?P<hminutes>\d+):(?P<hseconds>\d+)"
    r"|(?P<minutes>\d+)(?::(?P<seconds>\d+))?)"
)
_UNIT_S = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
# One of a pair takes the place of the other.
_OPPOSITES = {"requeue": "no-requeue", "no-requeue": "requeue"}

Directives = Mapping[str, str | None]
"""Options of sbatch, without dashes; "" is an option without a value, None takes one out."""


def limit_seconds(text: str) -> int | None:
    """The seconds of a time limit as sbatch reads it; None of one without end.

    Minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes and
    days-hours:minutes:seconds.

    Raises:
        ValueError: sbatch would not read it.
    """
    if text.upper() in {"UNLIMITED", "INFINITE", "0"}:
        return None
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{text!r} is no time limit; give minutes, hours:minutes:seconds or days-hours"
        )
    # dhours is hours after days, hminutes minutes after hours.
    units = {name: unit for name in match.groupdict() for unit in _UNIT_S if name.endswith(unit)}
    return sum(int(value or 0) * _UNIT_S[units[name]] for name, value in match.groupdict().items())


def limit_in_words(limit_s: int | None) -> str:
    """A time limit with its units, as "1 d 12 h" or "8 min"."""
    if limit_s is None:
        return "no limit"
    words, left = [], limit_s
    for name, unit_s in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, unit_s)
        words += [f"{count} {name}"] if count else []
    return " ".join(words)


def option_of(word: str) -> tuple[str, str]:
    """Name and value of an option of sbatch, "" where it has none.

    Raises:
        ValueError: it is not --name or --name=value on one line.
    """
    match = _DIRECTIVE.fullmatch(f"#SBATCH {word}")
    if match is None or "\n" in word:
        raise ValueError(f"{word!r} is no option of sbatch; give --name=value or --name")
    return match[1], match[2] or ""


def directives_of(script: str) -> dict[str, str]:
    """The options that a job script asks for."""
    lines = map(_DIRECTIVE.fullmatch, script.splitlines())
    return {match[1]: match[2] or "" for match in lines if match}


def render(
    script: str,
    directives: Directives,
    *,
    variables: Mapping[str, str],
    words: Sequence[str],
    header: str,
) -> str:
    """`script` with other directives, with variables set, and with its arguments written into it.

    `header` takes the place of the comments before the first directive, which tell how to submit
    the script by hand. What only explains a directive that is taken out goes with it.
    """
    left = {name: value for name, value in directives.items() if value is not None}
    lines = script.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("#SBATCH"))
    # The comment that explains the first directive is kept.
    begin = next(n for n in range(first, 0, -1) if not lines[n - 1].strip()) if first else 0
    body = next(n for n, line in enumerate(lines) if line.strip() and not line.startswith("#"))
    rendered: list[str] = []
    comment: list[str] = []
    for line in lines[begin:body]:
        match = _DIRECTIVE.fullmatch(line)
        if match is None:
            comment.append(line)
            continue
        name = match[1]
        if _OPPOSITES.get(name) in left:
            name = _OPPOSITES[name]
        if name in directives and directives[name] is None:
            comment = []
            continue
        if name in left:
            line = _directive(name, left.pop(name))
        rendered += [*comment, line]
        comment = []
    rendered += [_directive(name, value) for name, value in left.items()]
    fixed = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    arguments = f"set -- {shlex.join(words)}"
    top = [lines[0], *(f"# {line}".rstrip() for line in header.splitlines()), ""]
    return "\n".join([*top, *rendered, "", *fixed, arguments, *comment, *lines[body:]]) + "\n"


def _directive(name: str, value: str) -> str:
    if not value:
        return f"#SBATCH --{name}"
    if not re.search(r"[\s#\"'\\]", value):
        return f"#SBATCH --{name}={value}"
    # sbatch takes quotes and backslashes away as a shell does, and ends at a bare #.
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'#SBATCH --{name}="{quoted}"'
