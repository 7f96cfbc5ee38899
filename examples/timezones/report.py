"""report.py: the joined counts as a page for people; its first line is what the README checks."""

from __future__ import annotations

from typing import Any

import zones


def report(total: dict[str, Any]) -> str:
    """The page."""
    count, eras = sum(total["zones"].values()), sum(total["eras"].values())
    page = [f"zones={count} eras={eras} rules={total['rules']} links={total['links']}", ""]
    page.append(f"Most eras: {total['most'][1]} with {total['most'][0]}.")
    page += ["", "Area          zones  eras"]
    page += [f"{area:<12} {number:>6} {total['eras'][area]:>5}" for area, number in total["zones"].items()]
    page += ["", "Decade a rule begins  rules"]
    page += [f"{decade:<20} {number:>6}" for decade, number in total["rules_by_decade"].items()]
    return "\n".join(page) + "\n"


if __name__ == "__main__":
    text = report(zones.inputs()["join"])
    print(text, end="")
    zones.finish(text)
