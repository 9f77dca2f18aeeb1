"""The phases of a run, and the whole configuration of each phase and each cell of a sweep."""

from longyarn.config import sweep_cells


def configurations(config: dict) -> dict[str, dict]:
    """Return each whole configuration by its directory below the run's: phases, the run, a sweep's cells."""
    return phases(config) | sweep_cells.cells(config)


def parts(config: dict) -> dict[str, dict]:
    """Return the configuration of the jobs in each directory: those of ``configurations``, and the places
    that a sweep's cells share, which are no cells and stand for a part of their settings alone.
    """
    places = sweep_cells.places(config).items()
    return {
        name: sweep_cells.changed(config, changes) for name, changes in places
    } | configurations(config)


def within(name: str) -> str:
    """Return the words that say of which phase or cell a sentence speaks; none of the run itself."""
    if not name:
        return ""
    key = "sweep" if name.startswith(sweep_cells.DIRECTORY) else "phases"
    return f"in {name.removeprefix(f'{sweep_cells.DIRECTORY}/').strip('/')} of config key {key!r}: "


def phases(config: dict) -> dict[str, dict]:
    """Return the whole configuration of each phase by its directory below the run's, in order.

    The last one is the run itself, without a directory of its own: its name is empty.
    """
    alone = config | {"phases": []}
    found = {
        f"phase-{number}/": merged(alone, changes)
        for number, changes in enumerate(config["phases"], start=1)
    }
    return found | {"": config}


def merged(config: dict, changes: dict) -> dict:
    """Return a configuration with changes, key by key; mappings are merged, and all else is replaced."""
    both = config.keys() & changes.keys()
    inner = {
        key: merged(config[key], changes[key])
        for key in both
        if isinstance(config[key], dict) and isinstance(changes[key], dict)
    }
    return config | changes | inner
