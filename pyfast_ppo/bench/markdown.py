"""Tables of results for Markdown pages, kept between two comments, so that no figure there is copied by hand.

A page says which table of which machine goes where:

    <!-- results: loss epyc-2-cores -->
    <!-- /results -->
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from statistics import median

from pyfast_ppo.bench.results import made_with, ratios
from pyfast_ppo.bench.sizes import SIZES
from pyfast_ppo.bench.tables import duration

_PLACE = re.compile(r"(<!-- results: (\S+) (\S+) -->\n).*?(<!-- /results -->)", re.DOTALL)
_OURS = "ppo_loss_and_grad"
_COMPILED = "torch.compile"
_PART_NAMES = {"process_env_step": "`process_env_step`", "act": "`act`", "compute_returns": "`compute_returns`"}
_PART_NAMES |= {"update": "`update`", "iteration": "iteration"}


def filled(page: str, documents: Mapping[str, dict]) -> str:
    """The page with its tables as ``documents``, by the machine's name, have them.

    Raises:
        ValueError: The page asks for a table or a machine that there is not.
    """

    def fill(place: re.Match) -> str:
        start, table, machine, end = place.groups()
        if table not in TABLES:
            raise ValueError(f"there is no table {table!r}; there are: {', '.join(TABLES)}")
        if machine not in documents:
            raise ValueError(f"there are no results of {machine!r}; there are those of: {', '.join(documents)}")
        return "".join([start, *(f"{line}\n" for line in TABLES[table](documents[machine])), end])

    return _PLACE.sub(fill, page)


def _loss(document: dict) -> list[str]:
    """Mini-batches that come from memory."""
    rows = [r for r in _rows(document, "loss") if r["case"]["old_std"] == "[N, A]" and r["case"]["input sets"] > 1]
    return [*_measured(document, "loss", "bench_loss.py"), *_loss_table(rows, ("N", "A"))]


def _loss_all(document: dict) -> list[str]:
    rows = _rows(document, "loss")
    return [*_measured(document, "loss", "bench_loss.py"), *_loss_table(rows, ("N", "A", "old_std", "input sets"))]


def _loss_table(rows: list[dict], keys: Sequence[str]) -> list[str]:
    header = [*keys, "rsl_rl", "fastest other library", "`torch.compile`", f"`{_OURS}` (10th to 90th percentile)"]
    table = [[*header, "× rsl_rl", "× compiled"]]
    for row in rows:
        entries, ours = row["contenders"], row["contenders"][_OURS]
        known = {row["baseline"], *row["ours"], *(name for name in entries if name.startswith(_COMPILED))}
        libraries = {name: entry for name, entry in entries.items() if name not in known}
        fastest = min(libraries, key=lambda name: libraries[name]["median_s"], default=None)
        other = f"{duration(libraries[fastest]['median_s'])} ({fastest})" if fastest else ""
        compiled = entries.get(_COMPILED)
        table.append(
            [
                *(f"{value:,}" if isinstance(value := row["case"][key], int) else value for key in keys),
                duration(entries[row["baseline"]]["median_s"]),
                other,
                duration(compiled["median_s"]) if compiled else "",
                f"{duration(ours['median_s'])} ({duration(ours['p10_s'])} to {duration(ours['p90_s'])})",
                f"{ours['times_faster']:.1f}",
                f"{median(ratios(row, _OURS, _COMPILED)):.1f}" if compiled else "",
            ]
        )
    return _table(table)


def _gae(document: dict) -> list[str]:
    return _by_case(document, "gae")


def _kl(document: dict) -> list[str]:
    return _by_case(document, "kl")


def _by_case(document: dict, subject: str) -> list[str]:
    """A line for each case, a column for each contender."""
    rows = _rows(document, subject)
    names = list(dict.fromkeys(name for row in rows for name in row["contenders"]))
    keys = list(rows[0]["case"])
    table = [[*keys, *names]]
    for row in rows:
        entries = row["contenders"]
        cells = [duration(entries[name]["median_s"]) if name in entries else "" for name in names]
        case = [f"{value:,}" if isinstance(value, int) else value for value in row["case"].values()]
        table.append([*case, *cells])
    return [*_measured(document, subject, f"bench_{subject}.py"), *_table(table)]


def _update(document: dict) -> list[str]:
    """The update and the whole iteration, contenders beside each other."""
    rows = [row for row in _rows(document, "update") if row["case"]["part"] in ("update", "iteration")]
    names = list(rows[0]["contenders"])
    table = [["size", "", *names]]
    for row in rows:
        cells = [_with_ratio(name, entry, row) for name, entry in row["contenders"].items()]
        table.append([_size(row["case"]["size"]), _PART_NAMES[row["case"]["part"]], *cells])
    return [*_measured(document, "update", "bench_update.py"), *_table(table)]


def _with_ratio(name: str, entry: dict, row: dict) -> str:
    text = duration(entry["median_s"])
    return text if name == row["baseline"] else f"{text} ({entry['times_faster']:.2f}×)"


def _parts(document: dict) -> list[str]:
    """Each part of an iteration, contenders below each other."""
    table = [["size", "part", "", "time", "× faster", "operations", "host syncs", "peak MB"]]
    for row in _rows(document, "update"):
        if row["case"]["part"] == "iteration":
            continue
        for name, entry in row["contenders"].items():
            cells = [row["case"]["size"].replace("_", " "), _PART_NAMES[row["case"]["part"]], name]
            cells += [duration(entry["median_s"]), f"{entry['times_faster']:.2f}"]
            peak = f"{entry['peak_bytes'] / 1e6:.1f}" if "peak_bytes" in entry else ""
            table.append([*cells, *_counts(entry), peak])
    return [*_measured(document, "update", "bench_update.py"), *_table(table)]


def _profile(document: dict) -> list[str]:
    """rsl_rl beside FusedPPO, line by line."""
    rows = _rows(document, "profile")
    names = list(rows[0]["contenders"])
    columns = ("operations", "syncs", "MB", "time")
    header = ["size", "what for", *(f"{name}: {column}" for name in names for column in columns)]
    table = [[*header, "floor"]]
    for row in rows:
        cells = [row["case"]["size"].replace("_", " "), row["case"]["line"]]
        for entry in row["contenders"].values():
            moved = f"{entry['moved_bytes'] / 1e6:,.0f}" if "moved_bytes" in entry else ""
            work = _counts(entry) if "launches" in entry else ["", ""]
            cells += [*work, moved, duration(entry["median_s"])]
        table.append([*cells, duration(row["floor"]["median_s"]) if "floor" in row else ""])
    return [*_measured(document, "profile", "bench_profile.py"), *_table(table)]


def _learning(document: dict) -> list[str]:
    """Final returns and times of training, stock and fused; bench/learning.py has what the numbers are."""
    result = _of_runs(document, "learning")
    tasks, over = result["tasks"], result["over_all_tasks"]
    header = ["task", "seeds", "rsl_rl's PPO", "FusedPPO", "difference", "p", "× faster: `update`", "iteration"]
    table = [header]
    for name, task in tasks.items():
        returns, times = task["returns"], task["times"]
        cells = [name, str(len(task["seeds"])), *_final(returns["final_return_stock"], returns["final_return_fused"])]
        cells += [*_final(returns["fused_minus_stock"]), f"{returns['permutation_p_value']:.2f}"]
        table.append([*cells, *(_final(*(times[part]["times_faster"] for part in ("update", "iteration"))))])
    cells = ["all, as a share of what was learned", "", *_final(over["score_stock"], over["score_fused"])]
    table.append([*cells, *_final(over["fused_minus_stock"]), f"{over['permutation_p_value']:.2f}", "", ""])
    made = {_made(task, f"bench/learning.py --seeds {len(task['seeds'])}") for task in tasks.values()}
    return [f"{'; '.join(sorted(made))} (Isaac Lab with `--isaaclab-python`)", "", *_table(table)]


def _soak(document: dict) -> list[str]:
    """What grows, and what an iteration takes, in long training runs; bench/soak.py has what the numbers are."""
    result = _of_runs(document, "soak")
    stable, times = result["stability"], result["times"]
    table = [["", "rsl_rl's PPO", "FusedPPO", "FusedPPO by rsl_rl's PPO"]]
    grows = {"heap_bytes": "memory that malloc has given out", "resident_bytes": "resident memory"}
    for name, words in grows.items():
        cells = _final(*(stable[arm]["growth_per_iteration"][name] for arm in ("stock", "fused")))
        table.append([f"{words}: growth per iteration, bytes", *cells, ""])
    drifts = [stable[arm]["last_by_first_quarter"] for arm in ("stock", "fused")] + [stable["drift_fused_by_stock"]]
    cells = _final(*(drift["iteration_cpu_ms"] for drift in drifts))
    table.append(["processor's time of an iteration: last quarter by first", *cells])
    for part, words in {"collect": "collecting", "update": "`update`", "iteration": "iteration"}.items():
        (faster,) = _final(times[part]["times_faster"])
        table.append(
            [f"{words}, ms", *_final(times[part]["ms_stock"], times[part]["ms_fused"]), f"{faster} times as fast"]
        )
    about = f"{result['task']}, {result['num_envs']} environments, {len(result['seeds'])} seeds of both"
    command = f"bench/soak.py --iterations {result['iterations']} --seeds {len(result['seeds'])}"
    return [f"{about}; {_made(result, command)}", "", *_table(table)]


def _of_runs(document: dict, subject: str) -> dict:
    """What bench/learning.py or bench/soak.py found."""
    if subject not in document:
        raise ValueError(f"there are no results of {subject!r} on this machine")
    return document[subject]


def _made(result: dict, command: str) -> str:
    """Where and with what training runs were made."""
    about, versions = result["machine"], result["made_with"]
    return (
        f"{about['cpu']}, a thread for each run, torch {versions['torch']}, {about['date']}, "
        f"commit {versions['commit']}: `python {command}`"
    )


def _final(*estimates: dict) -> list[str]:
    return [f"{e['estimate']:.3g} ({e['low']:.3g} to {e['high']:.3g})" for e in estimates]


def _counts(entry: dict) -> list[str]:
    return [f"{entry['launches']:,}", f"{entry['syncs']:,}"]


def _size(name: str) -> str:
    size, text = SIZES[name], name.replace("_", " ")
    dims = "-".join(map(str, size.hidden_dims))
    return f"{text} ({size.num_envs} × {size.num_steps}, {dims}, A = {size.num_actions})"


def _rows(document: dict, subject: str) -> list[dict]:
    if subject not in document["subjects"]:
        raise ValueError(f"there are no results of {subject!r} on this machine")
    return document["subjects"][subject]["rows"]


def _measured(document: dict, subject: str, script: str) -> list[str]:
    entry = document["subjects"][subject]
    commit = f", commit {entry['commit']}" if entry.get("commit") else ""
    rounds = [len(row["contenders"][row["baseline"]]["seconds"]) for row in entry["rows"]]
    counted = f"{min(rounds)} to {max(rounds)}" if min(rounds) < max(rounds) else f"{rounds[0]}"
    command = f"`python bench/{script} --seconds {entry['seconds']:g}`"
    return [f"{made_with(document, subject)}{commit}; medians of {counted} rounds: {command}", ""]


def _table(cells: list[list[str]]) -> list[str]:
    header, *body = [f"| {' | '.join(line)} |" for line in cells]
    return [header, "|" + "---|" * len(cells[0]), *body]


TABLES: dict[str, Callable[[dict], list[str]]] = {
    "loss": _loss,
    "loss-all": _loss_all,
    "gae": _gae,
    "kl": _kl,
    "update": _update,
    "parts": _parts,
    "profile": _profile,
    "learning": _learning,
    "soak": _soak,
}
