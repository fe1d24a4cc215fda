#!/usr/bin/env python3
"""ratios.py RESULTS.JSON: what the peer benchmark found of ours beside the best peer, as one line of JSON.

For each workload, mode and figure: our median, the peer that is best at this figure in this mode, its median, and the
ratio of ours to it. Ratios are paired: within each round, then the median, so that a drift of the machine cancels out.
Ends with 1 if one of our measurements failed, or there is none.
"""
import json
import statistics
import sys

# Figures of each kind of workload, and whether more of it is better.
FIGURES = {
    "bulk": {"gbit_s": True, "cpu_s_gib": False},
    "rr": {"per_s": True, "p50_us": False, "p99_us": False, "cpu_us": False},
    "conn": {"per_s": True, "p50_us": False, "p99_us": False, "cpu_us": False},
    "mem": {"rss_kib_conn": False, "base_rss_mib": False},
}
# Told by every workload but the bulk ones, so a figure of its own.
COLD = "cold_ms"


def values(samples):
    """{(workload, mode, figure): {proxy: {round: value}}}; the cold starts of all workloads are one figure."""
    out = {}
    for sample in samples:
        workload, mode = sample["workload"], sample["mode"]
        for figure, value in sample.get("result", {}).items():
            if figure in FIGURES[workload.rstrip("0123456789")]:
                key, turn = (workload, mode, figure), sample["round"]
            elif figure == COLD:
                key, turn = ("cold", mode, figure), (sample["round"], workload)
            else:
                continue
            out.setdefault(key, {}).setdefault(sample["proxy"], {})[turn] = value
    return out


def beside_best(proxies, ours, more_is_better):
    medians = {name: statistics.median(by_turn.values()) for name, by_turn in proxies.items()}
    found = {"ours": round(medians[ours], 3)}
    peers = {name: median for name, median in medians.items() if name not in (ours, "direct")}
    if peers:
        best = (max if more_is_better else min)(peers, key=peers.get)
        mine, other = proxies[ours], proxies[best]
        pairs = [mine[turn] / other[turn] for turn in mine if other.get(turn)]
        found.update(best_peer=best, peer=round(peers[best], 3))
        if pairs:
            found["ratio"] = round(statistics.median(pairs), 3)
    return found


def main():
    with open(sys.argv[1]) as file:
        data = json.load(file)
    ours = data["ours"]
    out = {}
    for (workload, mode, figure), proxies in values(data["samples"]).items():
        if ours in proxies:
            more = FIGURES.get(workload.rstrip("0123456789"), {}).get(figure, False)
            out.setdefault(workload, {}).setdefault(mode, {})[figure] = beside_best(proxies, ours, more)
    failed = [f"{s['workload']} {s['mode']}: {s['failed']}" for s in data["samples"] if s["proxy"] == ours and "failed" in s]
    print(json.dumps({"bench": "proxy", "version": data["versions"].get(ours), "ratios": out, "failed": failed}))
    sys.exit(1 if failed or not out else 0)


if __name__ == "__main__":
    main()
