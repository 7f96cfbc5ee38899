"""Counts words in parallel, in plain Python: `python words.py` against a running federation (`baton local up`).

The folder of this script travels with the graph: nothing has to be installed on the clusters.
"""

from __future__ import annotations

import os

from books import BOOKS  # a module beside this script: it is packed, too

from baton import Graph, task


@task
def titles() -> list[str]:
    return sorted(BOOKS)


@task(retry=3, timeout="1m", cpu=0.5)
def count(title: str) -> dict[str, int]:
    print("counting", title, "on", os.environ.get("BATON_CLUSTER"))  # `baton logs RUN/count-0` shows it
    words: dict[str, int] = {}
    for word in BOOKS[title].lower().split():
        words[word] = words.get(word, 0) + 1
    return words


@task
def most_frequent(counts: list[dict[str, int]], *, known: list[str]) -> dict[str, object]:
    total: dict[str, int] = {}
    for words in counts:
        for word, times in words.items():
            total[word] = total.get(word, 0) + times
    best = max(total, key=lambda word: (total[word], word))
    return {"word": best, "times": total[best], "books": len(known)}


with Graph() as graph:
    answer = most_frequent(count.map(sorted(BOOKS)), known=titles())

if __name__ == "__main__":
    print(graph.run(deadline="5m")[answer])
