"""Draw the method, for light pages and dark ones: `python docs/figures/draw.py` writes the SVGs beside this file.

They are narrow, so that a telephone shows their text at a size that can be read.
"""

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


def _running_statistics(draw: Drawing, left: int) -> None:
    """Say below a clean box what it updates."""
    draw.text(left, 196, "updates the", anchor="start")
    draw.text(left, 214, "running statistics", anchor="start")


def one_pass(palette: dict[str, str]) -> str:
    """A step in which clean and perturbed ghost groups share one pass."""
    draw = Drawing(palette, 450, 322)
    draw.box(125, 10, 190, 54, "faint", ("M samples", "in ghost groups"))
    draw.arrow("M170 64C170 90 115 82 115 108", "clean")
    draw.arrow("M270 64C270 90 325 82 325 108", "pushed")
    draw.text(332, 72, "random signs", kind="pushed", anchor="start")
    draw.text(332, 92, "δ = ±ε", kind="pushed", anchor="start", bold=True)
    draw.box(15, 112, 200, 62, "clean", ("half of the groups", "clean: μ and s"))
    draw.box(225, 112, 200, 62, "pushed", ("the other groups", "μ(1 + δμ), s / (1 + δσ)"))
    _running_statistics(draw, 15)
    draw.arrow("M155 174C155 215 185 205 185 246", "clean")
    draw.arrow("M325 174C325 215 255 205 255 246", "pushed")
    draw.box(115, 250, 210, 62, "faint", ("one backward", "r ∇Lₚ + (1 − r) ∇Lₐ"))
    return draw.svg("APART in one pass: clean and perturbed ghost groups in one batch")


def two_passes(palette: dict[str, str]) -> str:
    """A step with a proxy pass and an adversarial pass."""
    draw = Drawing(palette, 520, 322)
    draw.box(10, 10, 180, 54, "faint", ("M samples", "of a batch"))
    draw.box(330, 10, 180, 54, "faint", ("the first N", "in ghost groups"))
    draw.arrow("M190 37H326")
    draw.arrow("M100 64V108", "clean")
    draw.arrow("M420 64V108", "pushed")
    draw.box(10, 112, 180, 62, "clean", ("proxy pass", "plain training: μ and s"))
    draw.box(330, 112, 180, 62, "pushed", ("adversarial pass", "μ(1 + δμ), s / (1 + δσ)"))
    draw.arrow("M190 143H326", "pushed")
    draw.text(258, 133, "g = ∂Lₚ/∂δ")
    draw.text(258, 164, "δ = ε · sign(g)", kind="pushed", bold=True)
    _running_statistics(draw, 10)
    draw.arrow("M150 174C150 215 200 205 200 246", "clean")
    draw.arrow("M420 174C420 215 320 205 320 246", "pushed")
    draw.box(155, 250, 210, 62, "faint", ("weighted sum", "r ∇Lₚ + (1 − r) ∇Lₐ"))
    return draw.svg("APART in two passes: a proxy pass, a perturbation, an adversarial pass")


def main() -> None:
    """Write every figure in every palette."""
    for name, palette in PALETTES.items():
        for figure in (two_passes, one_pass):
            path = Path(__file__).parent / f"{figure.__name__.replace('_', '-')}-{name}.svg"
            path.write_text(figure(palette), encoding="utf-8")


if __name__ == "__main__":
    main()
