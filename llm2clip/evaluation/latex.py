"""Result tables as LaTeX (booktabs), to paste into a paper."""

from __future__ import annotations

from collections.abc import Sequence

from llm2clip.evaluation.tables import Table, blank_repeats

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "→": r"$\rightarrow$",
    "↔": r"$\leftrightarrow$",
    "≥": r"$\geq$",
    "–": "--",
    "−": "$-$",
    "×": r"$\times$",
}


def escape(text: str) -> str:
    """Plain text as LaTeX."""
    return "".join(_SPECIAL.get(character, character) for character in text)


def _spanning(table: Table) -> list[str]:
    """The line of headings that span several columns, and the rules below them."""
    if not table.groups:
        return []
    column = len(table.header) - sum(count for _, count in table.groups)
    cells, rules = [""] * column, []
    for name, count in table.groups:
        cells.append(rf"\multicolumn{{{count}}}{{c}}{{{escape(name)}}}")
        rules.append(rf"\cmidrule(lr){{{column + 1}-{column + count}}}")
        column += count
    return ["    " + " & ".join(cells) + r" \\", "    " + " ".join(rules)]


def render_latex(table: Table) -> str:
    """A table environment: caption, label, aligned columns; what stands out is bold, chance is in italics."""

    def line(cells: Sequence[str], number: int = -1, italic: bool = False) -> str:
        shown = []
        for column, cell in enumerate(map(escape, cells)):
            if (number, column) in table.strong:
                cell = rf"\textbf{{{cell}}}"
            elif italic and cell and column >= table.labels - 1:
                cell = rf"\textit{{{cell}}}"
            shown.append(cell)
        return "    " + " & ".join(shown) + r" \\"

    columns = "l" * table.labels + "r" * (len(table.header) - table.labels)
    body: list[str] = []
    above = ""
    for number, (row, shown_row) in enumerate(zip(table.rows, blank_repeats(table), strict=True)):
        if table.labels > 1 and above not in ("", row[0]):
            body.append(r"    \midrule")
        above = row[0]
        body.append(line(shown_row, number, italic=row[table.labels - 1] == "chance"))
    label = "-".join("".join(c if c.isascii() and c.isalnum() else " " for c in table.title.lower()).split())
    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{escape(table.title)}. {escape(table.note)}}}",
            rf"  \label{{tab:{label}}}",
            rf"  \begin{{tabular}}{{{columns}}}",
            r"    \toprule",
            *_spanning(table),
            line(table.header),
            r"    \midrule",
            *body,
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
        ]
    )
