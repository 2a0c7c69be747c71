"""`onebase train`: one run from a settings file, watched in the terminal, stopped and resumed in good order."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onebase.cli import terminal
from onebase.errors import ConfigError, TrainingError
from onebase.ops.bits import do_without_batch_invariance

if TYPE_CHECKING:
    from onebase.cli.watching import Watching
    from onebase.config.settings import Settings


def train(
    configs: Annotated[
        list[Path], typer.Argument(metavar="CONFIG...", help="A settings file; several train together, on one base.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="The run's folder, or of several runs the folder of theirs; it must not exist yet, unless --resume."
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set one setting: --set adapter.r=32")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint; start, if there is none.")
    ] = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile", help="Show where a few steps' time and memory go; written to OUT-profile, not to OUT."
        ),
    ] = False,
) -> None:
    """Fine-tune an adapter as a settings file says, or several at once on one base.

    Ctrl-C, SIGTERM and a closed terminal stop it after the step at hand, with a checkpoint; the same command with
    --resume goes on.
    """
    from onebase.config.reading import read_settings

    if profile and resume:
        raise ConfigError("--profile: takes a run's first steps, and goes on with none. Leave out --resume.")
    if len(configs) > 1:
        _train_gang(configs, out, overrides or (), resume=resume, profile=profile)
        return
    (config,) = configs
    settings = read_settings(config, overrides or ())  # first: a mistake in them is told without waiting for torch
    if not settings.train.batch_invariant:
        do_without_batch_invariance()
    from onebase.cli.watching import Watching
    from onebase.train.run import train_run
    from onebase.train.stop import Stopped

    watching = Watching(settings, out)
    if profile:
        _profile(settings, out, watching)
        return
    try:
        with watching:
            result = train_run(settings, out, resume=resume, progress=watching)
    except Stopped as stopped:
        way_on = _way_on(configs, out, overrides or ())
        raise Stopped(f"{stopped}\nGo on with: {way_on}", stopped.signal_number) from stopped
    except (KeyboardInterrupt, SystemExit):
        if watching.last_saved is not None:
            terminal.say(f"The checkpoint is {watching.last_saved}. Go on: {_way_on(configs, out, overrides or ())}")
        raise
    watching.show_result(result)


def _train_gang(configs: Sequence[Path], out: Path, overrides: Sequence[str], *, resume: bool, profile: bool) -> None:
    """Train several settings files' adapters together, and show what came of each."""
    from onebase.config.reading import read_settings

    if profile:
        raise ConfigError("--profile: takes one run's steps apart. Give one settings file.")
    names = [config.stem for config in configs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"{name}: two runs cannot have one name, which is that of their settings file. Rename one."
            )
    settings = {config.stem: read_settings(config, overrides) for config in configs}
    if not any(one.train.batch_invariant for one in settings.values()):
        do_without_batch_invariance()
    from onebase.cli.watching_gang import WatchingGang
    from onebase.train.gang import train_gang
    from onebase.train.stop import Stopped

    watching = WatchingGang(settings, out)
    try:
        with watching:
            outcomes = train_gang(settings, out, resume=resume, progress=watching)
    except Stopped as stopped:
        raise Stopped(f"{stopped}\nGo on with: {_way_on(configs, out, overrides)}", stopped.signal_number) from stopped
    watching.show(outcomes)
    failed = [outcome.name for outcome in outcomes if outcome.result is None]
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(outcomes)} runs failed: {', '.join(failed)}. The reasons stand above."
        )


def _profile(settings: "Settings", out: Path, watching: "Watching") -> None:
    """Run some steps and show where they went."""
    from onebase.cli.profile_report import show_profile
    from onebase.train.profiling import profile_folder, profile_run

    with watching:
        found = profile_run(settings, out, watching)
    show_profile(terminal.stdout(), found, profile_folder(out))


def _way_on(configs: Sequence[Path], out: Path, overrides: Sequence[str]) -> str:
    """Return the command that goes on."""
    words = ["onebase", "train", *map(str, configs), "--out", str(out)]
    for override in overrides:
        words += ["--set", override]
    return shlex.join([*words, "--resume"])
