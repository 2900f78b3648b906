"""What changed in ``data.train`` since a checkpoint, one line per source and setting."""

from typing import Any


def source_changes(before: Any, now: Any) -> list[str]:
    """The lines; none if only the order of the sources differs, which means nothing.

    Args:
        before, now: two different values of ``data.train``, as in ``trainer.json``.
    """
    old, new = _by_name(before), _by_name(now)
    if not old and not new:
        return [f"data.train {before} -> {now}"]
    if not old:
        return [f"data.train {before} -> the sources {', '.join(new)}, each from its start"]
    if not new:
        return [f"data.train the sources {', '.join(old)} -> {now}, from its start"]
    lines = [f"data.train: no source {name} any more" for name in old if name not in new]
    lines += [f"data.train: new source {name}, from its start" for name in new if name not in old]
    for name in (name for name in old if name in new):
        for key in old[name] | new[name]:
            values = [each.get(key) for each in (old[name], new[name])]
            if values[0] != values[1]:
                lines.append(f"data.train: source {name}: {key} {values[0]} -> {values[1]}")
    return lines


def _by_name(train: Any) -> dict[str, dict[str, Any]]:
    """The sources of a mix by name; none if ``train`` only names shards."""
    if not isinstance(train, list):
        return {}
    return {source["name"]: source for source in train if isinstance(source, dict) and "name" in source}
