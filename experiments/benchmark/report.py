"""The benchmark's figures as a table."""


def table(found: dict) -> str:
    """The rows of a benchmark file as a Markdown table, ratios with their range over rounds.

    Args:
      found: The contents of results/benchmark_BACKEND.json.
    """
    lines = [
        "| training step | ours | tasks/s | fastest peer | times as fast | of matmul ceiling |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        ours, ratio = row["ours_ms"]["median"], row["ratio_to_fastest_peer"]
        tasks = f"{row['tasks_per_second']:,.{0 if row['tasks_per_second'] > 100 else 1}f}"
        peer = speed = "not run"
        if ratio is not None:
            name = row["fastest_peer"]
            peer = f"`{name}` {row['peers_ms'][name]['median']:.4g} ms"
            speed = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        lines.append(
            f"| `{row['work']}` | {ours:.4g} ms | {tasks} | {peer} | {speed} "
            f"| {row['share_of_ceiling']['median']:.0%} |"
        )
    return "\n".join(lines) + "\n"
