"""Draw the method, for light pages and dark ones: `python docs/figures/draw.py` writes the SVGs beside this file."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from pathlib import Path

PALETTES = {
    "light": {"ink": "#1f2933", "faint": "#6b7785", "clean": "#2f6fb3", "pushed": "#c2531d", "page": "#ffffff"},
    "dark": {"ink": "#e6e9ee", "faint": "#9aa5b4", "clean": "#7fb5ee", "pushed": "#f2955f", "page": "#1f2129"},
}
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


@dataclass
class Drawing:
    """An SVG in the making.

    Attributes:
        palette: colours by what they stand for.
        width: of the picture.
        height: likewise.
        parts: elements so far.
    """

    palette: dict[str, str]
    width: int
    height: int
    parts: list[str] = field(default_factory=list)

    def box(self, x: int, y: int, width: int, height: int, kind: str, lines: tuple[str, ...]) -> None:
        """A box with centred text, the first line bold."""
        colour = self.palette[kind]
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{colour}" fill-opacity="0.12" '
            f'stroke="{colour}" stroke-width="1.6"/>'
        )
        top = y + height / 2 - 10 * (len(lines) - 1) + 5
        for number, line in enumerate(lines):
            self.text(x + width / 2, top + 20 * number, line, kind="ink", bold=number == 0)

    def text(
        self, x: float, y: float, line: str, kind: str = "faint", anchor: str = "middle", bold: bool = False
    ) -> None:
        """A line of text."""
        style = f'fill="{self.palette[kind]}"' + (' font-weight="600"' if bold else "")
        self.parts.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" {style}>{escape(line)}</text>')

    def arrow(self, path: str, kind: str = "faint") -> None:
        """A line with a head, along an SVG path."""
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{self.palette[kind]}" stroke-width="1.8" marker-end="url(#{kind})"/>'
        )

    def svg(self, title: str) -> str:
        """The whole document."""
        heads = "".join(
            f'<marker id="{kind}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0L10 5L0 10z" fill="{colour}"/></marker>'
            for kind, colour in self.palette.items()
        )
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img" '
                f'font-family="{FONT}" font-size="15">',
                f"<title>{escape(title)}</title>",
                f"<defs>{heads}</defs>",
                *self.parts,
                "</svg>\n",
            ]
        )


def two_passes(palette: dict[str, str]) -> str:
    """A step with a proxy pass and an adversarial pass."""
    draw = Drawing(palette, 720, 330)
    draw.box(10, 40, 130, 70, "faint", ("M samples", "of a batch"))
    draw.box(210, 40, 230, 70, "clean", ("proxy pass", "plain training, μ and s"))
    draw.box(520, 40, 190, 70, "clean", ("∇Lₚ", "weight r = M / (M + N)"))
    draw.arrow("M140 75H206", "clean")
    draw.arrow("M440 75H516", "clean")

    draw.box(10, 220, 130, 70, "faint", ("the first N", "in ghost groups"))
    draw.box(210, 220, 230, 70, "pushed", ("adversarial pass", "μ(1 + δμ) and s / (1 + δσ)"))
    draw.box(520, 220, 190, 70, "pushed", ("∇Lₐ", "weight 1 − r"))
    draw.arrow("M75 110V216")
    draw.arrow("M140 255H206", "pushed")
    draw.arrow("M440 255H516", "pushed")

    draw.arrow("M325 110V216", "pushed")
    draw.text(338, 152, "g = ∂Lₚ/∂δ, by the same backward", anchor="start")
    draw.text(338, 180, "δ = ε · sign(g)", kind="pushed", anchor="start", bold=True)
    draw.text(665, 172, "+", kind="ink", bold=True)
    draw.text(710, 318, "the sum moves the weights", anchor="end")
    draw.text(325, 24, "moves the running statistics")
    return draw.svg("APART in two passes: a proxy pass, a perturbation, an adversarial pass")


def one_pass(palette: dict[str, str]) -> str:
    """A step in which clean and perturbed ghost groups share one pass."""
    draw = Drawing(palette, 720, 300)
    draw.box(10, 100, 130, 70, "faint", ("M samples", "in ghost groups"))
    draw.box(210, 40, 230, 76, "clean", ("half of the groups", "clean, μ and s"))
    draw.box(210, 154, 230, 76, "pushed", ("the other groups", "μ(1 + δμ) and s / (1 + δσ)"))
    draw.arrow("M140 125C175 125 170 78 206 78", "clean")
    draw.arrow("M140 145C175 145 170 192 206 192", "pushed")
    draw.box(520, 100, 190, 70, "faint", ("one backward", "r ∇Lₚ + (1 − r) ∇Lₐ"))
    draw.arrow("M440 78C480 78 475 125 516 125", "clean")
    draw.arrow("M440 192C480 192 475 145 516 145", "pushed")
    draw.arrow("M325 264V234", "pushed")
    draw.text(325, 284, "δ = ±ε, by lot; or ε · sign(g) of the step before", kind="pushed", bold=True)
    draw.text(325, 24, "moves the running statistics")
    return draw.svg("APART in one pass: clean and perturbed ghost groups in one batch")


def main() -> None:
    """Write every figure in every palette."""
    for name, palette in PALETTES.items():
        for figure in (two_passes, one_pass):
            path = Path(__file__).parent / f"{figure.__name__.replace('_', '-')}-{name}.svg"
            path.write_text(figure(palette), encoding="utf-8")


if __name__ == "__main__":
    main()
