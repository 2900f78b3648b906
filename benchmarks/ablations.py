"""The committed ablation rows: builds the small pool and runs ``mc2 ablate configs/ablations/*.yaml`` on it.

    python -m benchmarks.ablations SHARED_DATA [--work runs/ablations] [--jobs 2] [--json FILE]
    python -m benchmarks.ablations --quickstart runs/quickstart [...]    # configs/ablations/digits on its data

The same command resumes after an interruption. The tables are written beside FILE as Markdown; ``plot.py`` plots FILE.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ablation_pool
from benchmarks.harness import environment
from mc2_hpc.ablation.run import ablate
from mc2_hpc.ablation.tables import markdown
from mc2_hpc.terminal import progress

CONFIGS = Path(__file__).parents[1] / "configs" / "ablations"
_ABOUT = ("title", "mirrors", "finding")
CIFAR, DIGITS = "CIFAR-10 in ten languages", "the quickstart's numbers in sixteen languages"


def as_result(tables: Sequence[Mapping[str, Any]], command: str, data: str = CIFAR) -> dict[str, Any]:
    """The tables of ``mc2 ablate`` in the format of benchmark results."""
    about = {table["name"]: {key: table[key] for key in _ABOUT} for table in tables}
    rows = [{"ablation": table["name"], **row} for table in tables for row in table["rows"]]
    config = {"command": command, "data": data, "ablations": about}
    return {"name": "ablations", "env": environment(), "quick": False, "config": config, "rows": rows, "ratios": {}}


def as_tables(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tables that were passed to :func:`as_result`."""
    return [
        {"name": name, **about, "rows": [row for row in result["rows"] if row["ablation"] == name]}
        for name, about in result["config"]["ablations"].items()
    ]


def data_of(result: Mapping[str, Any]) -> str:
    """What a result was measured on."""
    return result["config"].get("data", CIFAR)


def write_result(result: Mapping[str, Any], path: Path) -> None:
    """The result as JSON, and its tables beside it as Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    env = result["env"]
    where = f"{env['machine']}, {env['cores']} cores, torch {env['torch']}, commit {env['commit']}"
    head = f"# Ablations on {data_of(result)}\n\n`{result['config']['command']}`\n\n{where}\n\n"
    path.with_suffix(".md").write_text(head + markdown(as_tables(result)), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "shared", type=Path, nargs="?", help="folder with cifar10-{train,test}.parquet and Babel-ImageNet's files"
    )
    source.add_argument("--quickstart", type=Path, help="output of mc2 quickstart")
    parser.add_argument("--work", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    if arguments.quickstart:
        data, name, pattern = arguments.quickstart, DIGITS, "digits/*.yaml"
    else:
        data, name, pattern = arguments.work / "data", CIFAR, "*.yaml"
        if not (data / "suite.yaml").is_file():  # written last
            ablation_pool.make(arguments.shared, data)
    files = sorted(CONFIGS.glob(pattern))
    with progress() as report:
        tables = ablate(files, [f"data.root={data}"], arguments.work, jobs=arguments.jobs, report=report)
    print(markdown(tables))
    if arguments.json:
        command = (
            f"mc2 ablate configs/ablations/{pattern} data.root={data} --out {arguments.work} --jobs {arguments.jobs}"
        )
        write_result(as_result(tables, command, name), arguments.json)


if __name__ == "__main__":
    main()
